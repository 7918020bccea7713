"""The feature cache: what is kept, found, counted and removed."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kubegraft.cache import FeatureCache, FeatureSpace, image_key, image_keys
from kubegraft.cache.folder import SpaceFolder
from kubegraft.cache.shelves import open_shelf
from kubegraft.cache.upkeep import prune, stats, verify
from kubegraft.cache.writer import FeatureWriter
from kubegraft.errors import ConfigError

POOLED = FeatureSpace(
    model_digest="0" * 64,
    preprocessing="rgb-1",
    input_size=32,
    kind="pooled",
    shape=(24,),
    engine="keras-float32",
    backbone="tiny",
)


def keys_of(numbers):
    return np.stack([image_key(b"image %d" % number) for number in numbers])


def values_of(numbers, space=POOLED):
    return np.stack(
        [np.random.default_rng(number).random(space.shape).astype(space.stored_dtype) for number in numbers]
    )


def compute_from(values, seen=None):
    """Return a `compute` that looks values up by index in batches of 7, and notes what it was asked for."""

    def compute(indices):
        if seen is not None:
            seen.extend(indices.tolist())
        for start in range(0, len(indices), 7):
            yield values[indices[start : start + 7]]

    return compute


def keep(cache, numbers, space=POOLED, values=None, **options):
    with cache.writer(space) as writer:
        writer.append(keys_of(numbers), values_of(numbers, space) if values is None else values, **options)
    return writer


def shards(directory):
    return sorted(directory.rglob("*.shard"))


def set_last_use(path, days_ago):
    then = time.time() - 86400 * days_ago
    os.utime(path, (then, then))


def test_an_image_is_computed_once_whoever_asks(tmp_path):
    values, seen = values_of(range(50)), []
    first = FeatureCache.open(tmp_path).fill(POOLED, keys_of(range(50)), compute_from(values, seen))
    assert (first.num_found, first.num_computed, seen) == (0, 50, list(range(50)))
    seen.clear()
    again = FeatureCache.open(tmp_path).fill(POOLED, keys_of(range(50)), compute_from(values, seen))
    assert (again.num_found, again.num_computed, seen) == (50, 0, [])
    assert np.array_equal(again.values, values)


def test_new_images_cost_no_more_than_themselves(tmp_path):
    cache, values, seen = FeatureCache.open(tmp_path), values_of(range(60)), []
    cache.fill(POOLED, keys_of(range(50)), compute_from(values))
    mixed = np.random.default_rng(0).permutation(60)
    filled = cache.fill(POOLED, keys_of(mixed), compute_from(values[mixed], seen))
    assert sorted(mixed[seen]) == list(range(50, 60))
    assert np.array_equal(filled.values, values[mixed])


def test_an_image_that_comes_twice_is_computed_once(tmp_path):
    numbers = np.array([3, 1, 3, 3, 2, 1])
    seen = []
    filled = FeatureCache.open(tmp_path).fill(
        POOLED, keys_of(numbers), compute_from(values_of(numbers), seen)
    )
    assert seen == [0, 1, 4]
    assert np.array_equal(filled.values, values_of(numbers))


def test_values_that_do_not_fit_in_memory_are_ensured_and_read_in_batches(tmp_path):
    numbers = np.array([*range(40), 3, 4])
    values, seen = values_of(numbers), []
    keep(FeatureCache.open(tmp_path), range(10))
    ensured = FeatureCache.open(tmp_path).ensure(POOLED, keys_of(numbers), compute_from(values, seen))
    assert (ensured.num_found, ensured.num_computed, ensured.complete) == (12, 30, True)
    assert seen == list(range(10, 40))
    out = np.empty((8, 24), np.float32)
    with ensured.reader as reader:
        for batch in np.random.default_rng(0).permutation(40).reshape(5, 8):
            assert reader.read(keys_of(batch), out=out)[1].all()
            assert np.array_equal(out, values[batch])


def test_what_has_no_room_is_said_to_be_missing(tmp_path):
    values = values_of(range(1000))
    for cache in (FeatureCache.open(tmp_path, 40_000), FeatureCache.open("none")):
        ensured = cache.ensure(POOLED, keys_of(range(1000)), compute_from(values))
        assert not ensured.complete
    assert FeatureCache.open("none").room_bytes() == 0


def test_room_is_what_the_budget_leaves_and_what_may_go(tmp_path):
    assert FeatureCache.open(tmp_path, 100_000).room_bytes() == 100_000
    cache = FeatureCache.open(tmp_path, 100_000)
    keep(cache, range(100))
    taken = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert cache.room_bytes() == 100_000 - taken
    set_last_use(shards(tmp_path)[0], days_ago=1)
    later = FeatureCache.open(tmp_path, 100_000)
    assert later.room_bytes() == 100_000 - taken + shards(tmp_path)[0].stat().st_size


def test_a_pass_that_ends_early_keeps_what_it_had(tmp_path):
    cache, values, seen = FeatureCache.open(tmp_path), values_of(range(50)), []

    def interrupted(indices):
        yield values[indices[:30]]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.fill(POOLED, keys_of(range(50)), interrupted)
    assert cache.fill(POOLED, keys_of(range(50)), compute_from(values, seen)).num_found == 30
    assert seen == list(range(30, 50))


@pytest.mark.parametrize(
    "change",
    [
        {"model_digest": "1" * 64},
        {"preprocessing": "rgb-2"},
        {"input_size": 33},
        {"kind": "boundary:3"},
        {"shape": (4, 6)},
        {"dtype": "float16"},
        {"engine": "onnxruntime-float32"},
        {"augmentation": "flip"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_decides_a_value_is_another_space(tmp_path, change):
    cache = FeatureCache.open(tmp_path)
    keep(cache, range(5))
    other = replace(POOLED, **change)
    assert other.digest != POOLED.digest
    assert not cache.reader(other).lookup(keys_of(range(5))).any()


def test_a_space_is_named_alike_on_every_machine_and_not_by_its_label():
    assert replace(POOLED, backbone="another name").digest == POOLED.digest
    assert FeatureSpace.from_json(POOLED.to_json()) == POOLED


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_digest", "abc"),
        ("kind", "boundary"),
        ("dtype", "float64"),
        ("shape", ()),
        ("shape", (3, 0)),
        ("input_size", 0),
        ("engine", ""),
    ],
)
def test_a_space_says_what_is_wrong_with_it(field, value):
    with pytest.raises(ConfigError, match=f"`{field}`.*Received"):
        replace(POOLED, **{field: value})


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "uint8", "int8"])
def test_values_come_back_bit_for_bit(tmp_path, dtype):
    space = replace(POOLED, dtype=dtype, kind="boundary:2", shape=(3, 5))
    bits = np.random.default_rng(0).integers(0, 100, (9, 3, 5), np.uint8)
    values = bits.astype(space.stored_dtype)
    keep(FeatureCache.open(tmp_path), range(9), space, values)
    read, found = FeatureCache.open(tmp_path).reader(space).read(keys_of(range(9)))
    assert found.all()
    assert read.dtype == space.stored_dtype
    assert read.tobytes() == values.tobytes()


def test_any_order_and_repetition_can_be_read_into_an_array_of_the_callers(tmp_path):
    cache = FeatureCache.open(tmp_path)
    for start in range(0, 90, 30):
        keep(cache, range(start, start + 30))
    reader = cache.reader(POOLED)
    numbers = np.random.default_rng(1).integers(0, 120, 400)
    out = np.lib.format.open_memmap(tmp_path / "out.npy", "w+", np.float32, (400, 24))
    out[:] = 7
    values, found = reader.read(keys_of(numbers), out=out)
    assert values is out
    assert np.array_equal(found, numbers < 90)
    assert np.array_equal(out[found], values_of(numbers[found]))
    assert not out[~found].any()
    with pytest.raises(ConfigError, match=r"`out` must be"):
        reader.read(keys_of(numbers), out=np.zeros((400, 24)))


def test_views_of_an_image_are_values_of_their_own(tmp_path):
    cache, numbers = FeatureCache.open(tmp_path), np.arange(10)
    for view in range(3):
        keep(cache, numbers, values=values_of(numbers + 100 * view), views=view)
    reader = cache.reader(POOLED)
    views = np.array([0, 1, 2, 3, 0, 1, 2, 3, 0, 1])
    values, found = reader.read(keys_of(numbers), views)
    assert np.array_equal(found, views < 3)
    assert np.array_equal(values[found], values_of((numbers + 100 * views)[found]))


def test_keys_that_begin_alike_are_told_apart(tmp_path):
    keys = np.random.default_rng(0).integers(0, 256, (60, 32), np.uint8)
    keys[:40, :8] = keys[0, :8]
    keys[20:40] = keys[:20]
    keys[20:40, 31] ^= 1
    with FeatureCache.open(tmp_path).writer(POOLED) as writer:
        writer.append(keys[::2], values_of(range(0, 60, 2)))
    values, found = FeatureCache.open(tmp_path).reader(POOLED).read(keys)
    assert np.flatnonzero(found).tolist() == list(range(0, 60, 2))
    assert np.array_equal(values[::2], values_of(range(0, 60, 2)))


def test_keys_may_be_a_mapped_file(tmp_path):
    np.save(tmp_path / "train.sha256.npy", keys_of(range(9)))
    keys = np.load(tmp_path / "train.sha256.npy", mmap_mode="r")
    values = values_of(range(9))
    for _ in range(2):
        filled = FeatureCache.open(tmp_path / "cache").fill(POOLED, keys, compute_from(values))
        assert np.array_equal(filled.values, values)
    assert filled.num_found == 9


def test_keys_are_the_digests_of_a_manifest():
    import hashlib

    digests = [hashlib.sha256(b"image %d" % number).hexdigest() for number in range(3)]
    assert np.array_equal(image_keys(digests), keys_of(range(3)))
    with pytest.raises(ConfigError, match="64 hex digits"):
        image_keys([digests[0][:-2], digests[1] + "00"])


@pytest.mark.parametrize(
    ("keys", "views"),
    [
        (np.zeros((2, 31), np.uint8), 0),
        (np.zeros((2, 32), np.int8), 0),
        (np.zeros((2, 32), np.uint8), [1, 2, 3]),
        (np.zeros((2, 32), np.uint8), -1),
        (np.zeros((2, 32), np.uint8), 2**32),
    ],
)
def test_keys_and_views_of_another_form_are_refused(tmp_path, keys, views):
    with pytest.raises(ConfigError, match=r"`(keys|views)` must be"):
        FeatureCache.open(tmp_path).reader(POOLED).lookup(keys, np.asarray(views))


def test_a_computation_that_yields_too_few_or_too_many_values_is_refused(tmp_path):
    cache = FeatureCache.open(tmp_path)
    for number in (3, 5):
        with pytest.raises(ConfigError, match="`compute` must yield a value for each"):
            cache.fill(POOLED, keys_of(range(4)), lambda _, n=number: [values_of(range(n))])
    with pytest.raises(ConfigError, match="`values` must be float32"):
        cache.fill(POOLED, keys_of(range(9, 13)), lambda _: [values_of(range(4)).astype(np.float64)])


def test_a_value_that_is_not_finite_is_not_kept(tmp_path):
    values = values_of(range(4))
    values[1, 3], values[2, 0] = np.nan, np.inf
    writer = keep(FeatureCache.open(tmp_path), range(4), values=values)
    assert (writer.num_kept, writer.num_refused) == (2, 2)
    assert FeatureCache.open(tmp_path).reader(POOLED).lookup(keys_of(range(4))).tolist() == [
        True,
        False,
        False,
        True,
    ]


def test_bits_of_a_bfloat16_that_is_not_finite_are_not_kept(tmp_path):
    bits = np.full((3, 24), 0x3F80, np.uint16)
    bits[1, 5], bits[2, 5] = 0x7FC0, 0xFF80
    writer = keep(FeatureCache.open(tmp_path), range(3), replace(POOLED, dtype="bfloat16"), bits)
    assert (writer.num_kept, writer.num_refused) == (1, 2)


def test_a_reader_takes_in_what_others_write(tmp_path):
    cache = FeatureCache.open(tmp_path)
    reader = cache.reader(POOLED)
    with cache.writer(POOLED) as writer:
        writer.append(keys_of(range(5)), values_of(range(5)))
        writer.flush()
        assert not reader.lookup(keys_of(range(5))).any()
        reader.refresh()
        assert reader.lookup(keys_of(range(5))).all()
        writer.append(keys_of(range(5, 9)), values_of(range(5, 9)))
    reader.refresh()
    values, found = reader.read(keys_of(range(9)))
    assert found.all()
    assert np.array_equal(values, values_of(range(9)))


def test_threads_read_through_one_reader(tmp_path):
    cache = FeatureCache.open(tmp_path)
    for start in range(0, 300, 10):
        keep(cache, range(start, start + 10))
    wrong = []
    all_keys, all_values = keys_of(range(300)), values_of(range(300))
    with cache.reader(POOLED) as reader:

        def work(seed):
            dice = np.random.default_rng(seed)
            for _ in range(20):
                numbers = dice.integers(0, 300, 50)
                values, found = reader.read(all_keys[numbers])
                if not (found.all() and np.array_equal(values, all_values[numbers])):
                    wrong.append(seed)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_shards_removed_under_a_reader_are_values_to_compute(tmp_path):
    cache = FeatureCache.open(tmp_path)
    keep(cache, range(5))
    keep(cache, range(5, 10))
    reader = cache.reader(POOLED)
    shards(tmp_path)[0].unlink()
    values, found = reader.read(keys_of(range(10)))
    assert found.sum() == 5
    assert np.array_equal(values[found], values_of(np.flatnonzero(found)))
    assert reader.num_damaged == 0


def test_rows_moved_by_compaction_are_found_where_they_went(tmp_path):
    cache = FeatureCache.open(tmp_path)
    for start in range(0, 40, 10):
        keep(cache, range(start, start + 10))
    reader = cache.reader(POOLED)
    prune(open_shelf(tmp_path))
    assert len(shards(tmp_path)) == 1
    values, found = reader.read(keys_of(range(40)))
    assert found.all()
    assert np.array_equal(values, values_of(range(40)))


def test_repetitions_are_harmless_and_go_with_pruning(tmp_path):
    cache = FeatureCache.open(tmp_path)
    for _ in range(3):
        keep(cache, range(20))
    assert stats(open_shelf(tmp_path))[0].entries == 60
    dry = prune(open_shelf(tmp_path), dry_run=True)
    assert (dry.duplicate_rows, dry.merged_shards) == (40, 3)
    assert stats(open_shelf(tmp_path))[0].entries == 60
    assert prune(open_shelf(tmp_path)).duplicate_rows == 40
    assert stats(open_shelf(tmp_path))[0].entries == 20
    assert verify(open_shelf(tmp_path)).ok
    again = prune(open_shelf(tmp_path))
    assert (again.duplicate_rows, again.merged_shards) == (0, 0)


def test_many_short_runs_do_not_leave_many_files(tmp_path):
    for number in range(70):
        keep(FeatureCache.open(tmp_path), [number])
    assert len(shards(tmp_path)) < 10
    values, found = FeatureCache.open(tmp_path).reader(POOLED).read(keys_of(range(70)))
    assert found.all()
    assert np.array_equal(values, values_of(range(70)))


def test_no_cache_computes_everything_and_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("KUBEGRAFT_CACHE", "none")
    cache = FeatureCache.open()
    assert not cache.enabled
    for _ in range(2):
        filled = cache.fill(POOLED, keys_of(range(5)), compute_from(values_of(range(5))))
        assert (filled.num_found, filled.num_computed) == (0, 5)
        assert np.array_equal(filled.values, values_of(range(5)))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"KUBEGRAFT_CACHE": "{tmp}/here"}, "here"),
        ({"XDG_CACHE_HOME": "{tmp}/xdg"}, "xdg/kubegraft/features"),
        ({"HOME": "{tmp}/home"}, "home/.cache/kubegraft/features"),
    ],
    ids=lambda value: str(value),
)
def test_where_the_cache_is(tmp_path, monkeypatch, variables, expected):
    for name in ("KUBEGRAFT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp=tmp_path))
    keep(FeatureCache.open(), range(3))
    assert len(shards(tmp_path / expected)) == 1


def test_a_place_that_can_not_be_a_cache(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="which is a file"):
        FeatureCache.open(tmp_path / "file")
    with pytest.raises(ConfigError, match="https"):
        FeatureCache.open("https://example.org/cache")
    with pytest.raises(ConfigError, match="budget_bytes"):
        FeatureCache.open(tmp_path, -1)
    assert not FeatureCache.open("/proc/nothing/here").enabled
    assert "cache: off" in capfd.readouterr().err


def test_a_budget_evicts_what_was_not_used_for_longest(tmp_path):
    for number in range(4):
        keep(FeatureCache.open(tmp_path), range(100 * number, 100 * number + 100))
    paths = shards(tmp_path)
    order = [2, 0, 3, 1]  # days since their last use
    for path, days in zip(paths, order, strict=True):
        set_last_use(path, days)
    size = paths[0].stat().st_size
    keep(FeatureCache.open(tmp_path, int(3.5 * size)), range(900, 970))
    left = set(shards(tmp_path))
    gone = [days for path, days in zip(paths, order, strict=True) if path not in left]
    assert sorted(gone) == [2, 3]


def test_reading_a_shard_is_a_use(tmp_path):
    keep(FeatureCache.open(tmp_path), range(5))
    (path,) = shards(tmp_path)
    set_last_use(path, 30)
    reader = FeatureCache.open(tmp_path).reader(POOLED)
    reader.lookup(keys_of(range(5)))
    assert path.stat().st_mtime < time.time() - 86400
    reader.read(keys_of(range(5)))
    assert path.stat().st_mtime > time.time() - 86400


def test_a_pass_over_more_than_the_budget_does_not_evict_what_it_needs(tmp_path, capfd):
    values = values_of(range(1000))
    for _ in range(2):
        cache = FeatureCache.open(tmp_path, 40_000)
        filled = cache.fill(POOLED, keys_of(range(1000)), compute_from(values))
        assert np.array_equal(filled.values, values)
        assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 40_000
    assert filled.num_found > 100  # a plain least-recently-used rule would find none
    assert "cache: off" in capfd.readouterr().err


def test_what_nobody_will_use_again_does_not_take_the_budget(tmp_path, capfd):
    keep(FeatureCache.open(tmp_path), range(10))
    (path,) = shards(tmp_path)
    folder = SpaceFolder(tmp_path, POOLED.digest)
    left = folder.new_aside()
    left = left.with_name(
        left.name.replace(f".{os.getpid()}.", f".{2**22 + 1}.")
    )  # no process has this number
    damaged = path.with_name("0123-damaged.damaged")
    for each in (left, damaged):
        each.write_bytes(bytes(30_000))
    cache = FeatureCache.open(tmp_path, 40_000)
    assert cache.room_bytes() > 30_000
    assert keep(cache, range(100, 200)).num_kept == 100
    assert not left.exists()
    assert not damaged.exists()
    assert "cache: off" not in capfd.readouterr().err


def test_the_table_of_a_shard_is_within_the_budget_too(tmp_path):
    tiny = replace(POOLED, shape=(1,))  # its table takes ten times as much as its values
    for start in range(0, 3000, 100):
        keep(FeatureCache.open(tmp_path, 60_000), range(start, start + 100), tiny)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 60_000


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A file system of 4 MB."""
    directory = tmp_path_factory.mktemp("disk")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(directory)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("only root may mount")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def test_a_full_disk_ends_caching_and_nothing_else(small_disk, capfd):
    (small_disk / "ballast").write_bytes(bytes(3_400_000))
    values = values_of(range(20_000))
    filled = FeatureCache.open(small_disk).fill(POOLED, keys_of(range(20_000)), compute_from(values))
    assert np.array_equal(filled.values, values)
    assert "cache: off" in capfd.readouterr().err
    assert not list(small_disk.rglob("*.writing"))


READ_ONLY = """
import os, sys
import numpy as np
from tests.unit import test_cache as t
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
cache = t.FeatureCache.open(sys.argv[1])
filled = cache.fill(t.POOLED, t.keys_of(range(8)), t.compute_from(t.values_of(range(8))))
assert np.array_equal(filled.values, t.values_of(range(8)))
print(filled.num_found, filled.num_computed)
"""


def run_read_only(directory):
    """Fill eight images from a cache, as a user who may only read it; return the process."""
    return subprocess.run(
        [sys.executable, "-c", READ_ONLY, str(directory)], capture_output=True, text=True, check=False
    )


def test_a_read_only_cache_is_read_and_a_closed_one_is_done_without():
    with tempfile.TemporaryDirectory() as directory:  # pytest's own is closed to other users
        root = Path(directory)
        keep(FeatureCache.open(root / "cache"), range(5))
        paths = [root, root / "cache", *(root / "cache").rglob("*")]
        for path in paths:
            path.chmod(0o555 if path.is_dir() else 0o444)
        readable = run_read_only(root / "cache")
        root.chmod(0)
        closed = run_read_only(root / "cache")
        for path in paths:
            path.chmod(0o755)
    assert readable.stdout.split() == ["5", "3"], readable.stderr
    assert closed.stdout.split() == ["0", "8"], closed.stderr
    assert "cache: off" in readable.stderr
    assert "cache: off" in closed.stderr


KILLED = """
import os, pathlib, signal, sys
from tests.unit import test_cache as t
cache = t.FeatureCache.open(sys.argv[1])
writer = cache.writer(t.POOLED)
writer.append(t.keys_of(range(5)), t.values_of(range(5)))
writer.flush()
writer.append(t.keys_of(range(5, 9)), t.values_of(range(5, 9)))
while not list(pathlib.Path(sys.argv[1]).rglob("*.writing")):
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_loses_its_last_shard_only_and_its_leftovers_go(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert FeatureCache.open(tmp_path).reader(POOLED).lookup(keys_of(range(9))).sum() == 5
    assert len(list(tmp_path.rglob("*.writing"))) == 1
    assert prune(open_shelf(tmp_path), dry_run=True).leftover_files == 1
    assert prune(open_shelf(tmp_path)).leftover_files == 1
    assert not list(tmp_path.rglob("*.writing"))
    assert verify(open_shelf(tmp_path)).ok


def test_the_file_of_a_living_writer_is_no_leftover(tmp_path):
    with FeatureCache.open(tmp_path).writer(POOLED) as writer:
        writer.append(keys_of(range(5)), values_of(range(5)))
        while not list(tmp_path.rglob("*.writing")):
            time.sleep(0.01)
        assert prune(open_shelf(tmp_path)).leftover_files == 0
    assert writer.num_kept == 5


def test_a_writer_whose_file_was_taken_goes_on(tmp_path, capfd):
    with FeatureCache.open(tmp_path).writer(POOLED) as writer:
        writer.append(keys_of(range(5)), values_of(range(5)))
        while not (aside := list(tmp_path.rglob("*.writing"))):
            time.sleep(0.01)
        aside[0].unlink()
        writer.flush()
        writer.append(keys_of(range(5, 9)), values_of(range(5, 9)))
    assert (writer.num_kept, writer.num_refused) == (4, 5)
    assert "cache: lost" in capfd.readouterr().err
    assert FeatureCache.open(tmp_path).reader(POOLED).lookup(keys_of(range(9))).sum() == 4


def test_a_large_append_becomes_several_shards(tmp_path):
    cache = FeatureCache.open(tmp_path)
    folder = SpaceFolder(tmp_path, POOLED.digest)
    with FeatureWriter(POOLED, folder, cache._budget, shard_bytes=10 * POOLED.value_bytes) as writer:
        writer.append(keys_of(range(95)), values_of(range(95)))
    assert len(shards(tmp_path)) == 10
    values, found = cache.reader(POOLED).read(keys_of(range(95)))
    assert found.all()
    assert np.array_equal(values, values_of(range(95)))


def test_pruning_by_age_size_and_space(tmp_path):
    other = replace(POOLED, input_size=64)
    for number, (space, days) in enumerate([(POOLED, 40), (POOLED, 5), (other, 10), (other, 1)]):
        before = set(shards(tmp_path))
        keep(FeatureCache.open(tmp_path), range(100 * number, 100 * number + 100), space)
        (new,) = set(shards(tmp_path)) - before
        set_last_use(new, days)
    shelf = open_shelf(tmp_path)
    month = 30 * 86400
    assert prune(shelf, older_than_seconds=month, dry_run=True).removed_shards == 1
    assert len(shards(tmp_path)) == 4
    assert prune(shelf, older_than_seconds=month).removed_shards == 1
    assert sorted(each.entries for each in stats(shelf)) == [100, 200]
    size = shards(tmp_path)[0].stat().st_size
    limited = prune(shelf, max_bytes=size * 2)  # the two of `other` have been merged: 10 days old became 1
    assert (limited.removed_shards, limited.kept_bytes <= 2 * size) == (1, True)
    assert [each.digest for each in stats(shelf)] == [other.digest]
    with pytest.raises(ConfigError, match="`space` must be the beginning"):
        prune(shelf, spaces=["ffff"])
    assert prune(shelf, spaces=[other.digest[:8]]).removed_shards == 1
    assert stats(shelf) == []
    assert not list((tmp_path / "v1").iterdir())


def test_everything_can_be_pruned(tmp_path):
    keep(FeatureCache.open(tmp_path), range(5))
    keep(FeatureCache.open(tmp_path), range(5), replace(POOLED, input_size=64))
    assert prune(open_shelf(tmp_path), everything=True, dry_run=True).kept_bytes == 0
    assert len(shards(tmp_path)) == 2
    assert prune(open_shelf(tmp_path), everything=True).removed_shards == 2
    assert not list((tmp_path / "v1").iterdir())


def test_statistics_say_what_is_there(tmp_path):
    keep(FeatureCache.open(tmp_path), range(5))
    (only,) = stats(open_shelf(tmp_path))
    assert (only.backbone, only.kind, only.input_size, only.entries, only.shards) == (
        "tiny",
        "pooled",
        32,
        5,
        1,
    )
    assert only.bytes == shards(tmp_path)[0].stat().st_size
    assert only.last_used.startswith("20")


@pytest.mark.parametrize("seed", range(6))
def test_random_histories_answer_like_a_dictionary(tmp_path, seed):
    dice = np.random.default_rng(seed)
    kept = set()
    for _ in range(40):
        action = dice.integers(0, 6)
        numbers = np.unique(dice.integers(0, 60, dice.integers(1, 12)))
        if action <= 2:
            keep(FeatureCache.open(tmp_path), numbers)
            kept |= set(numbers.tolist())
        elif action == 3:
            prune(open_shelf(tmp_path))
        elif action == 4:
            assert verify(open_shelf(tmp_path)).ok
        else:
            asked = dice.integers(0, 60, 30)
            values, found = FeatureCache.open(tmp_path).reader(POOLED).read(keys_of(asked))
            assert found.tolist() == [number in kept for number in asked.tolist()]
            assert np.array_equal(values[found], values_of(asked[found]) if found.any() else values[found])


def test_a_million_keys_take_tens_of_megabytes(tmp_path):
    import tracemalloc

    space = replace(POOLED, shape=(1,))
    keys = np.random.default_rng(0).integers(0, 256, (1_000_000, 32), np.uint8)
    with FeatureCache.open(tmp_path).writer(space) as writer:
        writer.append(keys, np.arange(1_000_000, dtype=np.float32)[:, None])
    tracemalloc.start()
    reader = FeatureCache.open(tmp_path).reader(space)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 70e6
    some = np.random.default_rng(1).integers(0, 1_000_000, 1000)
    values, found = reader.read(keys[some])
    assert found.all()
    assert np.array_equal(values[:, 0], some.astype(np.float32))
