"""What the numbers were measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("tensorflow-cpu", "tensorflow", "keras", "numpy", "scikit-learn", "kubegraft")
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16")


def facts() -> dict[str, Any]:
    """Return the processor, cores, memory, GPUs, versions, date and commit; nothing that names the machine."""
    info = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.M)
    flags = set(re.findall(r"[\w]+", (re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.M) or [""])[0]))
    memory = re.search(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo"), re.M)
    return {
        "processor": model[1].strip() if model else platform.machine(),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": int(memory[1]) * 1024 if memory else 0,
        "gpus": _lines("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
    }


def has_bfloat16() -> bool:
    """Return whether the processor multiplies bfloat16 itself."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(facts()["instructions"]))


def _commit() -> str:
    root = Path(__file__).resolve().parents[1]
    here = str(root)
    # An installed copy may lie in somebody else's checkout.
    is_checkout = (root / "pyproject.toml").exists()
    commit = _lines("git", "-C", here, "rev-parse", "--short=12", "HEAD") if is_checkout else []
    if not commit:
        return os.environ.get("IMAGE_VERSION", "")
    # The benchmark's own results are no change of what is measured.
    changed = [
        line
        for line in _lines("git", "-C", here, "status", "--porcelain", "--untracked-files=no")
        if not line.endswith(("docs/benchmarks.md", "docs/benchmarks.json"))
    ]
    return commit[0] + (" with changes" if changed else "")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package != "kubegraft":
            return ""
        from kubegraft import __version__

        return __version__


def _lines(*command: str) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line for line in done.stdout.splitlines() if line.strip()]


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
