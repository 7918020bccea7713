"""What to do next about one TransferJob: a pure function of what is there.

What exists decides, not what was done before: no JobSet yet -> make it; a JobSet -> follow it; its end, and the last
report of its pods -> the job's end; after the end -> nothing but the deletion that `ttlSecondsAfterFinished` asks for.
So it may be called at any time, any number of times, after a crash between any two actions and with stale objects:
each action names what it is about, and what was done already is found and not done again.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from kubegraft.controller.actions import Action, Apply, Event, PatchStatus, Requeue
from kubegraft.controller.conditions import ADMITTED, RUNNING, Condition, moment, timestamp
from kubegraft.controller.ending import LOOK_AGAIN_SECONDS, conclude, end_of, expiry, fail
from kubegraft.controller.failures import (
    CONFIG_REJECTED,
    DEADLINE_EXCEEDED,
    NAME_CONFLICT,
    Failure,
    creation_problem,
    final_failure,
    last_ends,
    no_progress,
)
from kubegraft.controller.jobset import (
    API_VERSION,
    KIND,
    QUEUE_LABEL,
    jobset_name,
    render_config_map,
    render_jobset,
)
from kubegraft.controller.observed import Observed
from kubegraft.controller.running import restarting_condition, running_condition
from kubegraft.controller.settings import Settings
from kubegraft.controller.spec import JobSpec
from kubegraft.controller.status import stalled_restarts
from kubegraft.controller.status_schema import MAX_STALLED
from kubegraft.controller.view import (
    View,
    admitted,
    admitted_at,
    delete_jobset,
    has_ended,
    is_deleted,
    is_owned,
    is_suspended,
    look,
    tell,
)
from kubegraft.errors import ConfigError
from kubegraft.rendering.pods import Manifest

_RESYNC_SECONDS: Final = 120.0  # events may be missed
_CONFLICT_SECONDS: Final = 60.0


def reconcile(observed: Observed, settings: Settings) -> tuple[Action, ...]:
    """Return what to do now, in order.

    Never raises on objects that passed the schema.

    Args:
        observed: The TransferJob and what belongs to it, maybe stale.
        settings: What the operator's installation chose.
    """
    view = look(observed, settings)
    if is_deleted(observed.job):
        return ()  # what it owns goes with it
    if has_ended(view.before):
        return _after_the_end(view)
    if view.jobset is not None and not is_owned(view.jobset, view.spec.uid):
        return _conflict(view)
    if view.jobset is not None and is_deleted(view.jobset):
        return (Requeue(LOOK_AGAIN_SECONDS),)  # its name is free when its pods are gone
    try:
        return _decide(view)
    except ConfigError as error:
        return fail(view, Failure(CONFIG_REJECTED, str(error)), view.now)


def _decide(view: View) -> tuple[Action, ...]:
    jobset = view.jobset
    if jobset is None:
        return _suspended(view) if view.spec.suspended else _start(view)
    if end := end_of(jobset):
        return conclude(view, jobset, end)
    if failure := final_failure((*view.pods, *view.left)):
        return fail(view, failure, view.now)
    if view.spec.suspended:
        return (*_hold(view, jobset), *_suspended(view))
    if not _is_in_its_queue(jobset, view.spec):
        return (delete_jobset(jobset),)  # the queue was changed; it is made anew
    return _follow(view, jobset)


def _start(view: View) -> tuple[Action, ...]:
    job = view.observed.job
    made = (Apply(render_config_map(job), create=True), Apply(render_jobset(job, view.settings), create=True))
    refused = [event for event in view.observed.events if event.get("reason") == "ApplyFailed"]
    if not refused:
        return (*made, Requeue(_RESYNC_SECONDS))
    problem = creation_problem(refused[-1].get("message", ""))
    told = tell(
        view, [Condition(kind, False, problem.reason, problem.message) for kind in (ADMITTED, RUNNING)]
    )
    return (*told, *made, Requeue(_CONFLICT_SECONDS))


def _suspended(view: View) -> tuple[Action, ...]:
    message = "The job is suspended. Set suspend: false, and it goes on from its last checkpoint."
    waits = [Condition(kind, False, "Suspended", message) for kind in (ADMITTED, RUNNING)]
    return tell(view, waits, startTime=None, restartsWithoutProgress=0)


def _hold(view: View, jobset: Manifest) -> tuple[Action, ...]:
    """Stop the pods. With a queue the JobSet goes, and its quota with it: whether it is suspended is Kueue's to say."""
    if view.spec.queue or _queue_of(jobset):
        return (delete_jobset(jobset),)
    return () if is_suspended(jobset) else (_with_suspend(jobset, suspend=True),)


def _is_in_its_queue(jobset: Manifest, spec: JobSpec) -> bool:
    # Kueue gives what names no queue the namespace's default one.
    return not spec.queue or _queue_of(jobset) == spec.queue


def _queue_of(jobset: Manifest) -> str:
    return str((jobset["metadata"].get("labels") or {}).get(QUEUE_LABEL, ""))


def _with_suspend(jobset: Manifest, *, suspend: bool) -> Apply:
    """Return the one change that a JobSet takes; what else it has was made by a create, and stays whose it is."""
    kept = ("name", "namespace", "uid", "resourceVersion")
    metadata = {name: jobset["metadata"][name] for name in kept if name in jobset["metadata"]}
    return Apply(
        {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": {"suspend": suspend}}
    )


def _conflict(view: View) -> tuple[Action, ...]:
    name = jobset_name(view.observed.job)
    message = (
        f"There is a JobSet {name} that this job did not make. Delete it with `kubectl delete jobset {name}`, "
        "and the job starts."
    )
    told = tell(view, [Condition(kind, False, NAME_CONFLICT, message) for kind in (ADMITTED, RUNNING)])
    return (*told, Requeue(_CONFLICT_SECONDS))


def _follow(view: View, jobset: Manifest) -> tuple[Action, ...]:
    if _seconds_left(view, jobset) <= 0:
        message = (
            f"The job ran longer than activeDeadlineSeconds, {view.spec.deadline_seconds}. What it has is on the "
            "volume: a new job of the same name with more time goes on from there."
        )
        return fail(view, Failure(DEADLINE_EXCEEDED, message), view.now)
    if stalled_restarts(view.facts()) > MAX_STALLED:
        return fail(view, _stalled(view), view.now)
    mended: tuple[Action, ...] = ()
    if view.observed.config_map is None:
        mended = (Apply(render_config_map(view.observed.job), create=True),)
    if is_suspended(jobset):
        return (*mended, *_let_go(view, jobset))
    started = view.before.get("startTime") or timestamp(admitted_at(view, jobset))
    told = tell(view, [admitted(view.spec), running_condition(view)], startTime=started)
    return (*mended, *told, *_told_restart(view, told), Requeue(_next_look(view, jobset)))


def _stalled(view: View) -> Failure:
    before = view.before
    reached = f"{before.get('exactProgress', 0)} % (stage {before.get('stage') or 'not begun'})"
    ends = last_ends((*view.left, *view.pods)) or before.get("lastEnds", "")
    return no_progress(reached, ends)


def _told_restart(view: View, told: tuple[Action, ...]) -> tuple[Action, ...]:
    """Return an event for a restart that the condition does not tell, since the pods run again already."""
    if view.restarts <= view.before.get("restarts", 0) or any(isinstance(each, Event) for each in told):
        return ()
    return (Event("Warning", "Restarted", restarting_condition(view).message),)


def _let_go(view: View, jobset: Manifest) -> tuple[Action, ...]:
    queue = view.spec.queue or _queue_of(jobset)
    if not queue:
        return (_with_suspend(jobset, suspend=False), Requeue(_RESYNC_SECONDS))
    message = f"The job waits in the queue {queue}; `kubectl get workloads` shows its place."
    waits = [Condition(kind, False, "Queued", message) for kind in (ADMITTED, RUNNING)]
    return (*tell(view, waits, startTime=None), Requeue(_RESYNC_SECONDS))


def _seconds_left(view: View, jobset: Manifest) -> float:
    """Return the seconds until the deadline; far more than a day without one."""
    limit = view.spec.deadline_seconds
    if limit is None or is_suspended(jobset):
        return float("inf")
    started = moment(view.before.get("startTime")) or admitted_at(view, jobset)
    return (started + timedelta(seconds=limit) - view.now).total_seconds()


def _next_look(view: View, jobset: Manifest) -> float:
    waits = _RESYNC_SECONDS
    if any(pod.unschedulable for pod in view.pods):
        waits = view.settings.unschedulable_seconds
    return max(min(waits, _seconds_left(view, jobset)), 1.0)


def _after_the_end(view: View) -> tuple[Action, ...]:
    jobset = view.jobset
    stop: tuple[Action, ...] = ()
    if jobset and is_owned(jobset, view.spec.uid) and not is_deleted(jobset) and end_of(jobset) is None:
        stop = (delete_jobset(jobset),)  # made or left by a stale read
    told: tuple[Action, ...] = ()
    if view.before.get("observedGeneration") != view.spec.generation:
        told = (PatchStatus({**view.before, "observedGeneration": view.spec.generation}),)
    return (*told, *stop, *expiry(view, moment(view.before.get("completionTime")) or view.now))
