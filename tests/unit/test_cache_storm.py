"""Many processes on one feature cache, killed at random.

`make storm` is the long form.
"""

import json
import os
import subprocess
import sys

from kubegraft.cache.shelves import open_shelf
from kubegraft.cache.upkeep import prune, stats, verify
from tests.cache_storm import everything, one_pass

SECONDS = float(os.environ.get("KUBEGRAFT_STORM_SECONDS", "8"))


def test_writers_and_readers_killed_at_random_leave_a_cache_that_is_right(tmp_path):
    directory = tmp_path / "cache"
    done = subprocess.run(
        [sys.executable, "-m", "tests.cache_storm", str(directory), str(SECONDS)],
        capture_output=True,
        text=True,
        check=False,
    )
    errors = (tmp_path / "cache.errors").read_text()
    failed = [line for line in errors.splitlines() if line.startswith("FAILED")]
    assert done.returncode == 0, failed or done.stderr
    assert "cache: damaged" not in errors
    report = json.loads(done.stdout)
    sys.stdout.write(f"\nstorm: {report}\n")
    assert report["kills"] >= 5
    assert report["found"] > 0

    verification = verify(open_shelf(directory))
    assert verification.ok, verification.damage
    pruned = prune(open_shelf(directory))
    assert not list(directory.rglob("*.writing"))
    assert not list(directory.rglob("*.damaged"))
    sys.stdout.write(f"after it: {verification.to_values()} {pruned.to_values()}\n")
    for images in everything():
        found, computed = one_pass(directory, images, range_of(images))
        assert found + computed == len(images.keys)
    assert verify(open_shelf(directory)).ok
    assert sum(space.bytes for space in stats(open_shelf(directory))) < 24_000_000


def range_of(images):
    import numpy as np

    return np.arange(len(images.keys))
