"""Where the cache is, and how much it may take, for those who don't say."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import Final

from kubegraft.errors import ConfigError

CACHE_VARIABLE: Final = "KUBEGRAFT_CACHE"
BUDGET_VARIABLE: Final = "KUBEGRAFT_CACHE_BUDGET"
OFF: Final = "none"
OPEN_BUDGET: Final = "auto"
_UNITS: Final = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4} | {
    "KI": 1024, "MI": 1024**2, "GI": 1024**3, "TI": 1024**4,
}  # fmt: skip
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def cache_home() -> Path:
    """Return the folder for what this user's kubegraft may lose at any time."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "kubegraft"
    try:
        return Path.home() / ".cache" / "kubegraft"
    except RuntimeError:  # a container's user may have no home
        return Path(tempfile.gettempdir()) / f"kubegraft-{os.getuid()}"


def mirror_root(uri: str) -> Path:
    """Return the directory for this machine's part of a cache in a bucket."""
    return cache_home() / "buckets" / hashlib.sha256(uri.rstrip("/").encode()).hexdigest()[:20]


def default_location() -> str:
    """Return `$KUBEGRAFT_CACHE`, or the folder `kubegraft/features` in the user's cache directory."""
    return os.environ.get(CACHE_VARIABLE) or str(cache_home() / "features")


def default_budget() -> int | None:
    """Return the bytes that `$KUBEGRAFT_CACHE_BUDGET` allows, or None for `auto` and without it.

    Raises:
        ConfigError: If it is no number of bytes.
    """
    text = os.environ.get(BUDGET_VARIABLE, "")
    return parse_bytes(BUDGET_VARIABLE, text) if text not in ("", OPEN_BUDGET) else None


def parse_bytes(name: str, text: str) -> int:
    """Return bytes from a text such as 500MB, 10GiB or 2T.

    Raises:
        ConfigError: If it is no such text.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?|)B?\s*", text.upper())
    if not match:
        raise ConfigError(
            f"`{name}` must be a number of bytes with or without a unit. Received: {name}={text!r}. "
            "For example 10GiB or 500MB."
        )
    return int(float(match[1]) * _UNITS[match[2]])


def parse_age(name: str, text: str) -> float:
    """Return seconds from a text such as 90s, 12h, 30d or 8w.

    Raises:
        ConfigError: If it is no such text.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhdw])\s*", text)
    if not match:
        raise ConfigError(
            f"`{name}` must be a number with the unit s, m, h, d or w. Received: {name}={text!r}. For example 30d."
        )
    return float(match[1]) * _SECONDS[match[2]]


def shown_bytes(num_bytes: float) -> str:
    """Return bytes as people read them, for example "1.4 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
