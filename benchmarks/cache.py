"""How fast the feature cache writes and reads, beside a plain numpy.memmap of the same bytes.

    python benchmarks/cache.py [--directory DIR] [--mib 512]

All rates are GB/s of values, the best of three; files are in the page cache when they are read, so that it is the
code that is measured and not the disk. `first` is the first read of a process, which verifies every row.
"""

import argparse
import hashlib
import shutil
import tempfile
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from kubegraft.cache import FeatureCache, FeatureSpace

POOLED = FeatureSpace(
    model_digest="0" * 64,
    preprocessing="none",
    input_size=224,
    kind="pooled",
    shape=(1280,),
    backbone="random",
)
BOUNDARY = replace(POOLED, kind="boundary:1", shape=(56, 56, 112))
SMALL = replace(POOLED, shape=(1,))
NUM_REPEATS = 3
BATCH = 32


def best_seconds(action, prepare=lambda: None):
    """Return the shortest of three runs."""
    seconds = []
    for _ in range(NUM_REPEATS):
        prepared = prepare()
        started = time.perf_counter()
        action() if prepared is None else action(prepared)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def row(name, num_bytes, memmap_seconds, cache_seconds):
    rates = [num_bytes / seconds / 1e9 for seconds in (memmap_seconds, cache_seconds)]
    print(f"  {name:34} {rates[0]:8.2f} {rates[1]:8.2f} {rates[1] / rates[0]:8.2f}")


def compare(space, num_bytes, directory):
    """Print the rates of one kind of value."""
    num_values = max(num_bytes // space.value_bytes, BATCH)
    num_bytes = num_values * space.value_bytes
    values = np.random.default_rng(0).random((num_values, *space.shape), np.float32)
    keys = np.random.default_rng(1).integers(0, 256, (num_values, 32), np.uint8)
    out, order = np.empty_like(values), np.random.default_rng(2).permutation(num_values)
    plain, root = directory / "plain", directory / "cache"
    batches = [order[start : start + BATCH] for start in range(0, num_values, BATCH)]

    def write_memmap():
        target = np.memmap(plain, values.dtype, "w+", shape=values.shape)
        target[:] = values
        target.flush()

    def write_cache():
        with FeatureCache.open(root).writer(space) as writer:
            for start in range(0, num_values, BATCH):
                writer.append(keys[start : start + BATCH], values[start : start + BATCH])

    def forget():
        for path in (plain, root):
            path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)

    def mapped():
        return np.memmap(plain, values.dtype, "r", shape=values.shape)

    def opened():
        return FeatureCache.open(root).reader(space)

    def read_already():
        reader = opened()
        reader.read(keys, out=out)
        return reader

    def in_batches(reader):
        for batch in batches:
            reader.read(keys[batch])

    print(f"{space.kind}: {num_values} values of {space.value_bytes:,} bytes, {num_bytes / 2**20:.0f} MiB")
    print(f"  {'':34} {'memmap':>8} {'cache':>8} {'ratio':>8}")
    row("write and sync", num_bytes, best_seconds(write_memmap, forget), best_seconds(write_cache, forget))
    write_memmap()
    plain_seconds = best_seconds(lambda source: np.copyto(out, source), mapped)
    first = best_seconds(lambda reader: reader.read(keys, out=out), opened)
    again = best_seconds(lambda reader: reader.read(keys, out=out), read_already)
    row("read in order, first", num_bytes, plain_seconds, first)
    row("read in order, again", num_bytes, plain_seconds, again)
    assert np.array_equal(out, values)
    plain_seconds = best_seconds(lambda source: [source[batch] for batch in batches], mapped)
    row(
        f"read batches of {BATCH} at random, first",
        num_bytes,
        plain_seconds,
        best_seconds(in_batches, opened),
    )
    row(
        f"read batches of {BATCH} at random, again",
        num_bytes,
        plain_seconds,
        best_seconds(in_batches, read_already),
    )
    forget()


def index_of_a_million(directory):
    """Print how long an index of 10^6 keys takes to load, and a look-up in it."""
    keys = np.random.default_rng(0).integers(0, 256, (1_000_000, 32), np.uint8)
    cache = FeatureCache.open(directory)
    with cache.writer(SMALL) as writer:
        writer.append(keys, np.zeros((len(keys), 1), np.float32))
    load = best_seconds(lambda: cache.reader(SMALL))
    reader = cache.reader(SMALL)
    look = best_seconds(lambda: reader.lookup(keys))
    print(f"index of 1,000,000 keys: loaded in {load:.2f} s, all looked up in {look:.2f} s")


def checksums():
    """Print the rates of what could verify a value."""
    content = np.random.default_rng(0).integers(0, 256, 2**26, np.uint8)
    candidates = {
        "zlib.crc32": zlib.crc32,
        "zlib.adler32": zlib.adler32,
        "sha256": lambda value: hashlib.sha256(value).digest(),
        "blake2b": lambda value: hashlib.blake2b(value, digest_size=16).digest(),
    }
    print(
        "checksums of values of",
        " and ".join(f"{s.value_bytes:,}" for s in (POOLED, BOUNDARY)),
        "bytes, GB/s",
    )
    for name, checksum in candidates.items():
        rates = []
        for space in (POOLED, BOUNDARY):
            count = len(content) // space.value_bytes
            rows = content[: count * space.value_bytes].reshape(count, -1)
            rates.append(
                rows.nbytes / best_seconds(lambda r=rows, c=checksum: [c(value) for value in r]) / 1e9
            )
        print(f"  {name:34} {rates[0]:8.2f} {rates[1]:8.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", help="where to write; a temporary directory by default")
    parser.add_argument("--mib", type=int, default=512, help="MiB of values of each kind")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        for kind in (POOLED, BOUNDARY):
            compare(kind, arguments.mib * 2**20, Path(name))
        index_of_a_million(Path(name) / "index")
        checksums()
