"""How this process joins the workers that train together."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any, Final

import tensorflow as tf

from kubegraft.reporting.events import log_event
from kubegraft.training.cluster_spec import Cluster
from kubegraft.training.watchdog import WATCHDOG

START_SECONDS_VARIABLE: Final = "KUBEGRAFT_START_SECONDS"
HEARTBEAT_SECONDS_VARIABLE: Final = "KUBEGRAFT_HEARTBEAT_SECONDS"
# Pods of a gang start within seconds of one another, or their images are being pulled: then a restart is cheap.
_START_SECONDS: Final = 50.0
# A worker that is silent for so long counts as dead or frozen. TensorFlow's own default is noticed after 8 to 10 s.
_HEARTBEAT_SECONDS: Final = 5.0


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
    with _keeping_stop_handler():
        return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)


@contextlib.contextmanager
def _keeping_stop_handler() -> Iterator[None]:
    """Put back what SIGTERM did before: TensorFlow takes it for a notice that only it would read."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGTERM, handler)


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
