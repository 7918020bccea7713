"""Eight processes on one feature cache, killed at random: `python -m tests.cache_storm DIRECTORY SECONDS`.

Each worker reads, computes and keeps random images of two spaces, prunes and verifies, and compares every value
with what it must be. The storm kills one every few hundredths of a second and starts another. It prints a JSON
document and ends with code 1 if any worker saw a wrong value or an error.
"""

import json
import os
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from kubegraft.cache import FeatureCache, FeatureSpace, image_key
from kubegraft.cache.shelves import open_shelf
from kubegraft.cache.upkeep import prune, verify

NUM_WORKERS = 8
BUDGET_BYTES = 24_000_000
POOLED = FeatureSpace(
    model_digest="1" * 64, preprocessing="p", input_size=32, kind="pooled", shape=(512,), backbone="tiny"
)
BOUNDARY = FeatureSpace(
    model_digest="1" * 64,
    preprocessing="p",
    input_size=32,
    kind="boundary:3",
    shape=(7, 7, 300),
    dtype="float16",
)


@dataclass
class Images:
    """Images of one space: their keys, and the only values that are right."""

    space: FeatureSpace
    keys: np.ndarray
    values: np.ndarray


def images_of(space, number):
    random_values = np.random.default_rng(number).random((number, *space.shape)).astype(space.dtype)
    return Images(space, np.stack([image_key(b"%d" % index) for index in range(number)]), random_values)


def everything():
    return [images_of(POOLED, 3000), images_of(BOUNDARY, 200)]


@dataclass
class Report:
    """What happened in a storm."""

    kills: int = 0
    failures: int = 0
    passes: int = 0
    found: int = 0
    computed: int = 0


def one_pass(directory, images, chosen):
    """Fill some images from the cache, compare them all, and return how many were found and computed."""

    def compute(missing):
        for start in range(0, len(missing), 16):
            yield images.values[chosen[missing[start : start + 16]]]

    cache = FeatureCache.open(directory, BUDGET_BYTES)
    filled = cache.fill(images.space, images.keys[chosen], compute)
    if not np.array_equal(filled.values, images.values[chosen]):
        raise SystemExit("a value is wrong")
    return filled.num_found, filled.num_computed


def work(directory, seed, log):
    """Use the cache until killed."""
    dice = np.random.default_rng(seed)
    sets = everything()
    while True:
        action = dice.random()
        if action < 0.05:
            if not verify(open_shelf(directory)).ok:
                raise SystemExit("damage was found")
        elif action < 0.055:
            prune(open_shelf(directory), everything=True)
        elif action < 0.12:
            prune(open_shelf(directory), max_bytes=int(dice.integers(1_000_000, 20_000_000)))
        else:
            images = sets[int(dice.random() < 0.3)]
            size = int(dice.integers(1, len(images.keys)))
            chosen = dice.integers(0, len(images.keys), size)
            os.write(log, b"%d %d\n" % one_pass(directory, images, chosen))


def start(directory, seed, log, errors):
    pid = os.fork()
    if pid:
        return pid
    try:
        os.dup2(errors, 2)
        work(directory, seed, log)
    except BaseException as error:
        os.write(errors, f"FAILED {type(error).__name__}: {error}\n".encode())
    os._exit(1)


def storm(directory, seconds, seed=0):
    """Run a storm and return its report."""
    dice = random.Random(seed)
    log_path, error_path = Path(f"{directory}.log"), Path(f"{directory}.errors")
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    log, errors = os.open(log_path, flags), os.open(error_path, flags)
    report = Report()
    seeds = iter(range(seed, seed + 10**9))
    workers = [start(directory, next(seeds), log, errors) for _ in range(NUM_WORKERS)]
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(dice.expovariate(12))
        number = dice.randrange(NUM_WORKERS)
        report.failures += not stop(workers[number])
        report.kills += 1
        workers[number] = start(directory, next(seeds), log, errors)
    for pid in workers:
        report.failures += not stop(pid)
    for line in log_path.read_text().splitlines():
        found, computed = line.split()
        report.passes += 1
        report.found += int(found)
        report.computed += int(computed)
    return report


def stop(pid):
    """Kill a worker, and return whether it had been alive."""
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    outcome = storm(sys.argv[1], float(sys.argv[2]))
    sys.stdout.write(json.dumps(asdict(outcome)))
    sys.exit(outcome.failures > 0)
