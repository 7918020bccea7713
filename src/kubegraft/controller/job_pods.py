"""A job's pods, read once from what the API gave: which part of the job each is, and how it fares."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kubegraft.controller.conditions import find, moment
from kubegraft.controller.jobset import ATTEMPT_LABEL, ROLE_LABEL, ROLES
from kubegraft.controller.pod_template import CONTAINER
from kubegraft.job_report import Report, parse_report
from kubegraft.rendering.pods import Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPod:
    """One pod.

    Attributes:
        name: Its name.
        role: `prepare`, `train` or `finish`.
        attempt: Restarts of the JobSet before it.
        phase: As Kubernetes has it.
        node: Node that it is bound to; "" for none yet.
        deleted_at: When it must have ended at the latest, if it is being deleted.
        reason: Why the whole pod failed, for example `Evicted`; "" otherwise.
        message: What Kubernetes says about that.
        exit_code: Of its container, None while that has not ended.
        killed_by: Why the container ended, in Kubernetes' words: `OOMKilled`, `Error`.
        report: Its last report: of its end where there is one, else of its log.
        ended: Whether `report` is of its end.
        waiting_reason: Why the container does not start, for example `ErrImagePull`; "" otherwise.
        waiting_message: Details of that.
        unschedulable: What the scheduler says while there is no node for it; "" otherwise.
        unschedulable_since: Since when.
        started_at: When its container started.
        finished_at: When it ended.
        running: Whether its container runs.
        image: Image of the container.
        memory: Limit of memory, as a quantity; "" for none.
    """

    name: str
    role: str
    attempt: int
    phase: str
    node: str
    deleted_at: datetime | None
    reason: str
    message: str
    exit_code: int | None
    killed_by: str
    report: Report | None
    ended: bool
    waiting_reason: str
    waiting_message: str
    unschedulable: str
    unschedulable_since: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    running: bool
    image: str
    memory: str

    @property
    def failed(self) -> bool:
        """Whether it ended otherwise than well."""
        return self.phase == "Failed" or bool(self.exit_code)

    @property
    def pending(self) -> bool:
        """Whether it has not run yet."""
        return self.phase == "Pending" and self.exit_code is None and not self.running


def read_pods(pods: Iterable[Manifest], reports: Mapping[str, Report]) -> tuple[JobPod, ...]:
    """Return the pods of a JobSet in the order of their part and name.

    Args:
        pods: As the API gave them; those without a part of the job are left out.
        reports: Newest report of logs, by the pod's name.
    """
    found = [read_pod(pod, reports.get(pod["metadata"]["name"])) for pod in pods if _role(pod) in ROLES]
    return tuple(sorted(found, key=lambda pod: (ROLES.index(pod.role), pod.name)))


def _role(pod: Manifest) -> str:
    return str((pod["metadata"].get("labels") or {}).get(ROLE_LABEL, ""))


def read_pod(pod: Manifest, live: Report | None = None) -> JobPod:
    """Return one pod, also one without a part of a job.

    Args:
        pod: As the API gave it.
        live: Newest report of its log.
    """
    metadata, spec, status = pod["metadata"], pod.get("spec") or {}, pod.get("status") or {}
    state = _container_state(status)
    terminated, waiting = state.get("terminated") or {}, state.get("waiting") or {}
    last = _report_of(terminated.get("message") or "")
    scheduled = find(status.get("conditions") or (), "PodScheduled")
    homeless = scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable"
    container: Mapping[str, Any] = next(iter(spec.get("containers") or ()), {})
    attempt = str(metadata["labels"].get(ATTEMPT_LABEL, "0"))
    return JobPod(
        name=metadata["name"],
        role=_role(pod),
        attempt=int(attempt) if attempt.isdecimal() else 0,
        phase=status.get("phase", "Pending"),
        node=spec.get("nodeName", ""),
        deleted_at=moment(metadata.get("deletionTimestamp")),
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        exit_code=terminated.get("exitCode"),
        killed_by=terminated.get("reason", ""),
        report=last or live,
        ended=last is not None,
        waiting_reason=waiting.get("reason", ""),
        waiting_message=waiting.get("message", ""),
        unschedulable=scheduled.get("message", "") if homeless else "",
        unschedulable_since=moment(scheduled.get("lastTransitionTime")) if homeless else None,
        started_at=moment((state.get("running") or terminated).get("startedAt")),
        finished_at=moment(terminated.get("finishedAt")),
        running="running" in state,
        image=container.get("image", ""),
        memory=str(((container.get("resources") or {}).get("limits") or {}).get("memory", "")),
    )


@functools.lru_cache(maxsize=1024)  # a pod's end is read again whenever its job is looked at
def _report_of(message: str) -> Report | None:
    return parse_report(message)


def _container_state(status: Mapping[str, Any]) -> Mapping[str, Any]:
    statuses = status.get("containerStatuses") or ()
    return next((each.get("state") or {} for each in statuses if each.get("name") == CONTAINER), {})
