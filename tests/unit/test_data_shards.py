import gc
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kubegraft import tensorflow_setup  # noqa: F401 - before tensorflow
from kubegraft.config import IngestConfig
from kubegraft.data import ingest as ingest_module
from kubegraft.data.ingest import ingest
from kubegraft.data.manifest import load_manifest
from kubegraft.data.shards import SplitReader, shard_numbers
from kubegraft.errors import DataError

import tensorflow as tf  # isort: skip


@pytest.fixture
def dataset(tmp_path, image_folder, monkeypatch):
    """A dataset of several small shards, with the bytes of its source by path."""
    small = lambda sizes: shard_numbers(sizes, shard_bytes=8000)  # noqa: E731
    monkeypatch.setattr(ingest_module, "shard_numbers", small)
    source = image_folder(classes=3, per_class=12)
    ingest(tmp_path / "dataset", IngestConfig(source=str(source)))
    originals = {str(path.relative_to(source)): path.read_bytes() for path in source.rglob("*.png")}
    return tmp_path / "dataset", originals


def test_a_new_shard_starts_when_one_is_full():
    assert shard_numbers([5, 5, 5, 20, 1], shard_bytes=10) == [0, 0, 1, 1, 2]
    assert shard_numbers([]) == []


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_reading_by_index_gives_the_original_bytes(dataset, split):
    directory, originals = dataset
    manifest = load_manifest(directory)
    with SplitReader(directory, manifest, split) as reader:
        assert len(reader) == manifest.splits[split].num_images
        assert reader.labels.dtype == np.int32
        assert [reader.read(index) for index in range(len(reader))] == [originals[p] for p in reader.paths]
        names = [manifest.classes[label] for label in reader.labels]
        assert names == [path.split("/")[0] for path in reader.paths]
        with ThreadPoolExecutor(8) as pool:
            indices = list(range(len(reader))) * 20
            assert list(pool.map(reader.read, indices)) == [reader.read(index) for index in indices]


def test_shards_are_plain_tfrecords_ordered_by_class_and_digest(dataset):
    directory, originals = dataset
    manifest = load_manifest(directory)
    assert len(manifest.splits["train"].shards) > 2
    files = [str(directory / name) for name in manifest.splits["train"].shards]
    rows = []
    for record in tf.data.TFRecordDataset(files):
        feature = tf.train.Example.FromString(record.numpy()).features.feature
        encoded = feature["image/encoded"].bytes_list.value[0]
        path = feature["image/filename"].bytes_list.value[0].decode()
        assert encoded == originals[path]
        assert feature["image/sha256"].bytes_list.value[0].decode() == hashlib.sha256(encoded).hexdigest()
        assert feature["image/format"].bytes_list.value[0] == b"png"
        assert feature["image/height"].int64_list.value[0] == 32
        assert feature["image/width"].int64_list.value[0] == 32
        label = feature["image/class/label"].int64_list.value[0]
        assert feature["image/class/text"].bytes_list.value[0].decode() == manifest.classes[label]
        rows.append((label, hashlib.sha256(encoded).hexdigest()))
    assert rows == sorted(rows)
    assert len(rows) == manifest.splits["train"].num_images


def test_a_damaged_shard_is_named(dataset):
    directory, _ = dataset
    manifest = load_manifest(directory)
    shard = directory / manifest.splits["train"].shards[0]
    data = bytearray(shard.read_bytes())
    data[data.index(b"\x89PNG") + 60] ^= 1
    shard.write_bytes(data)
    reader = SplitReader(directory, manifest, "train")
    with pytest.raises(DataError, match=shard.name):
        list(reader)
    shard.write_bytes(data[:100])
    with pytest.raises(DataError, match=shard.name):
        list(reader)
    reader.close()
    shard.unlink()
    with pytest.raises(DataError, match=shard.name):
        reader.read(0)


def test_shards_are_closed_with_their_reader(dataset):
    directory, _ = dataset
    manifest = load_manifest(directory)
    reader = SplitReader(directory, manifest, "train")
    reader.read(0)
    (descriptor,) = reader._descriptors.values()
    os.fstat(descriptor)
    del reader
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@pytest.mark.parametrize("name", ["train.index.npy", "train.sha256.npy"])
def test_a_damaged_index_is_named(dataset, name):
    directory, _ = dataset
    manifest = load_manifest(directory)
    (directory / name).write_bytes(b"")
    with pytest.raises(DataError, match=name):
        SplitReader(directory, manifest, "train")
    np.save(directory / name, np.zeros([2, 2]))
    with pytest.raises(DataError, match=name):
        SplitReader(directory, manifest, "train")


def test_an_unknown_split_gets_a_suggestion(dataset):
    directory, _ = dataset
    with pytest.raises(DataError, match="Did you mean 'validation'"):
        SplitReader(directory, load_manifest(directory), "validaton")


def test_a_manifest_survives_saving(dataset, tmp_path):
    directory, _ = dataset
    manifest = load_manifest(directory)
    manifest.save(tmp_path)
    assert load_manifest(tmp_path) == manifest


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", '{"schema": 2}', '{"schema": 1}', '{"schema": 1, "splits": {}}'],
)
def test_a_manifest_that_is_none_is_a_clear_error(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match="Received: "):
        load_manifest(tmp_path)


def test_a_newer_manifest_says_so(dataset):
    directory, _ = dataset
    values = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps({**values, "schema": 9}))
    with pytest.raises(DataError, match="schema=9"):
        load_manifest(directory)
