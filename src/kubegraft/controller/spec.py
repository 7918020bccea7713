"""A TransferJob's spec as typed values, and as the config file that its pods read.

The API server has checked the spec and filled in its defaults; still nothing here relies on that, so that an object
that an older schema let in is read the same way.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kubegraft.config_file import to_yaml
from kubegraft.controller.cluster_fields import (
    DEFAULT_CLAIM,
    DEFAULT_RESOURCE,
    DEFAULT_RESTARTS,
    DEFAULT_SHM,
)
from kubegraft.controller.observed import JOB_LABEL
from kubegraft.rendering.pods import Manifest, labels
from kubegraft.run_config import SHARED, STAGES, RunConfig, stage_fields

API_VERSION = "kubegraft.dev/v1alpha1"
JOB_KIND = "TransferJob"
SCHEDULE_KIND = "TransferSchedule"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """One TransferJob as the operator reads it.

    Attributes:
        name: Name of the object, also its folder on the volume.
        namespace: Its namespace.
        uid: Its uid.
        generation: Counts the changes of its spec.
        values: The spec itself.
    """

    name: str
    namespace: str
    uid: str
    generation: int
    values: Mapping[str, Any]

    @classmethod
    def of(cls, job: Manifest) -> JobSpec:
        """Return what a TransferJob says."""
        metadata = job["metadata"]
        return cls(
            name=metadata["name"],
            namespace=metadata.get("namespace", ""),
            uid=metadata.get("uid", ""),
            generation=metadata.get("generation", 0),
            values=job.get("spec") or {},
        )

    def part(self, name: str) -> Mapping[str, Any]:
        """Return an object of the spec, empty if it is not given."""
        return self.values.get(name) or {}

    @property
    def nodes(self) -> int:
        """Pods that train together."""
        return int(self.values.get("nodes", 1))

    @property
    def accelerators(self) -> int:
        """Accelerators of each training pod."""
        return int(self.part("accelerators").get("count", 0))

    @property
    def accelerator_resource(self) -> str:
        """What Kubernetes calls them."""
        return str(self.part("accelerators").get("resource", DEFAULT_RESOURCE))

    @property
    def shm_size(self) -> str:
        """Size of /dev/shm, as a quantity."""
        return str(self.values.get("shmSize", DEFAULT_SHM))

    @property
    def artifacts_claim(self) -> str:
        """Claim that all pods mount."""
        return str(self.part("artifacts").get("claim", DEFAULT_CLAIM))

    @property
    def queue(self) -> str:
        """LocalQueue of Kueue; "" for none."""
        return str(self.values.get("queueName", ""))

    @property
    def priority_class(self) -> str:
        """Name of the priority class; "" for none."""
        return str(self.values.get("priorityClass", ""))

    @property
    def suspended(self) -> bool:
        """Whether the user wants the job to wait."""
        return bool(self.values.get("suspend", False))

    @property
    def max_restarts(self) -> int:
        """Restarts after a crash that are allowed."""
        return int(self.values.get("maxRestarts", DEFAULT_RESTARTS))

    @property
    def deadline_seconds(self) -> int | None:
        """Longest time that it may run, or None."""
        return self.values.get("activeDeadlineSeconds")

    @property
    def ttl_seconds(self) -> int | None:
        """How long the TransferJob stays after its end, or None for ever."""
        return self.values.get("ttlSecondsAfterFinished")

    @property
    def publish_uri(self) -> str:
        """Where the results are published; "" for nowhere."""
        return str(self.part("model_store").get("uri", ""))

    def run_config(self) -> RunConfig:
        """Return the config of the run.

        Raises:
            ConfigError: If a value breaks its rule, for all that the schema let it in.
        """
        return _run_config(self.values)

    def run_yaml(self) -> str:
        """Return the config file that the pods read.

        Raises:
            ConfigError: As `run_config`.
        """
        chosen = {name: self.values[name] for name in (*SHARED, *STAGES) if name in self.values}
        return _run_yaml(json.dumps(chosen))

    def labels(self) -> Manifest:
        """Return the labels of all that the job owns."""
        return {**labels("task", self.name), JOB_LABEL: self.name}

    def owner(self) -> Manifest:
        """Return the owner reference of all that the job owns: it goes when the job goes."""
        return owner_reference(JOB_KIND, self.name, self.uid)


def _run_config(chosen: Mapping[str, Any]) -> RunConfig:
    values: dict[tuple[str, str], Any] = {("", name): chosen[name] for name in SHARED if name in chosen}
    for stage in STAGES:
        section = chosen.get(stage) or {}
        values |= {(stage, name): section[name] for name in stage_fields(stage) if name in section}
    return RunConfig().with_values(values)


@functools.lru_cache(maxsize=64)  # YAML with its comments takes milliseconds, and many jobs have the same
def _run_yaml(chosen: str) -> str:
    return to_yaml(_run_config(json.loads(chosen)))


def owner_reference(kind: str, name: str, uid: str) -> Manifest:
    """Return an owner reference to a resource of kubegraft."""
    return {
        "apiVersion": API_VERSION,
        "kind": kind,
        "name": name,
        "uid": uid,
        "controller": True,
        "blockOwnerDeletion": False,
    }
