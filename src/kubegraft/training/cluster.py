"""Which workers train together, as `TF_CONFIG` says, and how this process joins them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import tensorflow as tf

from kubegraft.errors import ConfigError
from kubegraft.reporting.events import log_event
from kubegraft.training.watchdog import WATCHDOG

CLUSTER_VARIABLE: Final = "TF_CONFIG"
START_SECONDS_VARIABLE: Final = "KUBEGRAFT_START_SECONDS"
HEARTBEAT_SECONDS_VARIABLE: Final = "KUBEGRAFT_HEARTBEAT_SECONDS"
# Pods of a gang start within seconds of one another, or their images are being pulled: then a restart is cheap.
_START_SECONDS: Final = 50.0
# A worker that is silent for so long counts as dead or frozen. TensorFlow's own default is noticed after 8 to 10 s.
_HEARTBEAT_SECONDS: Final = 5.0
_JOBS: Final = ("chief", "worker")


@dataclass(frozen=True, slots=True)
class Cluster:
    """The workers, and which of them this process is.

    Attributes:
        addresses: Job (`chief`, `worker`) to the `host:port` of each of its tasks.
        job: Job of this process.
        task: Number of this process in its job.
    """

    addresses: Mapping[str, tuple[str, ...]]
    job: str
    task: int

    @property
    def num_workers(self) -> int:
        """Number of processes that train together."""
        return sum(map(len, self.addresses.values()))

    @property
    def index(self) -> int:
        """Number of this process among all; 0 is the chief."""
        before = _JOBS[: _JOBS.index(self.job)]
        return sum(len(self.addresses.get(job, ())) for job in before) + self.task

    @property
    def leader(self) -> str:
        """The job of the chief."""
        return "chief" if self.addresses.get("chief") else "worker"


def find_cluster() -> Cluster | None:
    """Return the cluster that `TF_CONFIG` describes, or None where it names fewer than two workers.

    Raises:
        ConfigError: If it is no description of workers that includes this one.
    """
    text = os.environ.get(CLUSTER_VARIABLE, "").strip()
    if not text:
        return None
    try:
        values = json.loads(text)
        addresses = {job: tuple(tasks) for job, tasks in values.get("cluster", {}).items() if tasks}
        task = values.get("task", {"type": "worker", "index": 0})
        found = Cluster(addresses, str(task["type"]), int(task["index"]))
        others = set(addresses) - set(_JOBS)
        valid = not others and (not addresses or 0 <= found.task < len(addresses[found.job]))
    except (ValueError, KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise ConfigError(
            f"`{CLUSTER_VARIABLE}` must hold JSON with `cluster`, the addresses of the jobs `worker` and perhaps "
            f"`chief`, and `task`, which of them this process is. Received: {CLUSTER_VARIABLE}={text[:300]!r}. "
            "Leave it out to train with one process."
        )
    return found if found.num_workers > 1 else None


def join(cluster: Cluster) -> Any:
    """Return the strategy of all workers, when each of them is there.

    Must be called before TensorFlow does anything else. A peer that doesn't come ends this process with exit code 75,
    by the watchdog, which the caller disarms when a first collective has passed.
    """
    seconds = float(os.environ.get(START_SECONDS_VARIABLE) or _START_SECONDS)
    WATCHDOG.arm(seconds, f"not all {cluster.num_workers} workers came within {seconds:g} s")
    log_event("workers", "joining", index=cluster.index, of=cluster.num_workers)
    _configure_heartbeat(cluster)
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=tf.distribute.experimental.CommunicationImplementation.AUTO
    )
    return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)


def _configure_heartbeat(cluster: Cluster) -> None:
    """Tell the coordination service how soon a silent worker is a dead one; the strategy keeps what it finds."""
    from tensorflow.compiler.xla.tsl.protobuf import coordination_config_pb2
    from tensorflow.python.eager import context

    seconds = float(os.environ.get(HEARTBEAT_SECONDS_VARIABLE) or _HEARTBEAT_SECONDS)
    context.context().configure_coordination_service(
        service_type="standalone",
        service_leader=f"/job:{cluster.leader}/replica:0/task:0",
        heartbeat_timeout_in_ms=int(1000 * seconds),
        coordinated_jobs=[
            coordination_config_pb2.CoordinatedJob(name=job, num_tasks=len(tasks))
            for job, tasks in cluster.addresses.items()
        ],
    )
