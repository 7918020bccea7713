"""Whether the accelerators that somebody asked for are there, before anything is read.

A task that was given a GPU and can't use it would train on the CPU for a day. So who asks says how many: the
pipeline's parameter `accelerator_count`, or the variable that the manifests for GPUs set. Where work runs is no
part of what is computed, so neither is in a stage's config or digest.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Final

from kubegraft.errors import ConfigError, EnvironmentFault, KubegraftError

REQUIRE_VARIABLE: Final = "KUBEGRAFT_REQUIRE_ACCELERATORS"
_SECONDS: Final = 300.0


def required_accelerators() -> int:
    """Return how many accelerators `KUBEGRAFT_REQUIRE_ACCELERATORS` asks for; 0 takes what there is.

    Raises:
        ConfigError: If it is no whole number from 0 on.
    """
    text = os.environ.get(REQUIRE_VARIABLE, "").strip()
    if not text:
        return 0
    if not text.isdecimal():
        raise ConfigError(
            f"`{REQUIRE_VARIABLE}` must be a whole number, 0 or more. Received: {REQUIRE_VARIABLE}={text!r}. "
            "0, or no such variable, takes what there is."
        )
    return int(text)


def require_accelerators(count: int = 0) -> None:
    """Raise unless TensorFlow sees the accelerators that were asked for.

    Without any asked for this does nothing, and does not import TensorFlow.

    Args:
        count: How many this call asks for; the larger of it and the variable counts.

    Raises:
        ConfigError: If the variable is no number.
        EnvironmentFault: If TensorFlow sees fewer GPUs. Logical devices, which any CPU can be cut into, don't count.
    """
    wanted = max(int(count), required_accelerators())
    if not wanted:
        return
    from kubegraft.tensorflow_setup import find_gpus

    found = find_gpus()
    if found.num_gpus < wanted:
        raise EnvironmentFault(_message(wanted, found.num_gpus, found.cuda_build, found.version))


def _message(wanted: int, num_seen: int, cuda: bool, version: str) -> str:
    found = (
        f"`accelerator_count` must be the number of GPUs that TensorFlow sees, or less. Received: "
        f"accelerator_count={wanted}, and TensorFlow {version} sees {num_seen}. "
    )
    if not cuda:
        return found + (
            "It is the CPU build, which never sees one. Use the image for GPUs (`kubegraft compile --profile gpu`), "
            "or install `tensorflow[and-cuda]` in place of `tensorflow-cpu`; or ask for 0."
        )
    if num_seen:
        return found + "Ask for as many as the node gives to this container, or give it more."
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return found + "It is a CUDA build, but CUDA_VISIBLE_DEVICES hides all of them. Unset it."
    return found + (
        "It is a CUDA build without a usable driver. The node needs NVIDIA's driver and device plugin, and the pod "
        "an `nvidia.com/gpu` limit; `nvidia-smi` in the container must list them."
    )


def require_accelerators_for_run() -> None:
    """Do the same in a process of its own, so that a run that only starts stages needs no TensorFlow.

    Raises:
        ConfigError: If the variable is no number.
        EnvironmentFault: If TensorFlow sees fewer GPUs.
        KubegraftError: If TensorFlow was ended by the system or did not answer; another try may find it otherwise.
    """
    if not required_accelerators():
        return
    command = [sys.executable, "-m", "kubegraft.accelerators"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise _no_answer(f"no answer within {_SECONDS:.0f} s") from None
    if done.returncode < 0:
        raise _no_answer(f"the end of its process by {signal.Signals(-done.returncode).name}")
    if done.returncode == EnvironmentFault.exit_code:
        raise EnvironmentFault(done.stderr.strip().rpartition("\n")[2].removeprefix("Error: "))
    if done.returncode:
        raise EnvironmentFault(
            "TensorFlow must start, to be asked for accelerators. Received: exit code "
            f"{done.returncode}: {done.stderr.strip()[-500:]}. `kubegraft doctor` says what is missing."
        )


def _no_answer(received: str) -> KubegraftError:
    return KubegraftError(
        f"TensorFlow must say which accelerators there are. Received: {received}. SIGKILL usually means that memory "
        "was short; a driver that hangs never answers. Give the pod more memory, or another node."
    )


if __name__ == "__main__":
    from kubegraft.processes import exit_on_error

    with exit_on_error("accelerators"):
        require_accelerators()
