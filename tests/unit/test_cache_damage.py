"""Damaged and half-written files of the feature cache are noticed, and their values computed again, never used."""

import os

import numpy as np
import pytest

from kubegraft.cache import FeatureCache
from kubegraft.cache.shard_file import PAGE_BYTES, ROW_DTYPE
from kubegraft.cache.shelves import open_shelf
from kubegraft.cache.upkeep import prune, verify
from tests.unit.test_cache import POOLED, compute_from, keep, keys_of, shards, values_of

NUM_ROWS = 12
KEYS, VALUES = keys_of(range(NUM_ROWS)), values_of(range(NUM_ROWS))
TABLE = PAGE_BYTES + NUM_ROWS * POOLED.value_bytes
PLACES = {
    "magic": 3,
    "number of rows": 8,
    "value bytes": 17,
    "space": 30,
    "digest of the table": 70,
    "rest of the page": 3000,
    "digest of the page": PAGE_BYTES - 5,
    "first value": PAGE_BYTES,
    "a value": PAGE_BYTES + 5 * POOLED.value_bytes + 7,
    "last value": TABLE - 1,
    "a key": TABLE + 4 * ROW_DTYPE.itemsize + 9,
    "a view": TABLE + 4 * ROW_DTYPE.itemsize + 33,
    "a checksum": TABLE + 4 * ROW_DTYPE.itemsize + 37,
    "last byte": TABLE + NUM_ROWS * ROW_DTYPE.itemsize - 1,
}


@pytest.fixture
def shard(tmp_path):
    keep(FeatureCache.open(tmp_path), range(NUM_ROWS))
    (path,) = shards(tmp_path)
    assert path.stat().st_size == TABLE + NUM_ROWS * ROW_DTYPE.itemsize
    return path


def assert_computed_again(directory, capfd, most_found):
    """A run comes to the right values, says what it met, and the next run is whole again."""
    filled = FeatureCache.open(directory).fill(POOLED, KEYS, compute_from(VALUES))
    assert np.array_equal(filled.values, VALUES)
    assert filled.num_found <= most_found
    assert "cache: damaged" in capfd.readouterr().err
    again = FeatureCache.open(directory).fill(POOLED, KEYS, compute_from(VALUES))
    assert (again.num_found, np.array_equal(again.values, VALUES)) == (NUM_ROWS, True)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("bit", [0x01, 0x80], ids=["low", "high"])
def test_a_flipped_bit_is_noticed(shard, tmp_path, capfd, place, bit):
    content = bytearray(shard.read_bytes())
    content[PLACES[place]] ^= bit
    shard.write_bytes(content)
    whole = "value" not in place or place == "value bytes"
    assert_computed_again(tmp_path, capfd, 0 if whole else NUM_ROWS - 1)
    assert verify(open_shelf(tmp_path)).ok is False
    assert verify(open_shelf(tmp_path)).ok
    values, found = FeatureCache.open(tmp_path).reader(POOLED).read(KEYS)
    assert found.all()
    assert np.array_equal(values, VALUES)


@pytest.mark.parametrize("seed", range(40))
def test_any_flipped_bit_is_noticed(shard, tmp_path, capfd, seed):
    content = bytearray(shard.read_bytes())
    dice = np.random.default_rng(seed)
    content[dice.integers(len(content))] ^= 1 << int(dice.integers(8))
    shard.write_bytes(content)
    assert_computed_again(tmp_path, capfd, NUM_ROWS - 1)


@pytest.mark.parametrize(
    "length",
    [0, 1, 7, 100, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 1, TABLE - 1, TABLE, TABLE + 41, -40, -1],
)
def test_a_truncated_shard_is_noticed(shard, tmp_path, capfd, length):
    os.truncate(shard, length if length >= 0 else shard.stat().st_size + length)
    assert_computed_again(tmp_path, capfd, 0)
    assert not verify(open_shelf(tmp_path)).ok
    assert verify(open_shelf(tmp_path)).ok


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", bytes(8192), np.random.default_rng(0).bytes(9000), b"KGFEATS1" + bytes(9000)],
    ids=["empty", "text", "zeros", "random", "magic only"],
)
def test_garbage_is_noticed(shard, tmp_path, capfd, content):
    shard.write_bytes(content)
    assert_computed_again(tmp_path, capfd, 0)


def test_appended_bytes_are_noticed(shard, tmp_path, capfd):
    with shard.open("ab") as file:
        file.write(b"more")
    assert_computed_again(tmp_path, capfd, 0)


def test_a_hole_where_values_were_is_noticed(shard, tmp_path, capfd):
    content = bytearray(shard.read_bytes())
    content[PAGE_BYTES:TABLE] = bytes(TABLE - PAGE_BYTES)
    shard.write_bytes(content)
    assert_computed_again(tmp_path, capfd, 0)


def test_values_in_each_others_place_are_noticed(shard, tmp_path, capfd):
    content, size = bytearray(shard.read_bytes()), POOLED.value_bytes
    first, second = PAGE_BYTES, PAGE_BYTES + size
    content[first:second], content[second : second + size] = (
        content[second : second + size],
        content[first:second],
    )
    shard.write_bytes(content)
    assert_computed_again(tmp_path, capfd, NUM_ROWS - 2)


def test_a_shard_of_another_space_is_noticed(shard, tmp_path, capfd):
    from dataclasses import replace

    other = replace(POOLED, preprocessing="rgb-2")
    keep(FeatureCache.open(tmp_path), range(NUM_ROWS), other, VALUES + 1)
    (foreign,) = set(shards(tmp_path)) - {shard}
    foreign.replace(shard)
    assert_computed_again(tmp_path, capfd, 0)


def test_a_damaged_row_costs_that_row_only_and_the_good_ones_survive_verification(shard, tmp_path, capfd):
    content = bytearray(shard.read_bytes())
    content[PLACES["a value"]] ^= 4
    shard.write_bytes(content)
    seen = []
    cache = FeatureCache.open(tmp_path)
    reader = cache.reader(POOLED)
    _, found = reader.read(KEYS)
    assert np.flatnonzero(~found).tolist() == [5]
    assert reader.num_damaged == 1
    report = verify(open_shelf(tmp_path), remove=False)
    assert (report.damaged_rows, report.rows, report.removed) == (1, NUM_ROWS - 1, 0)
    assert verify(open_shelf(tmp_path)).removed == 1
    assert verify(open_shelf(tmp_path)).ok
    cache.fill(POOLED, KEYS, compute_from(VALUES, seen))
    assert seen == [5]


def test_damage_is_found_before_training_reads_in_batches(shard, tmp_path):
    content = bytearray(shard.read_bytes())
    content[PLACES["a value"]] ^= 4
    shard.write_bytes(content)
    ensured = FeatureCache.open(tmp_path).ensure(POOLED, KEYS, compute_from(VALUES))
    assert (ensured.num_found, ensured.num_computed, ensured.complete) == (NUM_ROWS - 1, 1, True)
    values, found = ensured.reader.read(KEYS)
    assert found.all()
    assert np.array_equal(values, VALUES)


def test_a_damaged_row_is_read_from_where_it_is_whole(shard, tmp_path):
    keep(FeatureCache.open(tmp_path), range(NUM_ROWS))
    for path, row in zip(shards(tmp_path), (2, 7), strict=True):
        content = bytearray(path.read_bytes())
        content[PAGE_BYTES + row * POOLED.value_bytes] ^= 1
        path.write_bytes(content)
    values, found = FeatureCache.open(tmp_path).reader(POOLED).read(KEYS)
    assert found.all()
    assert np.array_equal(values, VALUES)


def test_damage_after_opening_is_noticed(shard, tmp_path, capfd):
    reader = FeatureCache.open(tmp_path).reader(POOLED)
    os.truncate(shard, PAGE_BYTES + 5 * POOLED.value_bytes)
    values, found = reader.read(KEYS)
    assert not found.any()
    assert not values.any()
    assert "cache: damaged" in capfd.readouterr().err


def test_a_shard_that_becomes_shorter_while_it_is_open_is_noticed(shard, tmp_path, capfd):
    reader = FeatureCache.open(tmp_path).reader(POOLED)
    assert reader.read(KEYS[:2])[1].all()
    os.truncate(shard, PAGE_BYTES + 5 * POOLED.value_bytes)
    _, found = reader.read(KEYS[8:])
    assert not found.any()
    assert "cache: unreadable" in capfd.readouterr().err


def test_pruning_does_not_carry_damage_along(shard, tmp_path):
    content = bytearray(shard.read_bytes())
    content[PLACES["a value"]] ^= 4
    shard.write_bytes(content)
    keep(FeatureCache.open(tmp_path), range(NUM_ROWS, NUM_ROWS + 4))
    assert prune(open_shelf(tmp_path)).merged_shards == 2
    assert verify(open_shelf(tmp_path)).ok
    assert FeatureCache.open(tmp_path).reader(POOLED).lookup(KEYS).sum() == NUM_ROWS - 1


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\xfe", b'{"digest": "0"}'])
def test_a_damaged_description_hides_no_value_and_is_mended(shard, tmp_path, content):
    description = shard.parent / "space.json"
    description.unlink() if content is None else description.write_bytes(content)
    assert FeatureCache.open(tmp_path).reader(POOLED).read(KEYS)[1].all()
    keep(FeatureCache.open(tmp_path), range(NUM_ROWS, NUM_ROWS + 2))
    assert description.read_bytes() == POOLED.to_json()


def test_files_of_others_are_left_alone(shard, tmp_path):
    for name in ("README", ".nfs0000001", "notes.txt"):
        (shard.parent / name).write_text("mine")
    (tmp_path / "v1" / "lost+found").mkdir()
    assert verify(open_shelf(tmp_path)).ok
    prune(open_shelf(tmp_path), everything=True)
    assert sorted(path.name for path in shard.parent.iterdir()) == [
        ".nfs0000001",
        "README",
        "notes.txt",
        "space.json",
    ]


def flip(dice, content, path):
    for _ in range(dice.integers(1, 5)):
        content[dice.integers(len(content))] ^= int(dice.integers(1, 256))
    return content


def cut(dice, content, path):
    return content[: dice.integers(len(content))]


def empty_range(dice, content, path):
    start = int(dice.integers(len(content)))
    end = min(start + int(dice.integers(1, 3000)), len(content))
    content[start:end] = bytes(end - start)
    return content


def doubled(dice, content, path):
    return content + content[-int(dice.integers(1, len(content))) :]


def another(dice, content, path):
    return bytearray(shards(path.parents[2])[0].read_bytes())


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_to_the_files_the_values_are_right(tmp_path, seed):
    dice = np.random.default_rng(seed)
    for start in range(0, NUM_ROWS, 3):
        keep(FeatureCache.open(tmp_path), range(start, start + 3 + int(dice.integers(3))))
    for path in shards(tmp_path):
        if dice.random() < 0.6:
            change = (flip, cut, empty_range, doubled, another)[dice.integers(5)]
            path.write_bytes(change(dice, bytearray(path.read_bytes()), path))
    for _ in range(2):
        filled = FeatureCache.open(tmp_path).fill(POOLED, KEYS, compute_from(VALUES))
        assert np.array_equal(filled.values, VALUES)
    assert filled.num_found == NUM_ROWS
    prune(open_shelf(tmp_path))
    verify(open_shelf(tmp_path))
    assert verify(open_shelf(tmp_path)).ok
    assert np.array_equal(FeatureCache.open(tmp_path).fill(POOLED, KEYS, compute_from(VALUES)).values, VALUES)
