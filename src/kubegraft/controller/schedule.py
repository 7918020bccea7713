"""What to do next about one TransferSchedule: a pure function of what is there.

Each tick is decided once, and the decision is told: a job was made, or why not. A tick's job has the tick in its name,
so that a decision that a crash cut short is found and told, not taken again. Of several ticks that were missed the last
counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from kubegraft.controller.actions import Action, Apply, Delete, Event, PatchStatus, Requeue
from kubegraft.controller.conditions import (
    READY,
    SUCCEEDED,
    Condition,
    holds,
    merged,
    moment,
    shortened,
    timestamp,
)
from kubegraft.controller.data_look import (
    CHANGED_FRACTION,
    Seen,
    look_labels,
    look_problem,
    render_look,
    what_was_seen,
)
from kubegraft.controller.failures import creation_problem
from kubegraft.controller.observed import SCHEDULE_LABEL, ObservedSchedule
from kubegraft.controller.settings import Settings
from kubegraft.controller.spec import API_VERSION, JOB_KIND, SCHEDULE_KIND, JobSpec, owner_reference
from kubegraft.controller.status import Status
from kubegraft.controller.ticks import Cron, parse_cron
from kubegraft.controller.view import has_ended, is_deleted, is_owned, status_of
from kubegraft.errors import ConfigError
from kubegraft.rendering.pods import Manifest

TICK_ANNOTATION: Final = "kubegraft.dev/scheduled-at"
_LONGEST_WAIT_SECONDS: Final = 3600.0
_LOOK_AGAIN_SECONDS: Final = 30.0
_MINUTE: Final = 60


@dataclass(frozen=True, slots=True)
class _Verdict:
    """Whether a tick makes a job, and why."""

    ran: bool
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class _Plan:
    """One reconciliation's look at a schedule; `jobs` and `looks` are its own."""

    observed: ObservedSchedule
    settings: Settings
    cron: Cron
    jobs: tuple[Manifest, ...]
    looks: tuple[Manifest, ...]

    @property
    def values(self) -> Manifest:
        return self.observed.schedule["spec"]  # type: ignore[no-any-return]

    @property
    def name(self) -> str:
        return str(self.observed.schedule["metadata"]["name"])

    @property
    def before(self) -> Status:
        return status_of(self.observed.schedule)

    @property
    def now(self) -> datetime:
        return self.observed.now

    @property
    def active(self) -> list[Manifest]:
        return [job for job in self.jobs if not has_ended(status_of(job)) and not is_deleted(job)]

    @property
    def known_digest(self) -> str:
        """Digest of the data of the last successful run; "" for none."""
        ends = [job for job in self.jobs if _succeeded(job) and status_of(job).get("datasetDigest")]
        newest = max(ends, key=_tick_text, default=None)
        return str(status_of(newest)["datasetDigest"] if newest else self.before.get("lastDatasetDigest", ""))

    def name_at(self, tick: datetime) -> str:
        return f"{self.name}-{int(tick.timestamp()) // _MINUTE}"


def reconcile_schedule(observed: ObservedSchedule, settings: Settings) -> tuple[Action, ...]:
    """Return what to do now, in order.

    Never raises on objects that passed the schema.

    Args:
        observed: The TransferSchedule and what it made, maybe stale.
        settings: What the operator's installation chose.
    """
    schedule = observed.schedule
    if is_deleted(schedule):
        return ()
    values = schedule["spec"]
    try:
        cron = parse_cron(values["cron"], values.get("timeZone", "Etc/UTC"))
    except ConfigError as error:
        return _tell_broken(observed, str(error))
    plan = _Plan(observed, settings, cron, _own(schedule, observed.jobs), _own(schedule, observed.looks))
    try:
        decided = _decide(plan)
        if observed.refusal and any(isinstance(action, Apply) for action in decided):
            decided = (*_tell_refused(plan), *decided)
        return (*decided, *_tidy(plan))
    except ConfigError as error:
        return _tell_broken(observed, str(error))


def _tell_refused(plan: _Plan) -> tuple[Action, ...]:
    """Return what tells that the API server did not take the job or look that is tried again now."""
    problem = creation_problem(plan.observed.refusal)
    message = shortened(problem.message)
    told = _tell(
        plan.observed, plan.before, _described(plan), Condition(READY, False, problem.reason, message)
    )
    return (*told, Event("Warning", problem.reason, message)) if told else ()


def _own(schedule: Manifest, found: tuple[Manifest, ...]) -> tuple[Manifest, ...]:
    uid = schedule["metadata"].get("uid")
    return tuple(each for each in found if is_owned(each, uid))


def _tick_text(made: Manifest) -> str:
    """Return the tick that made a job or look, as text that sorts by time."""
    return str((made["metadata"].get("annotations") or {}).get(TICK_ANNOTATION, ""))


def _succeeded(job: Manifest) -> bool:
    return holds(status_of(job).get("conditions") or (), SUCCEEDED)


def _tell_broken(observed: ObservedSchedule, message: str) -> tuple[Action, ...]:
    ready = Condition(READY, False, "Invalid", message)
    before = status_of(observed.schedule)
    return _tell(observed, before, {**before, "nextScheduleTime": None}, ready)


# Deciding a tick.


def _decide(plan: _Plan) -> tuple[Action, ...]:
    if plan.values.get("suspend"):
        held = Condition(READY, False, "Suspended", "The schedule is suspended: no tick starts a job.")
        return _tell(plan.observed, plan.before, _described(plan, nextScheduleTime=None), held)
    last = moment(plan.before.get("lastScheduleTime"))
    since = last or moment(plan.observed.schedule["metadata"].get("creationTimestamp")) or plan.now
    tick = _tick_looked_at(plan) or plan.cron.latest(since, plan.now)
    if tick is None:
        return (*_tell(plan.observed, plan.before, _described(plan), _READY), _wait(plan))
    return _at_tick(plan, tick)


def _tick_looked_at(plan: _Plan) -> datetime | None:
    """Return the undecided tick whose look is under way: a look may take longer than it is to the next tick."""
    decided = plan.before.get("lastScheduleTime", "")
    looks = [look for look in plan.looks if _tick_text(look) > decided and not is_deleted(look)]
    return min(filter(None, (moment(_tick_text(look)) for look in looks)), default=None)


_READY: Final = Condition(READY, True, "Scheduled", "Ticks are served.")


def _wait(plan: _Plan) -> Requeue:
    following = plan.cron.following(plan.now)
    seconds = (following - plan.now).total_seconds() if following else _LONGEST_WAIT_SECONDS
    return Requeue(min(max(seconds, 1.0), _LONGEST_WAIT_SECONDS))


def _at_tick(plan: _Plan, tick: datetime) -> tuple[Action, ...]:
    name = plan.name_at(tick)
    if any(job["metadata"]["name"] == name for job in plan.jobs):  # a crash, before it was told
        return _conclude(plan, tick, _Verdict(True, "Scheduled", "The job was made."))
    look = next((each for each in plan.looks if each["metadata"]["name"] == _look_name(name)), None)
    if verdict := _obstacle(plan, tick, look):
        return _conclude(plan, tick, verdict)
    if plan.values.get("onDataChange") is None:
        return _conclude(plan, tick, _Verdict(True, "Scheduled", "Every tick makes a job."))
    if look is None:
        return _look_first(plan, tick)
    verdict = _verdict_of(plan, what_was_seen(look, plan.observed.pods))
    if verdict is None:
        told = _tell(plan.observed, plan.before, _described(plan), _while_looking(plan, look))
        return (*told, Requeue(_LOOK_AGAIN_SECONDS))
    return _conclude(plan, tick, verdict)


def _while_looking(plan: _Plan, look: Manifest) -> Condition:
    patience = timedelta(seconds=plan.settings.unschedulable_seconds)
    problem = look_problem(look, plan.observed.pods, now=plan.now, patience=patience)
    if problem is None:
        return _READY
    return Condition(READY, False, problem.reason, f"The look at the data waits. {problem.message}")


def _look_name(job: str) -> str:
    return f"{job}-look"


def _obstacle(plan: _Plan, tick: datetime, look: Manifest | None) -> _Verdict | None:
    deadline = plan.values.get("startingDeadlineSeconds")
    late = plan.now - tick
    if look is None and deadline is not None and late > timedelta(seconds=deadline):
        return _Verdict(
            False,
            "MissedDeadline",
            f"The tick could be served only {late.total_seconds():.0f} s late; startingDeadlineSeconds is {deadline}.",
        )
    if plan.active and plan.values.get("concurrencyPolicy", "Forbid") == "Forbid":
        running = plan.active[0]["metadata"]["name"]
        return _Verdict(
            False, "StillRunning", f"The job {running} has not ended, and concurrencyPolicy is Forbid."
        )
    return None


def _look_first(plan: _Plan, tick: datetime) -> tuple[Action, ...]:
    metadata = {
        **_metadata(plan, _look_name(plan.name_at(tick)), tick),
        "labels": look_labels(plan.name),
    }
    made = render_look(_template_spec(plan), metadata, plan.known_digest, plan.settings)
    told = _tell(plan.observed, plan.before, _described(plan), _READY)
    return (*(Apply(manifest, create=True) for manifest in made), *told, Requeue(_LOOK_AGAIN_SECONDS))


def _template_spec(plan: _Plan) -> JobSpec:
    return JobSpec(
        name=plan.name,
        namespace=plan.observed.schedule["metadata"].get("namespace", ""),
        uid="",
        generation=0,
        values=plan.values["template"].get("spec") or {},
    )


def _verdict_of(plan: _Plan, seen: Seen | None) -> _Verdict | None:
    """Return what a look means, or None while it goes on or its report is not there yet."""
    if seen is None:
        return None
    if seen.report is None:
        patience = timedelta(seconds=plan.settings.report_wait_seconds)
        if seen.at is not None and plan.now - seen.at < patience:
            return None
        why = seen.message or "It left no report."
        return _Verdict(
            True, "LookFailed", f"The data could not be looked at, so the job will say more. {why}"
        )
    known, found = plan.known_digest, seen.report.dataset_digest
    if not known:
        return _Verdict(True, "FirstRun", "No run has succeeded yet.")
    if found == known:
        return _Verdict(
            False, "DataUnchanged", f"The images have the digest of the last successful run, {known[:16]}."
        )
    fraction = seen.report.metrics.get(CHANGED_FRACTION, 1.0)
    least = float(plan.values["onDataChange"].get("minimumChangedFraction", 0))
    words = f"{fraction:.2%} of the images changed; minimumChangedFraction is {least:g}."
    if fraction < least:
        return _Verdict(False, "ChangeTooSmall", words)
    return _Verdict(True, "DataChanged", words)


def _conclude(plan: _Plan, tick: datetime, verdict: _Verdict) -> tuple[Action, ...]:
    name = plan.name_at(tick)
    made: list[Action] = []
    if verdict.ran and not any(job["metadata"]["name"] == name for job in plan.jobs):
        if plan.values.get("concurrencyPolicy") == "Replace":
            made += [_delete(JOB_KIND, job) for job in plan.active]
        made.append(Apply(_job(plan, tick), create=True))
    decision = {
        "time": timestamp(tick),
        "ran": verdict.ran,
        "reason": verdict.reason,
        "message": shortened(verdict.message),
        **({"jobName": name} if verdict.ran else {}),
    }
    changes: Status = {"lastScheduleTime": timestamp(tick), "lastDecision": decision}
    if verdict.ran:
        changes["lastRunTime"] = timestamp(tick)
    told = _tell(plan.observed, plan.before, _described(plan, **changes), _READY)
    event = Event("Normal", verdict.reason, shortened(verdict.message))
    return (*made, *told, event, _wait(plan))


def _job(plan: _Plan, tick: datetime) -> Manifest:
    template = plan.values["template"]
    extra = template.get("metadata") or {}
    metadata = _metadata(plan, plan.name_at(tick), tick)
    metadata["labels"] = {**(extra.get("labels") or {}), SCHEDULE_LABEL: plan.name}
    metadata["annotations"] = {**(extra.get("annotations") or {}), **metadata["annotations"]}
    return {
        "apiVersion": API_VERSION,
        "kind": JOB_KIND,
        "metadata": metadata,
        "spec": template.get("spec") or {},
    }


def _metadata(plan: _Plan, name: str, tick: datetime) -> Manifest:
    metadata = plan.observed.schedule["metadata"]
    return {
        "name": name,
        "namespace": metadata.get("namespace", ""),
        "annotations": {TICK_ANNOTATION: timestamp(tick)},
        "ownerReferences": [owner_reference(SCHEDULE_KIND, plan.name, metadata.get("uid", ""))],
    }


# Tidying up, and telling.


def _tidy(plan: _Plan) -> tuple[Action, ...]:
    """Return the deletion of looks whose tick is decided, and of jobs beyond the history's limits."""
    decided = plan.before.get("lastScheduleTime", "")
    actions: list[Action] = []
    for look in plan.looks:
        if _tick_text(look) <= decided:
            actions += [_delete("Job", look), Delete("ConfigMap", look["metadata"]["name"], _namespace(look))]
    ended = [job for job in plan.jobs if has_ended(status_of(job)) and _tick_text(job) <= decided]
    for succeeded, limit in ((True, "successfulJobsHistoryLimit"), (False, "failedJobsHistoryLimit")):
        kind = sorted((job for job in ended if _succeeded(job) == succeeded), key=_tick_text, reverse=True)
        actions += [
            _delete(JOB_KIND, job) for job in kind[plan.values.get(limit, 3) :] if not is_deleted(job)
        ]
    return tuple(actions)


def _namespace(manifest: Manifest) -> str:
    return str(manifest["metadata"].get("namespace", ""))


def _delete(kind: str, manifest: Manifest) -> Delete:
    return Delete(
        kind, manifest["metadata"]["name"], _namespace(manifest), manifest["metadata"].get("uid", "")
    )


def _described(plan: _Plan, **changes: Any) -> Status:
    following = plan.cron.following(plan.now)
    return {
        **plan.before,
        "active": sorted(job["metadata"]["name"] for job in plan.active),
        "lastDatasetDigest": plan.known_digest,
        "nextScheduleTime": timestamp(following) if following else None,
        **changes,
    }


def _tell(observed: ObservedSchedule, before: Status, after: Status, ready: Condition) -> tuple[Action, ...]:
    generation = observed.schedule["metadata"].get("generation", 0)
    conditions = merged(before.get("conditions", ()), [ready], generation=generation, now=observed.now)
    status = {**after, "conditions": conditions, "observedGeneration": generation}
    status = {name: value for name, value in status.items() if value not in (None, "", [])}
    return (PatchStatus(status),) if status != before else ()
