"""Head training and fine-tuning of a small random backbone, on tiny images."""

import json

import numpy as np
import pytest
import tensorflow as tf

from kubegraft.config import FineTuneConfig, HeadConfig, IngestConfig
from kubegraft.data.ingest import ingest
from kubegraft.data.manifest import load_manifest
from kubegraft.data.resizing import resize
from kubegraft.data.shards import SplitReader
from kubegraft.errors import ConfigError, ModelError
from kubegraft.modeling.backbones import get_backbone
from kubegraft.modeling.classifier import build_classifier, load_classifier, parts
from kubegraft.training.fine_tune import fine_tune
from kubegraft.training.head import train_head
from kubegraft.training.sources import ImageSource
from kubegraft.training.trainables import HeadOnBackbone

SIZE = 32
HEAD = {
    "backbone": "mobilenet_v2",
    "weights": "none",
    "input_size": SIZE,
    "num_epochs": 3,
    "batch_size": 8,
    "seed": 2,
}
FINE_TUNE = {"num_blocks": 3, "num_epochs": 2, "batch_size": 8, "seed": 2, "augmentation": "none"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A small dataset of three colours."""
    from PIL import Image

    from tests.conftest import draw_image

    root = tmp_path_factory.mktemp("data")
    for class_number in range(3):
        folder = root / "images" / f"class_{class_number}"
        folder.mkdir(parents=True)
        for number in range(14):
            image: Image.Image = draw_image(class_number, number, 40)
            image.save(folder / f"{number}.png")
    ingest(root / "dataset", IngestConfig(source=str(root / "images")))
    return root / "dataset"


@pytest.fixture(scope="module")
def head(dataset, tmp_path_factory):
    """A model directory of `train_head`."""
    output = tmp_path_factory.mktemp("head") / "model"
    train_head(dataset, output, HeadConfig(**HEAD))
    return output


@pytest.fixture(scope="module")
def tuned(dataset, head, tmp_path_factory):
    """A model directory of `fine_tune`, with a rate that certainly moves what it may move."""
    output = tmp_path_factory.mktemp("tuned") / "model"
    fine_tune(dataset, head, output, FineTuneConfig(**FINE_TUNE, learning_rate=1e-3))
    return output


def weights_of(model):
    return {weight.path: weight.numpy() for weight in parts(model).backbone.weights}


def test_head_training_does_not_move_the_backbone_by_one_bit(dataset, head):
    config = HeadConfig(**HEAD, dropout=0.0, features="levels")
    untouched = build_classifier(
        get_backbone("mobilenet_v2"), SIZE, load_manifest(dataset).classes, config, policy="float32"
    )
    before, after = weights_of(untouched), weights_of(load_classifier(head).model)
    assert len(before) > 100
    for (name, one), other in zip(before.items(), after.values(), strict=True):
        np.testing.assert_array_equal(one, other, err_msg=name)


def test_fine_tuning_moves_the_last_blocks_only_and_no_batch_norm(dataset, head, tmp_path, monkeypatch):
    from kubegraft.training import loop

    # Keep the last epoch whatever it is worth, so that there is something to see.
    monkeypatch.setattr(loop, "rank", lambda result: (result.get("epoch", -1.0),))
    monkeypatch.setattr(loop, "surely_better", lambda result, start, num_images: True)
    fine_tune(dataset, head, tmp_path / "model", FineTuneConfig(**FINE_TUNE, learning_rate=1e-2))
    before = load_classifier(head).model
    after = load_classifier(tmp_path / "model").model
    backbone = get_backbone("mobilenet_v2")
    from kubegraft.modeling.backbones import block_of_layer

    core = parts(before).backbone
    blocks = block_of_layer(backbone, core)
    moved = set()
    for layer, other in zip(core.layers, parts(after).backbone.layers, strict=True):
        for one, two in zip(layer.weights, other.weights, strict=True):
            if not np.array_equal(one.numpy(), two.numpy()):
                assert "BN" not in layer.name and "bn" not in layer.name, layer.name
                moved.add(blocks[layer.name])
    assert moved == {backbone.num_blocks - 3, backbone.num_blocks - 2, backbone.num_blocks - 1}


def test_fine_tuning_is_never_worse_and_says_what_it_kept(head, tuned):
    result = json.loads((tuned / "result.json").read_text())
    assert result["metrics"]["validation_accuracy"] >= result["metrics"]["start_validation_accuracy"]
    assert result["provenance"]["kept"] in ("fine_tuned", "head")
    assert (tuned / "head_history.json").read_text() == (head / "history.json").read_text()


def test_a_model_that_fine_tuning_does_not_improve_comes_out_as_it_went_in(dataset, head, tmp_path):
    result = fine_tune(dataset, head, tmp_path / "model", FineTuneConfig(**FINE_TUNE | {"num_blocks": 0}))
    assert result.provenance["kept"] == "head"
    assert result.digest == json.loads((head / "result.json").read_text())["digest"]


def test_the_same_training_twice_gives_the_same_weights(dataset, head, tmp_path):
    again = train_head(dataset, tmp_path / "model", HeadConfig(**HEAD))
    assert again.digest == json.loads((head / "result.json").read_text())["digest"]
    assert not again.reused


def test_the_saved_model_answers_like_the_loop(dataset, head):
    loaded = load_classifier(head)
    reader = SplitReader(dataset, load_manifest(dataset), "validation")
    from kubegraft.data.decode import decode_any

    for index in range(3):
        image = decode_any(tf.constant(reader.read(index)))
        in_loop = tf.nn.softmax(HeadOnBackbone(parts(loaded.model)).logits(resize(image, SIZE)[None]))
        np.testing.assert_allclose(loaded.model(image[None]), in_loop, atol=1e-5)


OTHER_HEADS = {
    "mlp": {"head": "mlp", "hidden_units": (8, 4), "batch_norm": True},
    "augmented": {"augmentation": "flip,mixup"},
    "mixed_precision": {"mixed_precision": "on"},
}


@pytest.mark.parametrize("options", OTHER_HEADS.values(), ids=OTHER_HEADS)
def test_other_heads_and_augmented_heads_train(dataset, tmp_path, options):
    result = train_head(dataset, tmp_path / "model", HeadConfig(**HEAD | options))
    assert 0 <= result.metrics["validation_accuracy"] <= 1


SOLVED = {"backbone": "mobilenet_v2", "weights": "none", "input_size": SIZE, "batch_size": 8, "seed": 2}


def test_a_head_that_nobody_chose_numbers_for_is_solved_for(dataset, tmp_path):
    result = train_head(dataset, tmp_path / "model", HeadConfig(**SOLVED))
    loaded = load_classifier(tmp_path / "model")
    history = json.loads((tmp_path / "model" / "history.json").read_text())
    kept = history["epochs"][history["best_epoch"]]
    assert history["solver"] == "lbfgs"
    assert kept["converged"]
    assert result.metrics["validation_accuracy"] == kept["validation_accuracy"]
    choices = {choice["name"]: choice for choice in loaded.metadata["choices"]}
    assert choices["solver"]["value"] == "lbfgs"
    assert (
        choices["weight_decay"]["value"] == kept["weight_decay"] == loaded.metadata["config"]["weight_decay"]
    )
    assert "on validation" in choices["weight_decay"]["reason"]

    reader = SplitReader(dataset, load_manifest(dataset), "validation")
    from kubegraft.data.decode import decode_any

    images = tf.stack([decode_any(tf.constant(reader.read(index))) for index in range(len(reader.labels))])
    answers = loaded.model(images).numpy()
    losses = -np.log(answers[np.arange(len(answers)), reader.labels])
    assert losses.mean() == pytest.approx(kept["validation_loss"], abs=1e-4)

    again = train_head(dataset, tmp_path / "again", HeadConfig(**SOLVED))
    assert again.digest == result.digest
    head_config = {**loaded.metadata["config"], "hidden_units": (256,)}
    said_again = train_head(dataset, tmp_path / "said_again", HeadConfig(**head_config))
    assert said_again.metrics["validation_loss"] == pytest.approx(kept["validation_loss"], abs=2e-3)


def test_a_searched_head_is_trained_on_all_of_the_training_split(dataset, tmp_path):
    options = {"search_seconds": 1e-6, "head": "mlp", "hidden_units": (4,)}
    train_head(dataset, tmp_path / "model", HeadConfig(**SOLVED | options))
    loaded = load_classifier(tmp_path / "model")
    assert loaded.metadata["head"]["head"] == "linear"
    assert [layer.name for layer in parts(loaded.model).head_layers] == ["standardise", "dropout", "logits"]
    choices = {choice["name"]: choice for choice in loaded.metadata["choices"]}
    assert "cross-validation" in choices["head"]["reason"]
    assert choices["solver"]["value"] == "lbfgs"
    assert loaded.metadata["config"]["search_seconds"] == 0  # what was found can be said again


def test_a_search_that_is_done_is_not_done_again(dataset, tmp_path, monkeypatch):
    from kubegraft.errors import Interrupted
    from kubegraft.training import head as stage

    calls, search, fit = [], stage.search_head, stage.fit_linear_head

    def searches(*arguments):
        calls.append("search")
        return search(*arguments)

    def fits(*arguments, **options):
        calls.append("fit")
        if calls.count("fit") == 1:
            raise Interrupted("now")
        return fit(*arguments, **options)

    monkeypatch.setattr(stage, "search_head", searches)
    monkeypatch.setattr(stage, "fit_linear_head", fits)
    config = HeadConfig(**SOLVED | {"search_seconds": 1e-6})
    with pytest.raises(Interrupted, match="now"):
        train_head(dataset, tmp_path / "model", config)
    train_head(dataset, tmp_path / "model", config)
    assert calls == ["search", "fit", "fit"]


def test_a_stopped_head_comes_to_the_same_head(dataset, tmp_path, monkeypatch):
    from kubegraft.errors import Interrupted
    from kubegraft.training import linear_head

    whole = train_head(dataset, tmp_path / "whole", HeadConfig(**SOLVED))
    remaining = iter([False] * 20 + [True])
    monkeypatch.setattr(linear_head, "stop_requested", lambda: next(remaining, False))
    with pytest.raises(Interrupted):
        train_head(dataset, tmp_path / "model", HeadConfig(**SOLVED))
    assert train_head(dataset, tmp_path / "model", HeadConfig(**SOLVED)).digest == whole.digest


def test_choices_and_provenance_travel_with_the_model(dataset, tuned):
    metadata = load_classifier(tuned).metadata
    assert metadata["dataset_digest"] == load_manifest(dataset).digest
    assert {choice["name"] for choice in metadata["choices"]} >= {"learning_rate", "num_blocks", "batch_size"}
    assert all(choice["reason"] for choice in metadata["choices"] + metadata["head_choices"])
    assert metadata["classes"] == ["class_0", "class_1", "class_2"]


def test_more_blocks_than_there_are_is_a_clear_error(dataset, head, tmp_path):
    with pytest.raises(ConfigError, match=r"`num_blocks` must be at most \d+ for mobilenet_v2"):
        fine_tune(dataset, head, tmp_path / "model", FineTuneConfig(num_blocks=1000))


def test_a_model_of_other_classes_is_refused(image_folder, head, tmp_path):
    ingest(tmp_path / "dataset", IngestConfig(source=str(image_folder(classes=2))))
    with pytest.raises(ModelError, match=r"must know the classes of the dataset"):
        fine_tune(tmp_path / "dataset", head, tmp_path / "model", FineTuneConfig(**FINE_TUNE))


def test_no_thread_that_tunes_the_input_outlives_an_epoch(dataset):
    """On one core the next epoch waited for TensorFlow's, up to a minute."""
    from kubegraft.training.batches import epoch_batches

    source = ImageSource(SplitReader(dataset, load_manifest(dataset), "train"), SIZE)
    batches = epoch_batches(source.labels, batch_size=4, seed=1, epoch=0)
    images = source.inputs(batches, slice(None), slice(None), 4)
    assert images.options().autotune.enabled is False
    assert tf.data.Dataset.zip((images, images)).options().autotune.enabled is False, (
        "it must hold for what is made of it"
    )


def test_an_image_is_augmented_differently_each_epoch_and_alike_each_time(dataset):
    from kubegraft.training.batches import epoch_batches

    source = ImageSource(
        SplitReader(dataset, load_manifest(dataset), "train"), SIZE, ("crop", "rotation"), 0.8
    )

    def first_batch(epoch):
        batches = epoch_batches(source.labels, batch_size=4, seed=1, epoch=epoch)
        images = next(iter(source.inputs(batches, slice(None), slice(None), 4)))
        return dict(zip(batches.index[0].tolist(), images.numpy(), strict=True))

    one, again = first_batch(0), first_batch(0)
    assert all(np.array_equal(one[index], again[index]) for index in one)
    batches = epoch_batches(source.labels, batch_size=len(source.labels), seed=1, epoch=0, shuffle=False)
    later = epoch_batches(source.labels, batch_size=len(source.labels), seed=1, epoch=1, shuffle=False)
    size = len(source.labels)
    a, b = (next(iter(source.inputs(e, slice(None), slice(None), size))).numpy() for e in (batches, later))
    assert all(not np.array_equal(one, other) for one, other in zip(a, b, strict=True))


def test_a_random_backbone_whose_features_vanish_still_trains(dataset, tmp_path):
    """MobileNet's random weights shrink its features to 1e-21, and their variance below float32."""
    result = train_head(dataset, tmp_path / "model", HeadConfig(**HEAD | {"backbone": "mobilenet"}))
    assert np.isfinite(result.metrics["validation_loss"])
