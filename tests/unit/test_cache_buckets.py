"""A feature cache in a bucket, against real servers behind a proxy that breaks things."""

import shutil

import numpy as np
import pytest

from kubegraft.cache import FeatureCache
from kubegraft.cache.location import mirror_root
from kubegraft.cache.shard_file import PAGE_BYTES
from kubegraft.cache.shelves import open_shelf
from kubegraft.cache.upkeep import prune, stats, verify
from tests.unit.test_cache import POOLED, compute_from, keep, keys_of, shards, values_of


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    """Mirrors are in a directory of the test's own, which stands for a machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine"))
    monkeypatch.setattr("kubegraft.cache.bucket.WAITS_SECONDS", (0.0, 0.0))
    return tmp_path / "machine"


def another_machine(cache_home):
    shutil.rmtree(cache_home)


def downloads_of(requests, suffix):
    return [line for line in requests if line.startswith("GET") and suffix in line and "prefix=" not in line]


def is_write(method, path):
    return method in ("PUT", "POST")


def test_what_one_machine_computed_another_finds(object_store, cache_home):
    values, seen = values_of(range(30)), []
    FeatureCache.open(object_store.folder).fill(POOLED, keys_of(range(30)), compute_from(values))
    names = [name.rpartition("/")[2] for name in all_keys(object_store)]
    assert sorted(name.partition(".")[2] for name in names) == ["json", "keys", "shard"]
    another_machine(cache_home)
    again = FeatureCache.open(object_store.folder).fill(
        POOLED, keys_of(range(30)), compute_from(values, seen)
    )
    assert (again.num_found, seen) == (30, [])
    assert np.array_equal(again.values, values)


def test_a_shard_is_fetched_when_a_value_in_it_is_needed_and_once(object_store, cache_home):
    for start in (0, 10, 20):
        keep(FeatureCache.open(object_store.folder), range(start, start + 10))
    another_machine(cache_home)
    object_store.proxy.requests.clear()
    reader = FeatureCache.open(object_store.folder).reader(POOLED)
    assert reader.lookup(keys_of(range(30))).all()
    assert not downloads_of(object_store.proxy.requests, ".shard")
    for _ in range(2):
        values, found = reader.read(keys_of(range(12, 18)))
        assert found.all()
        assert np.array_equal(values, values_of(range(12, 18)))
    assert len(downloads_of(object_store.proxy.requests, ".shard")) == 1
    FeatureCache.open(object_store.folder).reader(POOLED).read(keys_of(range(10, 20)))
    assert len(downloads_of(object_store.proxy.requests, ".shard")) == 1


def test_a_store_that_breaks_for_a_moment_is_asked_again(object_store, cache_home):
    object_store.proxy.faults += [(503, is_write), ("drop", is_write)]
    keep(FeatureCache.open(object_store.folder), range(5))
    assert not object_store.proxy.faults
    another_machine(cache_home)
    object_store.proxy.faults += [
        ("corrupt", lambda _, path: ".shard" in path),
        (503, lambda _, path: ".keys" in path),
    ]
    values, found = FeatureCache.open(object_store.folder).reader(POOLED).read(keys_of(range(5)))
    assert found.all()
    assert np.array_equal(values, values_of(range(5)))
    assert not object_store.proxy.faults


def test_what_could_not_be_uploaded_is_uploaded_by_a_later_run(object_store, cache_home, capfd):
    object_store.proxy.broken = is_write
    keep(FeatureCache.open(object_store.folder), range(5))
    object_store.proxy.broken = None
    assert "cache: not uploaded" in capfd.readouterr().err.replace('"', "")
    assert FeatureCache.open(object_store.folder).reader(POOLED).lookup(keys_of(range(5))).all()
    keep(FeatureCache.open(object_store.folder), range(5, 8))
    another_machine(cache_home)
    assert FeatureCache.open(object_store.folder).reader(POOLED).lookup(keys_of(range(8))).all()


def test_a_store_that_can_not_be_reached_ends_no_run(object_store, cache_home, capfd):
    keep(FeatureCache.open(object_store.folder), range(5))
    another_machine(cache_home)
    object_store.proxy.broken = lambda method, path: True
    values = values_of(range(5))
    filled = FeatureCache.open(object_store.folder).fill(POOLED, keys_of(range(5)), compute_from(values))
    assert (filled.num_found, filled.num_computed) == (0, 5)
    assert np.array_equal(filled.values, values)
    assert "cache: not listed" in capfd.readouterr().err


def test_a_shard_without_its_keys_is_not_there_yet(object_store, cache_home):
    keep(FeatureCache.open(object_store.folder), range(5))
    (name,) = [name for name in all_keys(object_store) if name.endswith(".keys")]
    delete(object_store, name)
    another_machine(cache_home)
    assert not FeatureCache.open(object_store.folder).reader(POOLED).lookup(keys_of(range(5))).any()


def test_an_object_that_goes_while_it_is_needed_is_computed_again(object_store, cache_home):
    keep(FeatureCache.open(object_store.folder), range(5))
    another_machine(cache_home)
    reader = FeatureCache.open(object_store.folder).reader(POOLED)
    prune(open_shelf(object_store.folder), everything=True)
    assert all_keys(object_store) == []
    assert not reader.read(keys_of(range(5)))[1].any()
    assert not FeatureCache.open(object_store.folder).reader(POOLED).lookup(keys_of(range(5))).any()


@pytest.mark.parametrize("suffix", [".shard", ".keys"])
def test_an_object_that_is_gone_says_nothing_of_the_others(object_store, cache_home, suffix):
    for start in (0, 10, 20):
        keep(FeatureCache.open(object_store.folder), range(start, start + 10))
    gone = sorted(name for name in all_keys(object_store) if name.endswith(suffix))[1]
    another_machine(cache_home)
    if suffix == ".shard":
        delete(object_store, gone)
        reader = FeatureCache.open(object_store.folder).reader(POOLED)
    else:  # between listing and fetching
        object_store.proxy.faults += [(404, lambda _, path: gone.rpartition("/")[2] in path)]
        reader = FeatureCache.open(object_store.folder).reader(POOLED)
        assert not object_store.proxy.faults
    found = reader.read(keys_of(range(30)))[1]
    assert found.tolist() == [True] * 10 + [False] * 10 + [True] * 10


def test_pruning_removes_keys_without_a_shard_and_what_is_left_on_this_machine(object_store, cache_home):
    for start in (0, 10):
        keep(FeatureCache.open(object_store.folder), range(start, start + 10))
    delete(object_store, min(name for name in all_keys(object_store) if name.endswith(".shard")))
    here = shards(mirror_root(object_store.folder))[0].with_name("0123-damaged.damaged")
    here.write_bytes(b"12345")
    dry = prune(open_shelf(object_store.folder), dry_run=True)
    assert dry.leftover_files == 2
    assert here.exists()
    assert prune(open_shelf(object_store.folder)).leftover_bytes == dry.leftover_bytes > 5
    assert not here.exists()
    names = [name.rpartition("/")[2] for name in all_keys(object_store)]
    assert sorted(name.partition(".")[2] for name in names) == ["json", "keys", "shard"]


def test_what_does_not_fit_on_this_machine_is_not_fetched_for_nothing(object_store, cache_home, capfd):
    for start in (0, 100, 200):
        keep(FeatureCache.open(object_store.folder), range(start, start + 100))
    another_machine(cache_home)
    size = 100 * (POOLED.value_bytes + 40) + PAGE_BYTES
    cache = FeatureCache.open(object_store.folder, size + 3 * (PAGE_BYTES + 4000) + 2000)
    object_store.proxy.requests.clear()
    reader = cache.reader(POOLED)
    assert reader.read(keys_of(range(300)))[1].sum() == 100
    assert not reader.read(keys_of(range(100, 300)))[1].any()
    assert len(downloads_of(object_store.proxy.requests, ".shard")) == 1
    assert capfd.readouterr().err.count("cache: not fetched") == 1


@pytest.mark.parametrize("suffix", [".shard", ".keys"])
def test_a_damaged_object_is_never_used_and_verification_removes_it(object_store, cache_home, suffix):
    keep(FeatureCache.open(object_store.folder), range(5))
    (name,) = [name for name in all_keys(object_store) if name.endswith(suffix)]
    content = bytearray(read(object_store, name))
    content[PAGE_BYTES + 3] ^= 1
    object_store.put({name: bytes(content)})
    another_machine(cache_home)
    values = values_of(range(5))
    filled = FeatureCache.open(object_store.folder).fill(POOLED, keys_of(range(5)), compute_from(values))
    assert filled.num_computed == (1 if suffix == ".shard" else 5)
    assert np.array_equal(filled.values, values)
    report = verify(open_shelf(object_store.folder))
    assert not report.ok
    assert report.removed == 1
    assert verify(open_shelf(object_store.folder)).ok


def test_the_budget_is_that_of_this_machines_part(object_store, cache_home):
    for start in (0, 100, 200):
        keep(FeatureCache.open(object_store.folder), range(start, start + 100))
    another_machine(cache_home)
    size = 100 * (POOLED.value_bytes + 40) + PAGE_BYTES
    cache = FeatureCache.open(object_store.folder, 2 * size + 3 * (PAGE_BYTES + 4000) + 2000)
    values, found = cache.reader(POOLED).read(keys_of(range(300)))
    assert found.sum() == 200
    assert np.array_equal(values[found], values_of(np.flatnonzero(found)))
    assert len(shards(mirror_root(object_store.folder))) == 2


def test_statistics_and_pruning_of_a_bucket(object_store, cache_home):
    for start in (0, 10):
        keep(FeatureCache.open(object_store.folder), range(start, start + 10))
    (only,) = stats(open_shelf(object_store.folder))
    assert (only.backbone, only.entries, only.shards) == ("tiny", 20, 2)
    assert prune(open_shelf(object_store.folder), older_than_seconds=3600).removed_shards == 0
    dry = prune(open_shelf(object_store.folder), max_bytes=only.bytes // 2, dry_run=True)
    assert dry.removed_shards == 1
    prune(open_shelf(object_store.folder), max_bytes=only.bytes // 2)
    another_machine(cache_home)
    lookup = FeatureCache.open(object_store.folder).reader(POOLED).lookup(keys_of(range(20)))
    assert lookup.tolist() == [False] * 10 + [True] * 10


def all_keys(store):
    return list(store.keys())


def read(store, name):
    return on_bucket(store, lambda bucket, key: bucket.read(f"{key}/{name}"))


def delete(store, name):
    on_bucket(store, lambda bucket, key: bucket.delete(f"{key}/{name}"))


def on_bucket(store, action):
    from kubegraft.storage.objects import opened_store
    from kubegraft.storage.retries import Retries

    with opened_store(store.folder, Retries()) as (bucket, key):
        return action(bucket, key)
