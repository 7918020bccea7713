"""A TransferJob's status, computed anew from what is there and from the status before.

Only forward: a restart, a missed event or a stale read never turns progress, stage or restarts back, so that what is
written is the same in whatever order it was seen. And seldom: what changes all the time is written only together with
what does not, so that a job costs a constant number of writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from kubegraft.controller.conditions import (
    ADMITTED,
    FAILED,
    RUNNING,
    SUCCEEDED,
    Condition,
    find,
    holds,
    merged,
)
from kubegraft.controller.failures import last_ends
from kubegraft.controller.job_pods import JobPod
from kubegraft.controller.jobset import FINISH, TRAIN
from kubegraft.controller.spec import JobSpec
from kubegraft.controller.status_schema import METRICS
from kubegraft.job_report import STAGES

Status = dict[str, Any]

# Percent of the whole job at which each stage begins; it ends where the next begins.
_BEGINS: Final = {"ingest": 0, "train_head": 10, "fine_tune": 40, "evaluate": 85, "export": 92}
_ENDS: Final = dict(zip(_BEGINS, [*list(_BEGINS.values())[1:], 100], strict=True))
_STEP: Final = 10
_VOLATILE: Final = ("acceleratorHours", "earlierAcceleratorHours", "metrics", "exactProgress", "lastEnds")
# Reasons of a gang that waits for a node, an image or a volume: its first workers give up and come again meanwhile.
_NOT_STARTING: Final = frozenset(
    {
        "Unschedulable",
        "ImagePullFailed",
        "VolumeNotFound",
        "VolumeNotMounted",
        "CreateContainerConfigError",
        "Forbidden",
        "ServiceAccountNotFound",
    }
)
_CALM: Final = frozenset(
    {"Suspended", "Queued", "Starting", "Succeeded", "Preparing", "Training", "Finishing", "Stopping"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a status follows from.

    Attributes:
        spec: The job.
        before: Its status as read.
        pods: Pods of the present attempt.
        left: What is left of those before.
        restarts: Restarts of the job.
        uncounted: Those of them that did not count against `maxRestarts`.
        earlier: What of them is of JobSets before the present one, by the status's fields for it.
        jobset_uid: The present one; "" for none.
        jobset_name: Name of the JobSet.
        now: The time.
    """

    spec: JobSpec
    before: Status
    pods: tuple[JobPod, ...]
    left: tuple[JobPod, ...]
    restarts: int
    uncounted: int
    earlier: Mapping[str, int]
    jobset_uid: str
    jobset_name: str
    now: datetime


def next_status(facts: Facts, conditions: Iterable[Condition], **changes: Any) -> Status:
    """Return the status.

    Args:
        facts: What it follows from.
        conditions: What is known now; conditions of other types stay.
        changes: Further fields; None removes one.
    """
    before = facts.before
    generation = facts.spec.generation
    stage, progress = _progress(facts)
    found: Status = {
        **before,
        "conditions": merged(before.get("conditions", ()), conditions, generation=generation, now=facts.now),
        "observedGeneration": generation,
        "jobSetName": facts.jobset_name,
        "jobSetUid": facts.jobset_uid or before.get("jobSetUid", ""),
        **{name: number or None for name, number in facts.earlier.items()},
        "stage": stage,
        "progress": progress,
        "restarts": max(facts.restarts, before.get("restarts", 0)),
        "uncountedRestarts": max(facts.uncounted, before.get("uncountedRestarts", 0)),
        "restartsWithoutProgress": stalled_restarts(facts),
        "exactProgress": _exact_progress(facts),
        "lastEnds": last_ends((*facts.pods, *facts.left)) or before.get("lastEnds", ""),
        **_from_reports(facts),
        **_accelerator_hours(facts),
        **changes,
    }
    return {name: value for name, value in found.items() if value not in (None, "", {})}


def _progress(facts: Facts) -> tuple[str, int]:
    """Return the furthest stage and the percentage of the whole, in whole tens."""
    stage, progress = facts.before.get("stage", ""), facts.before.get("progress", 0)
    for pod in facts.pods:
        if pod.report is None or pod.report.stage not in STAGES:
            continue
        stage = max(stage, pod.report.stage, key=_order)
        progress = max(progress, _in_tens(_percent(pod.report.stage, pod.report.progress)))
    return stage, progress


def _exact_progress(facts: Facts) -> int:
    """Return the furthest percentage of the whole that any pod reported, also one of an earlier attempt."""
    furthest = int(facts.before.get("exactProgress", 0))
    for pod in (*facts.pods, *facts.left):
        if pod.report is not None and pod.report.stage in STAGES:
            furthest = max(furthest, _percent(pod.report.stage, pod.report.progress))
    return furthest


def stalled_restarts(facts: Facts) -> int:
    """Return how many uncounted restarts in a row were seen in which the job did not go on.

    Several that were missed are one: the job may have gone on in between. Only what was seen counts against a job.
    """
    before = facts.before
    waits = find(before.get("conditions", ()), RUNNING).get("reason") in _NOT_STARTING
    again = facts.uncounted > before.get("uncountedRestarts", 0) and not waits
    seen = int(before.get("restartsWithoutProgress", 0)) + again
    return 0 if seen and _went_on(facts) else seen


def _went_on(facts: Facts) -> bool:
    if _progress(facts)[0] != facts.before.get("stage", ""):
        return True
    return _exact_progress(facts) > int(facts.before.get("exactProgress", 0))


def _order(stage: str) -> int:
    return STAGES.index(stage) if stage in STAGES else -1


def _percent(stage: str, progress: int) -> int:
    begins = _BEGINS[stage]
    return begins + (_ENDS[stage] - begins) * progress // 100


def _in_tens(percent: int) -> int:
    # All of it is the job's success, and not the report's to say.
    return min(percent // _STEP * _STEP, 100 - _STEP)


def _from_reports(facts: Facts) -> Status:
    metrics = dict(facts.before.get("metrics", {}))
    found: Status = {}
    for pod in facts.pods:
        if pod.report is None:
            continue
        metrics |= {
            METRICS[name][0]: f"{value:.4f}" for name, value in pod.report.metrics.items() if name in METRICS
        }
        found |= {"datasetDigest": pod.report.dataset_digest} if pod.report.dataset_digest else {}
        if pod.role == FINISH and pod.report.model_uri:
            found["modelUri"] = pod.report.model_uri
    return {**found, "metrics": metrics}


def _accelerator_hours(facts: Facts) -> Status:
    """Return the hours that accelerators were held, and the part of them before the present attempt."""
    if not facts.spec.accelerators:
        return {}
    total = float(facts.before.get("acceleratorHours", 0))
    earlier = float(facts.before.get("earlierAcceleratorHours", 0))
    if facts.restarts > facts.before.get("restarts", 0) or not holds(
        facts.before.get("conditions", ()), ADMITTED
    ):
        ended = sum(_held_seconds(pod, facts.now) for pod in facts.left if pod.role == TRAIN)
        earlier = max(total, earlier + facts.spec.accelerators * ended / 3600)
    seconds = sum(_held_seconds(pod, facts.now) for pod in facts.pods if pod.role == TRAIN)
    total = max(total, earlier + facts.spec.accelerators * seconds / 3600)
    return {"acceleratorHours": f"{total:.2f}", "earlierAcceleratorHours": f"{earlier:.2f}"}


def _held_seconds(pod: JobPod, now: datetime) -> float:
    if pod.started_at is None:
        return 0
    return max(((pod.finished_at or now) - pod.started_at).total_seconds(), 0)


def worth_writing(before: Status, after: Status) -> bool:
    """Return whether something changed that does not change all the time."""
    return _steady(before) != _steady(after)


def _steady(status: Mapping[str, Any]) -> Status:
    return {name: value for name, value in status.items() if name not in _VOLATILE}


def changed_conditions(before: Status, after: Status) -> list[tuple[str, Mapping[str, Any]]]:
    """Return (event type, condition) of each condition that people should hear about."""
    found = []
    for kind in (ADMITTED, RUNNING, SUCCEEDED, FAILED):
        old, new = find(before.get("conditions", ()), kind), find(after.get("conditions", ()), kind)
        if new and (old.get("status"), old.get("reason")) != (new["status"], new["reason"]):
            found.append((_event_type(new), new))
    if any(new["type"] in (SUCCEEDED, FAILED) for _, new in found):
        return [(kind, new) for kind, new in found if new["type"] != RUNNING]  # it says the same
    return found


def _event_type(condition: Mapping[str, Any]) -> str:
    if condition["type"] == FAILED:
        return "Warning"
    bad = condition["status"] == "False" and condition["reason"] not in _CALM
    return "Warning" if bad else "Normal"
