"""Which devices train, in which precision."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any, Final

import tensorflow as tf

from kubegraft.errors import ConfigError
from kubegraft.training.cluster import join
from kubegraft.training.cluster_spec import Cluster, find_cluster
from kubegraft.training.watchdog import WATCHDOG
from kubegraft.training.workers import ALONE, Workers, ending_if_lost

XLA_VARIABLE: Final = "KUBEGRAFT_XLA"
# NVIDIA compute capability from which bfloat16 runs on the tensor cores (Ampere).
_BFLOAT16_CAPABILITY = (8, 0)
# TensorFlow can join a cluster once in the life of a process.
_joined: list[tuple[Any, Workers]] = []


def make_strategy(devices: Sequence[str] | None = None) -> Any:
    """Return the `tf.distribute` strategy that trains on `devices`.

    Args:
        devices: TensorFlow device names such as `["GPU:0", "GPU:1"]`; None takes every visible GPU, or the
            CPU where there is none, and together with other workers where `TF_CONFIG` names some.

    Returns:
        `MultiWorkerMirroredStrategy` for several workers, `MirroredStrategy` for GPUs or several devices,
        `OneDeviceStrategy` for one CPU.

    Raises:
        ConfigError: If `TF_CONFIG` makes no sense.
        PeerLost: If another worker is lost at once; one that never comes ends this process with the same code.
    """
    if not devices and (cluster := find_cluster()):
        return _joined_strategy(cluster)
    names = list(devices) if devices else [gpu.name for gpu in tf.config.list_logical_devices("GPU")]
    if not names:
        return tf.distribute.OneDeviceStrategy("CPU:0")
    if len(names) == 1 and "CPU" in names[0].upper():
        return tf.distribute.OneDeviceStrategy(names[0])
    return _mirrored(tuple(names))


@functools.cache
def _mirrored(names: tuple[str, ...]) -> Any:
    """Return the one strategy of these devices: a second one would number its collectives from the start again."""
    return tf.distribute.MirroredStrategy(names)


def _joined_strategy(cluster: Cluster) -> Any:
    if not _joined:
        workers = Workers(cluster)
        with ending_if_lost(workers):
            strategy = join(cluster)
        # A worker must not ask the others whether they have a next batch, too: all batches are full, all epochs equal.
        strategy.extended.experimental_enable_get_next_as_optional = False
        workers.barrier()
        WATCHDOG.disarm()
        _joined.append((strategy, workers))
    return _joined[0][0]


def workers_of(strategy: Any) -> Workers:
    """Return the processes that train by a strategy: this one alone, unless it joined others."""
    return next((workers for joined, workers in _joined if joined is strategy), ALONE)


def num_local_replicas(strategy: Any) -> int:
    """Return how many of a strategy's replicas are in this process."""
    num_replicas: int = strategy.num_replicas_in_sync // workers_of(strategy).num_workers
    return num_replicas


def has_gpu() -> bool:
    """Return whether a GPU trains."""
    return bool(tf.config.list_physical_devices("GPU"))


def divisible_batch_size(batch_size: int, num_replicas: int) -> int:
    """Return the smallest batch size from `batch_size` on that gives every replica the same number of images."""
    return -(-batch_size // num_replicas) * num_replicas


def xla_wanted(*, by_default: bool = False) -> bool:
    """Return whether `$KUBEGRAFT_XLA` asks for training steps that XLA compiles: `on` or `off`.

    Sums come in another order, so that a run is repeatable with it and without it, but not across. On CPUs
    depthwise convolutions become up to 16 times slower, and a head on features 1.3 to 2.3 times as fast;
    `kubegraft benchmark --contestants kubegraft-cold,kubegraft-xla` says what it does on a GPU.

    Args:
        by_default: Without the variable.

    Raises:
        ConfigError: If it is neither.
    """
    wanted = os.environ.get(XLA_VARIABLE) or ("on" if by_default else "off")
    if wanted not in ("on", "off"):
        raise ConfigError(
            f"`{XLA_VARIABLE}` must be 'on' or 'off'. Received: {XLA_VARIABLE}={wanted!r}. Unset, kubegraft chooses."
        )
    return wanted == "on"


def precision_policy(mixed_precision: str) -> str:
    """Return the Keras dtype policy for `mixed_precision` on this machine.

    Args:
        mixed_precision: `on`, `off`, or `auto`: bfloat16 where every GPU computes it natively. bfloat16 has
            float32's exponent range, so that no loss scaling is needed.

    Raises:
        ConfigError: If `mixed_precision` is none of these.
    """
    if mixed_precision not in ("auto", "on", "off"):
        raise ConfigError(
            "`mixed_precision` must be 'auto', 'on' or 'off'. "
            f"Received: mixed_precision={mixed_precision!r}. 'auto' is right for most."
        )
    gpus = tf.config.list_physical_devices("GPU")
    native = bool(gpus) and all(_capability(gpu) >= _BFLOAT16_CAPABILITY for gpu in gpus)
    chosen = mixed_precision == "on" or (mixed_precision == "auto" and native)
    return "mixed_bfloat16" if chosen else "float32"


def _capability(gpu: Any) -> tuple[int, int]:
    details = tf.config.experimental.get_device_details(gpu)
    capability: tuple[int, int] = details.get("compute_capability", (0, 0))
    return capability
