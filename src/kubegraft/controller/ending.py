"""How a job ends: its JobSet's end and the last reports of its pods, in one reason and one message."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from kubegraft.controller.actions import Action, Delete, Requeue
from kubegraft.controller.conditions import (
    FAILED,
    RUNNING,
    SUCCEEDED,
    Condition,
    find,
    holds,
    moment,
    timestamp,
)
from kubegraft.controller.failures import (
    CRASHED,
    TOO_MANY_RESTARTS,
    WAS_KILLED,
    Failure,
    culprit,
    explain_end,
    explains,
)
from kubegraft.controller.job_pods import JobPod
from kubegraft.controller.jobset import FINISH, PREPARE, TRAIN
from kubegraft.controller.view import View, admitted, admitted_at, delete_jobset, has_ended, status_of, tell
from kubegraft.rendering.pods import Manifest

LOOK_AGAIN_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class End:
    """How a JobSet ended."""

    completed: bool
    at: datetime | None
    reason: str
    message: str


def end_of(jobset: Manifest) -> End | None:
    """Return how a JobSet ended, or None while it goes on."""
    conditions = status_of(jobset).get("conditions") or ()
    for kind in ("Completed", "Failed"):
        if holds(conditions, kind):
            found = find(conditions, kind)
            at = moment(found.get("lastTransitionTime"))
            return End(kind == "Completed", at, found.get("reason", ""), found.get("message", ""))
    return None


def conclude(view: View, jobset: Manifest, end: End) -> tuple[Action, ...]:
    """Return the job's end, or a little patience where the last reports are not there yet."""
    at = end.at or view.now
    waited = (view.now - at).total_seconds()
    if end.completed:
        missing = not _all_reported(view.pods)
    else:
        cause = culprit(_of_failed_job(view.pods, end, jobset))
        missing = cause is None or not explains(cause)
    if missing and waited < view.settings.report_wait_seconds:
        return (Requeue(LOOK_AGAIN_SECONDS),)
    if end.completed:
        return _succeed(view, at)
    return fail(view, _failure_of(view, end, cause), at)


def _all_reported(pods: tuple[JobPod, ...]) -> bool:
    return {pod.role for pod in pods if _is_done(pod)} == {PREPARE, TRAIN, FINISH}


def _is_done(pod: JobPod) -> bool:
    """Return whether a pod's last word is that its part is finished; one that was replaced said another."""
    return pod.ended and pod.report is not None and pod.report.done


def _of_failed_job(pods: tuple[JobPod, ...], end: End, jobset: Manifest) -> list[JobPod]:
    """Return the pods of the Job that made the JobSet fail, by the name in its message; all if it names none."""
    name = jobset["metadata"]["name"]
    role = re.search(rf"first failed job: {re.escape(name)}-(\w+)-", end.message)
    return [pod for pod in pods if not role or pod.role == role[1]]


def _failure_of(view: View, end: End, cause: JobPod | None) -> Failure:
    if cause is None:
        return Failure(
            "JobSetFailed", f"The JobSet failed: {end.message or end.reason}. Its pods left no report."
        )
    failure = explain_end(cause)
    if end.reason != "ReachedMaxRestarts":
        return failure
    tried = f"It was started again {view.spec.max_restarts} times (maxRestarts)."
    reason = TOO_MANY_RESTARTS if failure.reason in (CRASHED, WAS_KILLED) else failure.reason
    return Failure(reason, f"{failure.message} {tried}")


def _succeed(view: View, at: datetime) -> tuple[Action, ...]:
    finish = [pod for pod in view.pods if pod.role == FINISH and _is_done(pod)]
    where = finish[-1].report.model_uri if finish and finish[-1].report else ""
    message = f"The model is exported to {where}." if where else "The model is exported to the volume."
    if not finish:
        message += " The last report was not seen, so metrics are missing here; they are beside the model."
    ended = [
        Condition(SUCCEEDED, True, "Exported", message),
        Condition(RUNNING, False, "Succeeded", message),
        admitted(view.spec),
    ]
    times = _times(view, at)
    return (*tell(view, ended, progress=100, **times), *expiry(view, at))


def fail(view: View, failure: Failure, at: datetime) -> tuple[Action, ...]:
    """Return the job's end; its JobSet goes if it would go on."""
    ended = [
        Condition(FAILED, True, failure.reason, failure.message),
        Condition(RUNNING, False, failure.reason, failure.message),
    ]
    if view.jobset is not None:
        ended.append(admitted(view.spec))
    told = tell(view, ended, **_times(view, at))
    live = view.jobset is not None and end_of(view.jobset) is None
    stop = (delete_jobset(view.jobset),) if view.jobset is not None and live else ()
    return (*told, *stop, *expiry(view, at))


def _times(view: View, at: datetime) -> dict[str, Any]:
    started = view.before.get("startTime")
    if not started and view.jobset is not None:
        started = timestamp(admitted_at(view, view.jobset))
    return {"startTime": started, "completionTime": timestamp(at)}


def expiry(view: View, at: datetime) -> tuple[Action, ...]:
    """Return the deletion that `ttlSecondsAfterFinished` asks for, or when to look again; `at` is the job's end."""
    seconds = view.spec.ttl_seconds
    if seconds is None:
        return ()
    left = (at + timedelta(seconds=seconds) - view.now).total_seconds()
    if left > 0:
        return (Requeue(max(left, 1.0)),)
    if not has_ended(view.before):
        return (Requeue(1.0),)  # the end is told first
    spec = view.spec
    return (Delete("TransferJob", spec.name, spec.namespace, spec.uid),)
