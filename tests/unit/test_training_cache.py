"""What the shared feature cache does for training: it saves work and changes nothing else."""

import dataclasses
import shutil

import numpy as np
import pytest

from kubegraft.cache import FeatureCache
from kubegraft.config import FineTuneConfig, HeadConfig, IngestConfig
from kubegraft.data.ingest import ingest
from kubegraft.data.manifest import load_manifest
from kubegraft.data.shards import SplitReader
from kubegraft.errors import Interrupted
from kubegraft.modeling.backbones import get_backbone
from kubegraft.modeling.identity import network_digest
from kubegraft.modeling.splitting import pack
from kubegraft.training import features
from kubegraft.training.distribution import make_strategy
from kubegraft.training.features import extract_rows
from kubegraft.training.fine_tune import fine_tune
from kubegraft.training.frozen_pass import FrozenPass, PassCounts
from kubegraft.training.head import train_head
from kubegraft.training.sources import ImageSource
from tests.conftest import draw_image

SIZE = 32
HEAD = HeadConfig(backbone="mobilenet_v3_small", weights="none", input_size=SIZE, seed=2)
FINE_TUNE = FineTuneConfig(num_blocks=2, num_epochs=2, batch_size=8, seed=2, learning_rate=3e-3)
COUNTS = ("images_decoded", "features_found", "features_computed")


def write_dataset(root, per_class):
    """Images of three classes, in a folder for each split."""
    for split, first in (("train", 0), ("validation", 1000), ("test", 2000)):
        for class_number in range(3):
            folder = root / "images" / split / f"class_{class_number}"
            folder.mkdir(parents=True)
            for number in range(per_class):
                draw_image(class_number, first + number, 40).save(folder / f"{number}.png")
    ingest(root / "dataset", IngestConfig(source=str(root / "images")))
    return root / "dataset"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), 12)


@pytest.fixture(scope="module")
def cold(dataset, tmp_path_factory):
    """A cache that a head training and a fine-tuning filled, and what they came to."""
    root = tmp_path_factory.mktemp("cold")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBEGRAFT_CACHE", str(root / "cache"))
        head = train_head(dataset, root / "head", HEAD)
        tuned = fine_tune(dataset, root / "head", root / "tuned", FINE_TUNE)
    return root, head, tuned


def counts(result):
    return {name: result.metrics[name] for name in COUNTS}


def num_images(dataset):
    splits = load_manifest(dataset).splits
    return splits["train"].num_images + splits["validation"].num_images


def test_each_image_passes_the_frozen_blocks_once_for_head_and_fine_tuning(dataset, cold):
    _, head, tuned = cold
    count = num_images(dataset)
    assert (head.metrics["features_found"], head.metrics["features_computed"]) == (0, count)
    assert counts(tuned) == {"images_decoded": 0, "features_found": count, "features_computed": 0}


def test_another_cut_than_the_recipes_is_computed(dataset, cold, tmp_path, monkeypatch):
    root, *_ = cold
    monkeypatch.setenv("KUBEGRAFT_CACHE", str(root / "cache"))
    tuned = fine_tune(
        dataset, root / "head", tmp_path / "tuned", dataclasses.replace(FINE_TUNE, num_blocks=1)
    )
    assert tuned.metrics["features_found"] == 0
    assert tuned.metrics["features_computed"] == num_images(dataset)


def test_a_cut_that_the_head_is_told_of_is_met_on_its_way(dataset, cold, tmp_path, monkeypatch):
    _, head, _ = cold
    monkeypatch.setenv("KUBEGRAFT_CACHE", str(tmp_path / "cache"))
    deeper = dataclasses.replace(FINE_TUNE, num_blocks=5)
    told = train_head(dataset, tmp_path / "head", HEAD, deeper)
    assert told.digest == head.digest
    tuned = fine_tune(dataset, tmp_path / "head", tmp_path / "tuned", deeper)
    assert counts(tuned) == {
        "images_decoded": 0,
        "features_found": num_images(dataset),
        "features_computed": 0,
    }


def test_a_second_run_decodes_no_image_and_comes_to_the_same(dataset, cold, tmp_path, monkeypatch):
    root, head, tuned = cold
    count = num_images(dataset)
    monkeypatch.setenv("KUBEGRAFT_CACHE", str(root / "cache"))
    again = train_head(dataset, tmp_path / "head", HEAD)
    assert counts(again) == {"images_decoded": 0, "features_found": count, "features_computed": 0}
    assert again.digest == head.digest
    again = fine_tune(dataset, tmp_path / "head", tmp_path / "tuned", FINE_TUNE)
    assert counts(again) == {"images_decoded": 0, "features_found": count, "features_computed": 0}
    assert again.digest == tuned.digest


@pytest.mark.parametrize("state", ["off", "damaged"])
def test_whatever_the_cache_is_like_the_models_are_the_same(dataset, cold, tmp_path, monkeypatch, state):
    root, head, tuned = cold
    place = tmp_path / "cache"
    monkeypatch.setenv("KUBEGRAFT_CACHE", "none" if state == "off" else str(place))
    if state == "damaged":
        shutil.copytree(root / "cache", place)
        for path in place.rglob("*.shard"):
            content = bytearray(path.read_bytes())
            content[5000] ^= 1
            path.write_bytes(content)
    again = train_head(dataset, tmp_path / "head", HEAD)
    assert again.digest == head.digest
    again = fine_tune(dataset, tmp_path / "head", tmp_path / "tuned", FINE_TUNE)
    assert again.digest == tuned.digest


def test_only_new_images_are_decoded(cold, tmp_path, monkeypatch):
    root, head, _ = cold
    more = write_dataset(tmp_path / "more", 13)
    monkeypatch.setenv("KUBEGRAFT_CACHE", str(root / "cache"))
    result = train_head(more, tmp_path / "head", HEAD)
    assert counts(result) == {
        "images_decoded": 6,
        "features_found": head.metrics["features_computed"],
        "features_computed": 6,
    }


class Pixels:
    """A frozen network that counts its images: the mean colour of each."""

    name, digest, batch_size, num_workers = "pixels", "c" * 64, 8, 1

    def __init__(self):
        self.num_images = 0

    def forward(self, images):
        self.num_images += int((images.max((1, 2, 3)) > 0).sum())
        return images.mean((1, 2))


class Kept:
    """Known rows by their number, with repetitions of the example before."""

    def __init__(self, rows):
        self.rows, self.kept = rows, []

    def first_of_each(self):
        numbers = np.arange(len(self.rows))
        return numbers[numbers % 5 != 1], numbers[numbers % 5 == 1], numbers[numbers % 5 == 1] - 1

    def read(self, numbers):
        return self.rows[numbers], ~np.isnan(self.rows[numbers, 0])

    def keeping(self, num_missing):
        import contextlib

        return contextlib.nullcontext(lambda numbers, rows, more: self.kept.extend(numbers.tolist()))


def test_a_stopped_pass_over_partly_known_images_goes_on(dataset, tmp_path, monkeypatch):
    reader = SplitReader(dataset, load_manifest(dataset), "train")
    source = ImageSource(reader, SIZE)
    whole = extract_rows(make_strategy(), Pixels(), source, row_length=3, path=tmp_path / "whole.npy")
    some = np.where(np.arange(len(reader))[:, None] % 3 == 0, whole, np.nan)
    known, engine = Kept(some), Pixels()
    num_missing = int(np.isnan(some[known.first_of_each()[0], 0]).sum())
    remaining = iter([False, True])
    monkeypatch.setattr(features, "stop_requested", lambda: next(remaining, False))
    path = tmp_path / "rows.npy"
    with pytest.raises(Interrupted, match="asked to stop"):
        extract_rows(make_strategy(), Pixels(), source, row_length=3, path=path, known=known)
    num_kept = len(known.kept)
    rows = extract_rows(make_strategy(), engine, source, row_length=3, path=path, known=known)
    assert engine.num_images == num_missing - num_kept > 0
    assert len(known.kept) == len(set(known.kept)) == num_missing
    expected = np.array(whole)
    numbers = np.arange(len(reader))
    expected[numbers % 5 == 1] = whole[numbers[numbers % 5 == 1] - 1]
    np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize("all_or_nothing", [False, True])
def test_a_full_cache_takes_nothing_and_costs_nothing(dataset, tmp_path, all_or_nothing):
    frozen = frozen_pass(
        FeatureCache.open(tmp_path / "cache", budget_bytes=2**10), all_or_nothing=all_or_nothing
    )
    reader = SplitReader(dataset, load_manifest(dataset), "validation")
    rows = frozen.rows(ImageSource(reader, SIZE), tmp_path / "rows.npy")
    assert np.isfinite(rows).all() and frozen.counts.num_computed == len(rows)
    assert not list((tmp_path / "cache").rglob("*.shard"))


def frozen_pass(cache, **options):
    """A small random backbone and its feature map."""
    core = get_backbone(HEAD.backbone).build(SIZE, "none", seed=0)
    return FrozenPass(
        strategy=make_strategy(),
        network=core,
        forward=lambda images: pack(core(images, training=False), "float32"),
        kind="pooled",
        groups=(int(np.prod(core.output_shape[1:])),),
        dtype="float32",
        policy="float32",
        backbone=HEAD.backbone,
        cache=cache,
        counts=PassCounts(),
        **options,
    )


def test_a_row_is_the_same_bits_whatever_is_computed_with_it(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("KUBEGRAFT_ENGINE", "keras")
    reader = SplitReader(dataset, load_manifest(dataset), "train")
    source = ImageSource(reader, SIZE, ("flip",), 0.5, 2)

    def computed(directory, cache):
        directory.mkdir()
        frozen = frozen_pass(cache)
        return np.array(frozen.rows(source, directory / "rows.npy")), frozen

    whole, frozen = computed(tmp_path / "whole", FeatureCache.open("none"))
    cache = FeatureCache.open(tmp_path / "cache")
    for space in frozen.spaces(source, "keras"):
        with cache.writer(space) as writer:  # every second one, of either view
            view = int(bool(space.augmentation))
            chosen = np.arange(0, len(reader), 2)
            writer.append(reader.digests[chosen], whole[chosen + view * len(reader)], view)
    mixed, frozen = computed(tmp_path / "mixed", cache)
    assert frozen.counts.num_found == frozen.counts.num_computed == len(reader)
    np.testing.assert_array_equal(mixed, whole)
    assert not np.array_equal(whole[: len(reader)], whole[len(reader) :])


def test_a_network_has_one_digest_and_another_with_other_weights():
    backbone = get_backbone(HEAD.backbone)
    one, two = (backbone.build(SIZE, "none", seed=0) for _ in range(2))
    digest = network_digest(one)
    two.layers[-1].trainable = two.layers[2].trainable = False
    assert network_digest(two) == digest
    assert network_digest(backbone.build(SIZE, "none", seed=1)) != digest
    weights = two.get_weights()
    weights[-1] = weights[-1] + 1
    two.set_weights(weights)
    assert network_digest(two) != digest
