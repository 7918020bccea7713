"""What to do next about one TransferJob: a pure function of what is there.

What exists decides, not what was done before: no JobSet yet -> make it; a JobSet -> follow it; its end, and the last
report of its pods -> the job's end; after the end -> nothing but the deletion that `ttlSecondsAfterFinished` asks for.
So it may be called at any time, any number of times, after a crash between any two actions and with stale objects:
each action names what it is about, and what was done already is found and not done again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from kubegraft.controller.actions import Action, Apply, Delete, Event, PatchStatus, Requeue
from kubegraft.controller.conditions import (
    ADMITTED,
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
    CONFIG_REJECTED,
    CRASHED,
    DEADLINE_EXCEEDED,
    NAME_CONFLICT,
    TOO_MANY_RESTARTS,
    Failure,
    creation_problem,
    culprit,
    explain_end,
    explains,
    final_failure,
    pending_problem,
)
from kubegraft.controller.job_pods import JobPod, read_pods
from kubegraft.controller.jobset import (
    API_VERSION,
    FINISH,
    KIND,
    PREPARE,
    QUEUE_LABEL,
    TRAIN,
    jobset_name,
    render_config_map,
    render_jobset,
)
from kubegraft.controller.observed import Observed
from kubegraft.controller.settings import Settings
from kubegraft.controller.spec import JobSpec
from kubegraft.controller.status import Facts, Status, changed_conditions, next_status, worth_writing
from kubegraft.errors import ConfigError
from kubegraft.rendering.pods import Manifest

_RESYNC_SECONDS: Final = 120.0  # events may be missed
_CONFLICT_SECONDS: Final = 60.0
_PATCH_SECONDS: Final = 2.0
_STAGE_REASONS: Final = {PREPARE: "Preparing", TRAIN: "Training", FINISH: "Finishing"}


@dataclass(frozen=True, slots=True)
class _View:
    """One reconciliation's look at things; `pods` are those of the present attempt, `left` of those before."""

    observed: Observed
    settings: Settings
    spec: JobSpec
    before: Status
    jobset: Manifest | None
    pods: tuple[JobPod, ...]
    left: tuple[JobPod, ...]

    @property
    def now(self) -> datetime:
        return self.observed.now

    @property
    def restarts(self) -> int:
        return int(_status_of(self.jobset).get("restarts", 0))

    def facts(self) -> Facts:
        return Facts(
            spec=self.spec,
            before=self.before,
            pods=self.pods,
            restarts=self.restarts,
            jobset_name=jobset_name(self.observed.job),
            now=self.now,
        )


def reconcile(observed: Observed, settings: Settings) -> tuple[Action, ...]:
    """Return what to do now, in order.

    Never raises on objects that passed the schema.

    Args:
        observed: The TransferJob and what belongs to it, maybe stale.
        settings: What the operator's installation chose.
    """
    view = _look(observed, settings)
    if _is_deleted(observed.job):
        return ()  # what it owns goes with it
    if _has_ended(view.before):
        return _after_the_end(view)
    if view.jobset is not None and not _is_owned(view.jobset, view.spec):
        return _conflict(view)
    if view.jobset is not None and _is_deleted(view.jobset):
        return (Requeue(_PATCH_SECONDS),)  # its name is free when its pods are gone
    try:
        return _decide(view)
    except ConfigError as error:
        return _fail(view, Failure(CONFIG_REJECTED, str(error)), view.now)


def _look(observed: Observed, settings: Settings) -> _View:
    pods = read_pods(observed.pods, observed.reports)
    attempt = int(_status_of(observed.jobset).get("restarts", 0))
    return _View(
        observed=observed,
        settings=settings,
        spec=JobSpec.of(observed.job),
        before=observed.job.get("status") or {},
        jobset=observed.jobset,
        pods=tuple(pod for pod in pods if pod.attempt == attempt),
        left=tuple(pod for pod in pods if pod.attempt != attempt),
    )


def _status_of(manifest: Manifest | None) -> Manifest:
    return (manifest or {}).get("status") or {}


def _is_deleted(manifest: Manifest) -> bool:
    return "deletionTimestamp" in manifest["metadata"]


def _has_ended(status: Status) -> bool:
    conditions = status.get("conditions", ())
    return holds(conditions, SUCCEEDED) or holds(conditions, FAILED)


def _is_owned(jobset: Manifest, spec: JobSpec) -> bool:
    owners = jobset["metadata"].get("ownerReferences") or ()
    return any(owner.get("uid") == spec.uid for owner in owners)


def _decide(view: _View) -> tuple[Action, ...]:
    jobset = view.jobset
    if jobset is None:
        return _suspended(view) if view.spec.suspended else _start(view)
    if end := _end_of(jobset):
        return _conclude(view, jobset, end)
    if failure := final_failure((*view.pods, *view.left)):
        return _fail(view, failure, view.now)
    if view.spec.suspended:
        return (*_hold(view, jobset), *_suspended(view))
    if not _is_in_its_queue(jobset, view.spec):
        return (_delete_jobset(jobset),)  # the queue was changed; it is made anew
    return _follow(view, jobset)


# Before there is a JobSet, and while it waits.


def _start(view: _View) -> tuple[Action, ...]:
    job = view.observed.job
    made = (Apply(render_config_map(job), create=True), Apply(render_jobset(job, view.settings), create=True))
    refused = [event for event in view.observed.events if event.get("reason") == "ApplyFailed"]
    if not refused:
        return (*made, Requeue(_RESYNC_SECONDS))
    problem = creation_problem(refused[-1].get("message", ""))
    told = _tell(view, [Condition(ADMITTED, False, problem.reason, problem.message)])
    return (*told, *made, Requeue(_CONFLICT_SECONDS))


def _suspended(view: _View) -> tuple[Action, ...]:
    message = "The job is suspended. Set suspend: false, and it goes on from its last checkpoint."
    waits = [Condition(kind, False, "Suspended", message) for kind in (ADMITTED, RUNNING)]
    return _tell(view, waits, startTime=None)


def _hold(view: _View, jobset: Manifest) -> tuple[Action, ...]:
    """Stop the pods. With a queue the JobSet goes, and its quota with it: whether it is suspended is Kueue's to say."""
    if view.spec.queue or not _is_in_its_queue(jobset, view.spec):
        return (_delete_jobset(jobset),)
    return () if _is_suspended(jobset) else (_with_suspend(jobset, suspend=True),)


def _is_in_its_queue(jobset: Manifest, spec: JobSpec) -> bool:
    return (jobset["metadata"].get("labels") or {}).get(QUEUE_LABEL, "") == spec.queue


def _is_suspended(jobset: Manifest) -> bool:
    return bool((jobset.get("spec") or {}).get("suspend", False))


def _with_suspend(jobset: Manifest, *, suspend: bool) -> Apply:
    """Return the JobSet as it was read, let go or held: all but this one field is immutable."""
    kept = ("name", "namespace", "uid", "resourceVersion", "labels", "ownerReferences")
    metadata = {name: jobset["metadata"][name] for name in kept if name in jobset["metadata"]}
    return Apply(
        {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "metadata": metadata,
            "spec": {**jobset["spec"], "suspend": suspend},
        }
    )


def _delete_jobset(jobset: Manifest) -> Delete:
    metadata = jobset["metadata"]
    return Delete(
        "JobSet",
        metadata["name"],
        metadata.get("namespace", ""),
        metadata.get("uid", ""),
        metadata.get("resourceVersion", ""),
    )


def _conflict(view: _View) -> tuple[Action, ...]:
    name = jobset_name(view.observed.job)
    message = (
        f"There is a JobSet {name} that this job did not make. Delete it with `kubectl delete jobset {name}`, "
        "and the job starts."
    )
    told = _tell(view, [Condition(ADMITTED, False, NAME_CONFLICT, message)])
    return (*told, Requeue(_CONFLICT_SECONDS))


# While it runs.


def _follow(view: _View, jobset: Manifest) -> tuple[Action, ...]:
    if _seconds_left(view, jobset) <= 0:
        message = (
            f"The job ran longer than activeDeadlineSeconds, {view.spec.deadline_seconds}. What it has is on the "
            "volume: a new job of the same name with more time goes on from there."
        )
        return _fail(view, Failure(DEADLINE_EXCEEDED, message), view.now)
    mended: tuple[Action, ...] = ()
    if view.observed.config_map is None:
        mended = (Apply(render_config_map(view.observed.job), create=True),)
    if _is_suspended(jobset):
        return (*mended, *_let_go(view, jobset))
    started = view.before.get("startTime") or timestamp(_admitted_at(view, jobset))
    told = _tell(view, [_admitted(view.spec), _running(view)], startTime=started)
    return (*mended, *told, *_told_restart(view), Requeue(_next_look(view, jobset)))


def _told_restart(view: _View) -> tuple[Action, ...]:
    """Return an event for a restart; the status that goes before it makes it the only one."""
    if view.restarts <= view.before.get("restarts", 0):
        return ()
    return (Event("Warning", "Restarted", _restarting(view).message),)


def _let_go(view: _View, jobset: Manifest) -> tuple[Action, ...]:
    if not view.spec.queue:
        return (_with_suspend(jobset, suspend=False), Requeue(_RESYNC_SECONDS))
    message = f"The job waits in the queue {view.spec.queue}; `kubectl get workloads` shows its place."
    waits = [Condition(kind, False, "Queued", message) for kind in (ADMITTED, RUNNING)]
    return (*_tell(view, waits, startTime=None), Requeue(_RESYNC_SECONDS))


def _admitted(spec: JobSpec) -> Condition:
    if spec.queue:
        return Condition(
            ADMITTED, True, "AdmittedByQueue", f"Kueue admitted the job from the queue {spec.queue}."
        )
    return Condition(ADMITTED, True, "Started", "The job's JobSet was made.")


def _admitted_at(view: _View, jobset: Manifest) -> datetime:
    """Return when the pods were let start, as near as can be known."""
    resumed = find(_status_of(jobset).get("conditions") or (), "Suspended").get("lastTransitionTime")
    return moment(resumed) or moment(jobset["metadata"].get("creationTimestamp")) or view.now


def _seconds_left(view: _View, jobset: Manifest) -> float:
    """Return the seconds until the deadline; far more than a day without one."""
    limit = view.spec.deadline_seconds
    if limit is None or _is_suspended(jobset):
        return float("inf")
    started = moment(view.before.get("startTime")) or _admitted_at(view, jobset)
    return (started + timedelta(seconds=limit) - view.now).total_seconds()


def _next_look(view: _View, jobset: Manifest) -> float:
    waits = _RESYNC_SECONDS
    if any(pod.unschedulable for pod in view.pods):
        waits = view.settings.unschedulable_seconds
    return max(min(waits, _seconds_left(view, jobset)), 1.0)


def _running(view: _View) -> Condition:
    """Return whether the job makes headway.

    Between two parts, and while pods start, it stays what it was: only a named problem or a restart ends it.
    """
    patience = timedelta(seconds=view.settings.unschedulable_seconds)
    problem = pending_problem((*view.pods, *view.left), view.observed.events, now=view.now, patience=patience)
    if problem:
        return Condition(RUNNING, False, problem.reason, problem.message)
    running = [pod for pod in view.pods if pod.running]
    if running:
        return _at_work(view, running)
    if view.restarts > view.before.get("restarts", 0):
        return _restarting(view)
    before = find(view.before.get("conditions", ()), RUNNING)
    if before and before["reason"] not in ("Suspended", "Queued"):
        return Condition(RUNNING, before["status"] == "True", before["reason"], before["message"])
    return Condition(RUNNING, False, "Starting", "The pods are being started.")


def _at_work(view: _View, running: list[JobPod]) -> Condition:
    role = running[-1].role
    nodes = f" on {view.spec.nodes} nodes" if role == TRAIN and view.spec.nodes > 1 else ""
    return Condition(RUNNING, True, _STAGE_REASONS[role], f"The pods of `{role}` run{nodes}.")


def _restarting(view: _View) -> Condition:
    cause = culprit((*view.left, *view.pods))
    told = explain_end(cause) if cause else Failure("Restarting", "A pod or its node was lost.")
    reason = told.reason if cause and explains(cause) else "Restarting"
    return Condition(
        RUNNING, False, reason, f"The pods are started again from the last checkpoint. {told.message}"
    )


# At its end.


@dataclass(frozen=True, slots=True)
class _End:
    """How a JobSet ended."""

    completed: bool
    at: datetime | None
    reason: str
    message: str


def _end_of(jobset: Manifest) -> _End | None:
    conditions = _status_of(jobset).get("conditions") or ()
    for kind in ("Completed", "Failed"):
        if holds(conditions, kind):
            found = find(conditions, kind)
            at = moment(found.get("lastTransitionTime"))
            return _End(kind == "Completed", at, found.get("reason", ""), found.get("message", ""))
    return None


def _conclude(view: _View, jobset: Manifest, end: _End) -> tuple[Action, ...]:
    """Return the job's end, or a little patience where the last reports are not there yet."""
    at = end.at or view.now
    waited = (view.now - at).total_seconds()
    if end.completed:
        missing = not _all_reported(view.pods)
    else:
        cause = culprit(_of_failed_job(view.pods, end, jobset))
        missing = cause is None or not explains(cause)
    if missing and waited < view.settings.report_wait_seconds:
        return (Requeue(_PATCH_SECONDS),)
    if end.completed:
        return _succeed(view, at)
    return _fail(view, _failure_of(view, end, cause), at)


def _all_reported(pods: tuple[JobPod, ...]) -> bool:
    return {pod.role for pod in pods if pod.ended} == {PREPARE, TRAIN, FINISH}


def _of_failed_job(pods: tuple[JobPod, ...], end: _End, jobset: Manifest) -> list[JobPod]:
    """Return the pods of the Job that made the JobSet fail, by the name in its message; all if it names none."""
    name = jobset["metadata"]["name"]
    role = re.search(rf"first failed job: {re.escape(name)}-(\w+)-", end.message)
    return [pod for pod in pods if not role or pod.role == role[1]]


def _failure_of(view: _View, end: _End, cause: JobPod | None) -> Failure:
    if cause is None:
        return Failure(
            "JobSetFailed", f"The JobSet failed: {end.message or end.reason}. Its pods left no report."
        )
    failure = explain_end(cause)
    if end.reason != "ReachedMaxRestarts":
        return failure
    tried = f"It was started again {view.spec.max_restarts} times (maxRestarts)."
    reason = TOO_MANY_RESTARTS if failure.reason == CRASHED else failure.reason
    return Failure(reason, f"{failure.message} {tried}")


def _succeed(view: _View, at: datetime) -> tuple[Action, ...]:
    finish = [pod for pod in view.pods if pod.role == FINISH and pod.ended]
    where = finish[-1].report.model_uri if finish and finish[-1].report else ""
    message = f"The model is exported to {where}." if where else "The model is exported to the volume."
    if not finish:
        message += " The last report was not seen, so metrics are missing here; they are beside the model."
    ended = [
        Condition(SUCCEEDED, True, "Exported", message),
        Condition(RUNNING, False, "Succeeded", message),
        _admitted(view.spec),
    ]
    times = _times(view, at)
    return (*_tell(view, ended, progress=100, **times), *_expiry(view, at))


def _fail(view: _View, failure: Failure, at: datetime) -> tuple[Action, ...]:
    """Return the job's end; its JobSet goes if it would go on."""
    ended = [
        Condition(FAILED, True, failure.reason, failure.message),
        Condition(RUNNING, False, failure.reason, failure.message),
    ]
    told = _tell(view, ended, **_times(view, at))
    live = view.jobset is not None and _end_of(view.jobset) is None
    stop = (_delete_jobset(view.jobset),) if view.jobset is not None and live else ()
    return (*told, *stop, *_expiry(view, at))


def _times(view: _View, at: datetime) -> dict[str, Any]:
    started = view.before.get("startTime")
    if not started and view.jobset is not None:
        started = timestamp(_admitted_at(view, view.jobset))
    return {"startTime": started, "completionTime": timestamp(at)}


def _after_the_end(view: _View) -> tuple[Action, ...]:
    jobset = view.jobset
    stop: tuple[Action, ...] = ()
    if jobset and _is_owned(jobset, view.spec) and not _is_deleted(jobset) and _end_of(jobset) is None:
        stop = (_delete_jobset(jobset),)  # made or left by a stale read
    told: tuple[Action, ...] = ()
    if view.before.get("observedGeneration") != view.spec.generation:
        told = (PatchStatus({**view.before, "observedGeneration": view.spec.generation}),)
    return (*told, *stop, *_expiry(view, moment(view.before.get("completionTime")) or view.now))


def _expiry(view: _View, at: datetime) -> tuple[Action, ...]:
    seconds = view.spec.ttl_seconds
    if seconds is None:
        return ()
    left = (at + timedelta(seconds=seconds) - view.now).total_seconds()
    if left > 0:
        return (Requeue(max(left, 1.0)),)
    if not _has_ended(view.before):
        return (Requeue(1.0),)  # the end is told first
    spec = view.spec
    return (Delete("TransferJob", spec.name, spec.namespace, spec.uid),)


def _tell(view: _View, conditions: list[Condition], **changes: Any) -> tuple[Action, ...]:
    """Return the write of the status, and events for people, if anything worth it changed."""
    after = next_status(view.facts(), conditions, **changes)
    if not worth_writing(view.before, after):
        return ()
    events = [
        Event(kind, condition["reason"], condition["message"])
        for kind, condition in changed_conditions(view.before, after)
    ]
    return (PatchStatus(after), *events)
