"""How many processors this process may use; containers are limited by cgroups, version 1 or 2."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path


def cpu_limit(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Return how many processors the container's cgroup (v1 or v2) allows, or None."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (root / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        allowed = int((root / "cpu" / "cpu.cfs_quota_us").read_text())
        each = int((root / "cpu" / "cpu.cfs_period_us").read_text())
        return allowed / each if allowed > 0 else None
    return None


def usable_processors() -> int:
    """Return how many processors can work for this process at the same time, at least 1."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(own, round(cpu_limit() or own)))


def processor_name() -> str:
    """Return the model of the processor, as far as the system tells; "" for nothing."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
