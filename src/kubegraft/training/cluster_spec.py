"""Which workers train together, as `TF_CONFIG` says; needs no TensorFlow."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from kubegraft.errors import ConfigError

CLUSTER_VARIABLE: Final = "TF_CONFIG"
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
