"""What the controller sees of the cluster, and how it carries out what `reconcile` wants; no decision is made here.

Copies of TransferJobs, schedules, JobSets, Jobs and pods are kept by watches, so that a reconcile reads from memory.
What this process writes goes into the copies at once: it never acts on a state from before its own last write.
"""

from __future__ import annotations

import datetime
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from kubegraft.controller import jobset as names
from kubegraft.controller.actions import Action, Apply, Delete, Event, PatchStatus, Requeue
from kubegraft.controller.api import Api, ApiError
from kubegraft.controller.observed import JOB_LABEL, SCHEDULE_LABEL, Observed, ObservedSchedule
from kubegraft.controller.pruning import prune
from kubegraft.controller.telling import event_object, with_status
from kubegraft.controller.watching import Copies, Object, Watch, place_of
from kubegraft.job_report import Report, latest_report
from kubegraft.reporting.events import log_event

_LOG_LINES: Final = 60
_LOOK_SECONDS: Final = 5.0  # between two looks at the same log, or the same object's events
_MARGIN_SECONDS: Final = 0.1
_LOOKS_PER_SECOND: Final = 20.0  # at logs and events, of all jobs together
_STALE_SECONDS: Final = 0.5
_SLOW_SECONDS: Final = 3.0  # from when on a pod that does not start is asked for why
# What the API server says of a server-side apply with a field that the definition lacks.
_UNDECLARED: Final = re.compile(r"\.status\.(\w+): field not declared in schema")
_INDEX: Final = "batch.kubernetes.io/job-completion-index"
_JOBSET_LABEL: Final = "jobset.sigs.k8s.io/jobset-name"
_CONDITIONS: Final = ("Failed", "Succeeded", "Running", "Admitted")


class Key(NamedTuple):
    """What is reconciled."""

    kind: str
    namespace: str
    name: str


@dataclass(slots=True)
class _Memory:
    """What this process knows of a job beyond the copies.

    Attributes:
        config_map: Metadata of its ConfigMap, once seen; nothing but `reconcile` deletes it.
        refusal: Why the API server refused to make something for it.
        stale: Whether a write met another state than the copies have, so that the API must be asked.
        foreign: Whether the JobSet's name is somebody else's.
        events: What was found last, and when (monotonic seconds).
        reports: By pod: when its log was read, and what was in it.
    """

    config_map: Object | None = None
    refusal: dict[str, str] | None = None
    stale: bool = False
    foreign: bool = False
    events: tuple[tuple[Mapping[str, str], ...], float] = ((), -1e9)
    reports: dict[str, tuple[float, Report | None]] = field(default_factory=dict)


class Allowance:
    """So many calls a second, saved up for one second at most."""

    def __init__(self, per_second: float) -> None:
        self._per_second = self._left = per_second
        self._at = time.monotonic()

    def take(self) -> bool:
        """Return whether one more call is allowed now, and count it."""
        now = time.monotonic()
        self._left = min(self._left + (now - self._at) * self._per_second, self._per_second)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Cluster:
    """The objects of TransferJobs and TransferSchedules in a namespace, or in all.

    Attributes:
        jobs: Copies of TransferJobs.
        schedules: Copies of TransferSchedules.
        watches: What keeps the other copies; each must be run.
    """

    def __init__(self, api: Api, *, namespace: str, notify: Callable[[Key], None]) -> None:
        self._api, self._namespace, self._notify = api, namespace, notify
        self.jobs = Copies("TransferJob", prune=prune, owner_of=_labelled(SCHEDULE_LABEL))
        self.schedules = Copies("TransferSchedule", prune=prune, owner_of=lambda _: "")
        self._jobsets = Copies("JobSet", prune=prune, owner_of=_labelled(JOB_LABEL))
        self._pods = Copies("Pod", prune=prune, owner_of=_labelled(JOB_LABEL))
        self._looks = Copies("Job", prune=prune, owner_of=_labelled(SCHEDULE_LABEL))
        self._look_pods = Copies("Pod", prune=prune, owner_of=_labelled(SCHEDULE_LABEL))
        self._memories: dict[Key, _Memory] = {}
        self._live: set[Key] = set()
        self._allowance = Allowance(_LOOKS_PER_SECOND)
        of_schedules = f"{SCHEDULE_LABEL},!{JOB_LABEL}"
        self.watches = [
            self._watch(self._jobsets, JOB_LABEL, "TransferJob"),
            self._watch(self._pods, JOB_LABEL, "TransferJob"),
            self._watch(self._looks, of_schedules, "TransferSchedule"),
            self._watch(self._look_pods, of_schedules, "TransferSchedule"),
        ]

    def take(self, change: str | None, found: Object) -> None:
        """Take a change of a TransferJob or TransferSchedule that somebody watched: `DELETED`, or any other."""
        key = Key(found["kind"], *place_of(found))
        copies = self._copies(key)
        if change == "DELETED":
            copies.drop(found)
        elif not copies.put(found):
            return
        self._changed(key, found)

    async def look_again(self) -> None:
        """List TransferJobs and TransferSchedules, for changes that no watch told of."""
        for copies in (self.jobs, self.schedules):
            listing = await self._api.list(copies.kind, self._namespace)
            for found in copies.replace(listing.items, listing.version):
                self._changed(Key(copies.kind, *place_of(found)), found)

    async def observe(self, key: Key) -> Observed | ObservedSchedule | None:
        """Return what `reconcile` sees of a TransferJob or TransferSchedule; None if it is gone."""
        found = self._copies(key).get(key.namespace, key.name)
        if found is None:
            self._memories.pop(key, None)
            self._live.discard(key)
            return None
        if key.kind == "TransferSchedule":
            return self._observe_schedule(key, found)
        return await self._observe_job(key, found)

    async def act(
        self, key: Key, observed: Observed | ObservedSchedule, actions: Iterable[Action]
    ) -> float | None:
        """Carry out actions in their order; return after how many seconds to look again, None for not at all.

        Raises:
            ApiError: If a call failed; what comes after it was not done.
        """
        about = observed.job if isinstance(observed, Observed) else observed.schedule
        memory, stale = self._memory(key), False
        waits = [self._look_seconds()] if key in self._live else []
        for action in actions:
            if isinstance(action, Requeue):
                waits.append(action.seconds)
                continue
            try:
                await self._do(memory, about, action)
            except ApiError as error:
                self._remember(key, memory, action, error)
                if not (error.conflict and isinstance(action, Apply) and action.create):
                    raise
                stale = True  # it is there already, which the next look will show
        memory.stale = stale or memory.foreign
        return min([*waits, *((_STALE_SECONDS,) if stale else ())], default=None)

    def is_new(self, key: Key) -> bool:
        """Return whether nothing has been said of an object yet; what is under way can wait for it."""
        found = self._copies(key).get(key.namespace, key.name)
        return found is not None and not found.get("status")

    def count_jobs(self) -> Mapping[str, int]:
        """Return how many TransferJobs there are, by the last of their conditions that is true; `New` for none."""
        return Counter(_condition(job) for job in self.jobs)

    def _watch(self, copies: Copies, selector: str, kind: str) -> Watch:
        def notify(owner: str) -> None:
            self._notify(Key(kind, *owner.split("/", 1)))

        return Watch(self._api, copies, namespace=self._namespace, selector=selector, notify=notify)

    def _copies(self, key: Key) -> Copies:
        return self.jobs if key.kind == "TransferJob" else self.schedules

    def _memory(self, key: Key) -> _Memory:
        return self._memories.setdefault(key, _Memory())

    def _changed(self, key: Key, found: Object) -> None:
        self._notify(key)
        if owner := self._copies(key).owner_of(found):
            self._notify(Key("TransferSchedule", *owner.split("/", 1)))

    # ---- observing

    def _observe_schedule(self, key: Key, schedule: Object) -> ObservedSchedule:
        owner = "/".join(place_of(schedule))
        refusal = self._memory(key).refusal or {}
        return ObservedSchedule(
            schedule=schedule,
            jobs=self.jobs.of(owner),
            looks=self._looks.of(owner),
            pods=self._look_pods.of(owner),
            refusal=refusal.get("message", ""),
            now=datetime.datetime.now(datetime.UTC),
        )

    async def _observe_job(self, key: Key, job: Object) -> Observed:
        memory = self._memory(key)
        jobset = await self._jobset(key, job, memory)
        (self._live.add if jobset and _is_live(jobset) else self._live.discard)(key)
        pods = self._pods.of(f"{key.namespace}/{key.name}")
        return Observed(
            job=job,
            jobset=jobset,
            # Without a JobSet it does not matter: both are made, and what is there already is left.
            config_map=await self._config_map(key, job, memory) if jobset else memory.config_map,
            pods=pods,
            events=await self._events(key, memory, jobset, pods),
            reports=await self._reports(memory, pods),
            now=datetime.datetime.now(datetime.UTC),
        )

    async def _jobset(self, key: Key, job: Object, memory: _Memory) -> Object | None:
        name = names.jobset_name(job)
        if not memory.stale:
            return self._jobsets.get(key.namespace, name)
        found = await self._api.get("JobSet", key.namespace, name)
        memory.foreign = found is not None and not self._jobsets.owner_of(found)
        if found is None or memory.foreign:
            return found
        self._jobsets.put(found)  # the watch has not told of it yet
        return self._jobsets.get(key.namespace, name)

    def _look_seconds(self) -> float:
        """Return when a job that is under way is looked at again: logs and events tell nobody that they grow."""
        return max(_LOOK_SECONDS, len(self._live) / _LOOKS_PER_SECOND) + _MARGIN_SECONDS

    async def _config_map(self, key: Key, job: Object, memory: _Memory) -> Object | None:
        name = names.config_map_name(job)
        known = memory.config_map
        if known is None or known["metadata"]["name"] != name or memory.stale:
            memory.config_map = await self._api.get("ConfigMap", key.namespace, name)
        return memory.config_map

    async def _events(
        self, key: Key, memory: _Memory, jobset: Object | None, pods: tuple[Object, ...]
    ) -> tuple[Mapping[str, str], ...]:
        refusals = (memory.refusal,) if memory.refusal else ()
        about = _puzzling(jobset, pods) if jobset else ()
        if not about:
            return refusals
        found, at = memory.events
        if time.monotonic() - at > _LOOK_SECONDS and self._allowance.take():
            found = tuple([event for one in about for event in await self._events_about(key.namespace, one)])
            memory.events = (found, time.monotonic())
        return refusals + found

    async def _events_about(self, namespace: str, about: tuple[str, str]) -> list[Mapping[str, str]]:
        kind, name = about
        selector = f"involvedObject.kind={kind},involvedObject.name={name},type=Warning"
        listing = await self._api.list("Event", namespace, fieldSelector=selector)
        return [
            {"reason": one.get("reason", ""), "message": one.get("message", ""), "kind": kind, "name": name}
            for one in sorted(listing.items, key=_when)
        ]

    async def _reports(self, memory: _Memory, pods: tuple[Object, ...]) -> dict[str, Report]:
        running = {pod["metadata"]["name"]: pod for pod in pods if _speaks(pod)}
        kept = {name: memory.reports.get(name, (-1e9, None)) for name in running}
        for name, (at, _) in kept.items():
            if time.monotonic() - at > _LOOK_SECONDS and self._allowance.take():
                namespace = running[name]["metadata"]["namespace"]
                text = await self._api.log(namespace, name, tail_lines=_LOG_LINES)
                kept[name] = (time.monotonic(), latest_report(text) or kept[name][1])
        memory.reports = kept
        return {name: report for name, (_, report) in kept.items() if report}

    # ---- acting

    async def _do(self, memory: _Memory, about: Object, action: Action) -> None:
        if isinstance(action, Apply):
            made = await (self._api.create if action.create else self._api.apply)(action.manifest)
            self._keep(memory, {"kind": action.manifest["kind"], **made})
            memory.refusal = None
            if made["kind"] == "TransferJob":  # of a schedule; what the watch tells of it is nothing new then
                self._notify(Key(made["kind"], *place_of(made)))
        elif isinstance(action, Delete):
            await self._api.delete(
                action.kind,
                action.namespace,
                action.name,
                uid=action.uid,
                version=action.resource_version,
            )
            if action.kind == "ConfigMap":
                memory.config_map = None
        elif isinstance(action, PatchStatus):
            self._keep(memory, await self._applied_status(about, action.status))
        elif isinstance(action, Event):
            await self._tell(about, action)

    async def _applied_status(self, about: Object, status: Mapping[str, Any]) -> Object:
        """Apply a status, without fields that the cluster's definition, older than this operator, lacks."""
        known = dict(status)
        while True:
            try:
                return await self._api.apply_status(with_status(about, known))
            except ApiError as error:
                unknown = _UNDECLARED.search(str(error))
                if unknown is None or known.pop(unknown[1], None) is None:
                    raise

    def _keep(self, memory: _Memory, made: Object) -> None:
        if made["kind"] == "ConfigMap":
            memory.config_map = {"metadata": made["metadata"], "data": made.get("data", {})}
        for copies in (self.jobs, self.schedules, self._jobsets, self._looks):
            if copies.kind == made["kind"]:
                copies.put(made)

    async def _tell(self, about: Object, event: Event) -> None:
        """Make an event; one with the same words is there already after a crash, and is enough."""
        try:
            await self._api.create(event_object(about, event))
        except ApiError as error:
            if not (error.conflict or error.refused):
                raise
            if error.refused:  # people lose a line; the conditions say the same
                log_event("operator", "warning", text=f"no event: {error}")

    def _remember(self, key: Key, memory: _Memory, action: Action, error: ApiError) -> None:
        memory.stale = memory.stale or error.conflict
        if isinstance(action, Apply) and error.refused:
            made = action.manifest
            memory.refusal = {
                "reason": "ApplyFailed",
                "message": str(error)[:1024],
                "kind": made["kind"],
                "name": made["metadata"]["name"],
            }
        if isinstance(action, PatchStatus) and error.missing:
            found = self._copies(key).get(key.namespace, key.name)
            if found:
                self._copies(key).drop(found)


def _labelled(label: str) -> Callable[[Object], str]:
    def owner_of(found: Object) -> str:
        name = (found["metadata"].get("labels") or {}).get(label)
        return f"{found['metadata'].get('namespace', '')}/{name}" if name else ""

    return owner_of


def _condition(job: Object) -> str:
    true = {
        condition["type"]
        for condition in (job.get("status") or {}).get("conditions", ())
        if condition.get("status") == "True"
    }
    return next((condition for condition in _CONDITIONS if condition in true), "New")


def _speaks(pod: Object) -> bool:
    """Whether a pod runs that says how far it is: of several workers, the first."""
    index = (pod["metadata"].get("annotations") or {}).get(_INDEX, "0")
    return index == "0" and (pod.get("status") or {}).get("phase") == "Running"


def _is_live(jobset: Object) -> bool:
    """Whether pods of a JobSet run, or should."""
    return not (jobset["spec"].get("suspend") or (jobset.get("status") or {}).get("terminalState"))


def _puzzling(jobset: Object, pods: tuple[Object, ...]) -> tuple[tuple[str, str], ...]:
    """Return kind and name of what may have events that say why nothing runs."""
    if not _is_live(jobset):
        return ()
    name = jobset["metadata"]["name"]
    own = [pod for pod in pods if (pod["metadata"].get("labels") or {}).get(_JOBSET_LABEL) == name]
    own = [pod for pod in own if pod["status"].get("phase") in ("Pending", "Running")]
    if not own and _age_seconds(jobset) > _SLOW_SECONDS:
        jobs = (("Job", f"{name}-{one['name']}-0") for one in jobset["spec"].get("replicatedJobs", ()))
        return (("JobSet", name), *jobs)
    return tuple(
        ("Pod", pod["metadata"]["name"])
        for pod in own
        if pod["status"].get("phase") == "Pending" and _age_seconds(pod) > _SLOW_SECONDS
    )[:4]


def _age_seconds(found: Object) -> float:
    created = datetime.datetime.fromisoformat(found["metadata"]["creationTimestamp"])
    return (datetime.datetime.now(datetime.UTC) - created).total_seconds()


def _when(event: Object) -> str:
    return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"])
