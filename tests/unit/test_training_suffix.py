"""Fine-tuning from boundary activations, on tiny images and a small random backbone."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from kubegraft.config import FineTuneConfig, HeadConfig, IngestConfig
from kubegraft.data.ingest import ingest
from kubegraft.data.manifest import load_manifest
from kubegraft.data.shards import SplitReader
from kubegraft.errors import Interrupted, ModelError
from kubegraft.modeling.backbones import get_backbone
from kubegraft.modeling.classifier import load_classifier, parts
from kubegraft.modeling.freezing import rate_multipliers, unfreeze_last_blocks
from kubegraft.modeling.splitting import split_backbone
from kubegraft.stage import read_result
from kubegraft.training import block_trials, features, loop
from kubegraft.training.block_trials import Trial, try_depths
from kubegraft.training.distribution import make_strategy
from kubegraft.training.fine_tune import fine_tune
from kubegraft.training.head import train_head
from kubegraft.training.history import History
from kubegraft.training.loop import LoopConfig, train
from kubegraft.training.sources import ImageSource
from kubegraft.training.suffix_data import SuffixData
from kubegraft.training.trainables import HeadOnBackbone, HeadOnSuffix
from tests.conftest import draw_image

SIZE, BATCH_SIZE = 32, 8
BACKBONE = get_backbone("mobilenet_v3_small")
FINE_TUNE = {
    "num_epochs": 3,
    "batch_size": BATCH_SIZE,
    "seed": 3,
    "learning_rate": 3e-3,
    "augmentation": "crop,colour",
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for class_number in range(3):
        folder = root / "images" / f"class_{class_number}"
        folder.mkdir(parents=True)
        for number in range(14):
            draw_image(class_number, number, 40).save(folder / f"{number}.png")
    ingest(root / "dataset", IngestConfig(source=str(root / "images")))
    return root / "dataset"


@pytest.fixture(scope="module")
def head(dataset, tmp_path_factory):
    output = tmp_path_factory.mktemp("head") / "model"
    options = {"weights": "none", "input_size": SIZE, "num_epochs": 2, "batch_size": BATCH_SIZE}
    train_head(dataset, output, HeadConfig(backbone=BACKBONE.name, **options))
    return output


@pytest.fixture(scope="module")
def found(dataset, head, tmp_path_factory):
    """A model directory of a fine-tuning that nobody disturbed, with its number of blocks found by trials."""
    output = tmp_path_factory.mktemp("found") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_trials, "FEWEST_ERRORS", 0)  # of so few images
        fine_tune(dataset, head, output, FineTuneConfig(**FINE_TUNE))
    return output


class InTurns:
    """Images of several views, of which each epoch sees the one that activations are taken of."""

    def __init__(self, images: ImageSource) -> None:
        self._images, self.labels = images, images.reader.labels

    def inputs(self, batches, rows, columns, batch_size):
        view = (batches.index + batches.epoch) % self._images.num_views
        index = view * len(self.labels) + batches.index
        return self._images.inputs(
            dataclasses.replace(batches, index=index, partner=index), rows, columns, batch_size
        )


def trained(way, dataset, head, directory, num_views, num_blocks=4):
    """Train with the whole graph or from activations; return the history and the weights."""
    manifest = load_manifest(dataset)
    strategy = make_strategy()
    with strategy.scope():
        model = load_classifier(head).model
    unfreeze_last_blocks(model, BACKBONE, num_blocks)
    factors = rate_multipliers(model, BACKBONE, num_blocks, 0.5)
    multipliers = {v.path: f for v, f in zip(model.trainable_variables, factors, strict=True)}
    images = tuple(
        ImageSource(SplitReader(dataset, manifest, split), SIZE, transforms, 0.7, views)
        for split, transforms, views in (
            ("train", ("flip", "crop", "colour"), num_views),
            ("validation", (), 1),
        )
    )
    if way == "whole":
        trainable = HeadOnBackbone(parts(model), multipliers)
        sources = tuple(InTurns(each) for each in images)
    else:
        split, sources = SuffixData(strategy, model, BACKBONE, directory).sources(num_blocks, images)
        trainable = HeadOnSuffix(parts(model), split, multipliers)
    config = LoopConfig(
        phase="fine_tune",
        num_classes=3,
        batch_size=BATCH_SIZE,
        num_epochs=3,
        learning_rate=3e-4,
        warmup_fraction=0.1,
        weight_decay=0.05,
        label_smoothing=0.1,
        gradient_clip_norm=0.5,
        patience=10,
        time_budget_seconds=0,
        checkpoint_interval_seconds=100,
        seed=4,
        class_weights=np.array([1, 2, 0.5], np.float32),
    )
    history = train(strategy, trainable, sources, config, directory / f"{way}.ckpt")
    return history, model.get_weights()


@pytest.mark.parametrize("num_views", [1, 3], ids=["one view", "three views"])
def test_training_from_activations_is_training_the_whole_graph(
    dataset, head, tmp_path, monkeypatch, num_views
):
    monkeypatch.setenv("KUBEGRAFT_ENGINE", "keras")  # another engine's rounding grows with every step
    whole, expected = trained("whole", dataset, head, tmp_path, num_views)
    suffix, weights = trained("suffix", dataset, head, tmp_path, num_views)
    for one, other in zip([suffix.start, *suffix.epochs], [whole.start, *whole.epochs], strict=True):
        for name in one.keys() - {"seconds"}:
            assert one[name] == pytest.approx(other[name], abs=2e-5, rel=2e-5), name
    assert suffix.best_epoch == whole.best_epoch
    for one, other in zip(weights, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_view_is_a_function_of_the_image_and_its_number(dataset):
    from kubegraft.training.batches import epoch_batches

    reader = SplitReader(dataset, load_manifest(dataset), "train")

    def views(num_views, seed):
        source = ImageSource(reader, SIZE, ("crop", "colour"), 0.7, num_views)
        batches = epoch_batches(source.labels, batch_size=1, seed=seed, epoch=seed, shuffle=False)
        images = list(source.inputs(batches, slice(None), slice(None), 1).as_numpy_iterator())
        return np.concatenate(images).reshape(num_views, len(reader), SIZE, SIZE, 3)

    three, two = views(3, seed=0), views(2, seed=9)
    np.testing.assert_array_equal(three[:2], two)
    assert not any(np.array_equal(a, b) for a, b in zip(three[1], three[2], strict=True))
    plain = ImageSource(reader, SIZE)
    batches = epoch_batches(plain.labels, batch_size=len(reader), seed=0, epoch=0, shuffle=False)
    np.testing.assert_array_equal(
        next(iter(plain.inputs(batches, slice(None), slice(None), len(reader)))), three[0]
    )


def test_a_cut_behind_a_trainable_block_is_refused(head):
    model = load_classifier(head).model
    unfreeze_last_blocks(model, BACKBONE, 3)
    split = split_backbone(parts(model).backbone, BACKBONE, 2)
    with pytest.raises(ModelError, match="behind its cut"):
        HeadOnSuffix(parts(model), split)


def test_open_blocks_are_found_by_trials_and_told(found):
    metadata = load_classifier(found).metadata
    trials = metadata["trials"]
    assert [trial["num_blocks"] for trial in trials] == [2, 3, 5][: len(trials)]
    assert len(trials) > 1
    best = max(trials, key=lambda trial: (trial["validation_accuracy"], -trial["validation_loss"]))
    assert metadata["num_unfrozen_blocks"] == best["num_blocks"] == metadata["config"]["num_blocks"]
    assert read_result(found).metrics["validation_accuracy"] == best["validation_accuracy"]
    choices = {choice["name"]: choice for choice in metadata["choices"]}
    assert f"{best['num_blocks']} (" in choices["num_blocks"]["reason"]
    assert choices["frozen_blocks"]["value"] == "computed once"
    assert choices["augmentation_views"]["value"] == "2 cached views"


def test_blocks_found_by_trials_are_as_good_as_given_ones(dataset, head, found, tmp_path):
    num_blocks = load_classifier(found).metadata["num_unfrozen_blocks"]
    given = fine_tune(dataset, head, tmp_path / "given", FineTuneConfig(**FINE_TUNE, num_blocks=num_blocks))
    expected = read_result(found).metrics["validation_loss"]
    assert given.metrics["validation_loss"] == pytest.approx(expected, abs=1e-4)
    models = [load_classifier(directory).model for directory in (tmp_path / "given", found)]
    for one, other in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize(
    ("num_validation", "accuracies", "tried", "ended"),
    [
        (1000, (0.90, 0.95, 0.98), 3, ""),
        (1000, (0.90, 0.89, 0.98), 2, "did not pay"),
        (1000, (0.50, 0.95, 0.98), 1, "did not pay"),  # the model that came in had 0.6
        (100, (0.90, 0.95, 0.98), 2, "5 wrong answers"),
    ],
    ids=["all pay", "one does not", "worse than before", "too few errors"],
)
def test_deeper_cuts_are_tried_while_they_pay(num_validation, accuracies, tried, ended):
    def run(depth, _):
        result = {"validation_accuracy": accuracies[depths.index(depth)], "validation_loss": 1.0}
        before = {"validation_accuracy": 0.6, "validation_loss": 1.0}
        kept = 0 if result["validation_accuracy"] > 0.6 else -1
        return Trial(depth, History(start=before, epochs=[{**result, "seconds": 1.0}], best_epoch=kept), ())

    depths = (6, 9, 14)
    best, summaries, reason = try_depths(depths, run, num_validation=num_validation, time_budget_seconds=0)
    assert len(summaries) == tried
    assert best.num_blocks == depths[max(range(tried), key=lambda number: accuracies[number])]
    assert ended in reason
    assert (reason == "") == (ended == "")


def test_deeper_cuts_share_the_time_budget():
    def run(depth, left):
        given.append(left)
        result = {"validation_accuracy": depth / 100, "validation_loss": 1.0, "seconds": 10.0}
        return Trial(depth, History(start=result, epochs=[result], best_epoch=0), ())

    given: list[float] = []
    _, _, reason = try_depths((6, 9, 14), run, num_validation=1000, time_budget_seconds=25)
    assert given == [25, 15]
    assert "time budget" in reason


MIXES = {
    "mixup": ({"augmentation": "mixup", "num_blocks": 2}, "mixup blends pixels"),
    "all blocks": ({"num_blocks": BACKBONE.num_blocks}, "no frozen part"),
}


@pytest.mark.parametrize(("options", "reason"), MIXES.values(), ids=MIXES)
def test_what_must_pass_the_frozen_blocks_trains_the_full_graph(dataset, head, tmp_path, options, reason):
    fine_tune(dataset, head, tmp_path / "model", FineTuneConfig(**{**FINE_TUNE, "num_epochs": 1} | options))
    choices = {c["name"]: c for c in load_classifier(tmp_path / "model").metadata["choices"]}
    assert choices["frozen_blocks"]["value"] == "run in every epoch"
    assert reason in choices["frozen_blocks"]["reason"]


@pytest.mark.parametrize(
    ("module", "stops"), [(features, (1, 4)), (loop, (1, 7))], ids=["computing activations", "training"]
)
def test_a_stopped_fine_tuning_goes_on_to_the_same_model(
    dataset, head, found, tmp_path, monkeypatch, module, stops
):
    config = FineTuneConfig(**FINE_TUNE)
    monkeypatch.setattr(block_trials, "FEWEST_ERRORS", 0)
    stop_requested = module.stop_requested
    for number_of_calls in stops:
        remaining = iter([False] * (number_of_calls - 1) + [True])
        monkeypatch.setattr(module, "stop_requested", lambda remaining=remaining: next(remaining, False))
        with pytest.raises(Interrupted):
            fine_tune(dataset, head, tmp_path / "stopped", config)
    monkeypatch.setattr(module, "stop_requested", stop_requested)
    continued = fine_tune(dataset, head, tmp_path / "stopped", config)
    assert continued.digest == read_result(found).digest


def test_mixed_precision_trains_from_what_it_computes(dataset, head, tmp_path):
    options = {"num_epochs": 1, "num_blocks": 2, "mixed_precision": "on"}
    result = fine_tune(dataset, head, tmp_path / "model", FineTuneConfig(**FINE_TUNE | options))
    assert result.provenance["frozen_blocks"] == "activations"
    assert np.isfinite(result.metrics["validation_loss"])


def test_bfloat16_activations_are_kept_as_their_bits(tmp_path):
    from kubegraft.modeling.splitting import Boundary
    from kubegraft.training.activations import ActivationSource
    from kubegraft.training.batches import epoch_batches

    values = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    rows = tf.bitcast(tf.cast(values, tf.bfloat16), tf.uint16).numpy()
    source = ActivationSource(np.zeros(6, np.int32), Boundary(1, ((2, 2),), "bfloat16"), 1, lambda: rows)
    batches = epoch_batches(source.labels, batch_size=6, seed=0, epoch=0, shuffle=False)
    (batch,) = source.inputs(batches, slice(None), slice(None), 6)
    np.testing.assert_array_equal(batch, tf.cast(values, tf.bfloat16))
