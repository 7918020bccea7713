"""How much memory and disk this process may use; containers are limited by cgroups, version 1 or 2."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Final

CGROUP_ROOT: Final = Path("/sys/fs/cgroup")
_NO_LIMIT: Final = 2**60  # version 1 says "no limit" with a huge number


def memory_limit_bytes(root: Path = CGROUP_ROOT, membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """Return how much memory the cgroups of this process allow, or None for no limit.

    The smallest limit counts, of the process's own cgroup and of those that it lies in. In a container the
    root is its own; there the path that the kernel tells may not exist.

    Args:
        root: Where cgroups are mounted.
        membership: File that says in which cgroup this process is.
    """
    limits = []
    for name, top, inside in (
        ("memory.max", root, _path_in(membership, "")),
        ("memory.limit_in_bytes", root / "memory", _path_in(membership, "memory")),
    ):
        for directory in (top / inside, *(top / parent for parent in inside.parents), top):
            with contextlib.suppress(OSError, ValueError):
                limits.append(int((directory / name).read_text()))
    found = [limit for limit in limits if limit < _NO_LIMIT]
    return min(found, default=None)


def usable_memory_bytes() -> int:
    """Return the machine's memory, or what the container's limit leaves of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(total, memory_limit_bytes() or total)


def free_disk_bytes(directory: str | os.PathLike[str]) -> int:
    """Return the space that is free where `directory` is or will be."""
    path = Path(directory).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _path_in(membership: Path, controller: str) -> Path:
    """Return the path of this process's cgroup below the mount; version 2 has the controller ""."""
    with contextlib.suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                return Path(path.lstrip("/"))
    return Path()
