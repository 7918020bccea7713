"""One reconciliation's look at a TransferJob, and how its status is told; the parts of `reconcile` share it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from kubegraft.controller.actions import Action, Delete, Event, PatchStatus
from kubegraft.controller.conditions import ADMITTED, FAILED, SUCCEEDED, Condition, find, holds, moment
from kubegraft.controller.job_pods import JobPod, read_pods
from kubegraft.controller.jobset import KIND, jobset_name
from kubegraft.controller.observed import Observed
from kubegraft.controller.settings import Settings
from kubegraft.controller.spec import JobSpec
from kubegraft.controller.status import Facts, Status, changed_conditions, next_status, worth_writing
from kubegraft.rendering.pods import Manifest

# Fields of the status that keep what of a count is of JobSets before the present one.
EARLIER: Final = {"restarts": "earlierRestarts", "uncountedRestarts": "earlierUncountedRestarts"}


@dataclass(frozen=True, slots=True)
class View:
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
        """The time."""
        return self.observed.now

    @property
    def jobset_uid(self) -> str:
        """The JobSet's uid; "" for none."""
        return str(self.jobset["metadata"].get("uid", "")) if self.jobset else ""

    @property
    def restarts(self) -> int:
        """Restarts of the job, by this JobSet and those before."""
        return self._earlier("restarts") + int(status_of(self.jobset).get("restarts", 0))

    def _earlier(self, name: str) -> int:
        """Return a count of restarts by the JobSets before this one, which a queue or its change replaced."""
        seen = self.before.get("jobSetUid", "")
        if seen and self.jobset_uid and self.jobset_uid != seen:
            return int(self.before.get(name, 0))
        return int(self.before.get(EARLIER[name], 0))

    @property
    def uncounted(self) -> int:
        """Those of them that did not count against `maxRestarts`."""
        found = status_of(self.jobset)
        here = int(found.get("restarts", 0)) - int(found.get("restartsCountTowardsMax", 0))
        return self._earlier("uncountedRestarts") + here

    def facts(self) -> Facts:
        """Return what the status follows from."""
        return Facts(
            spec=self.spec,
            before=self.before,
            pods=self.pods,
            left=self.left,
            restarts=self.restarts,
            uncounted=self.uncounted,
            earlier={EARLIER[name]: self._earlier(name) for name in EARLIER},
            jobset_uid=self.jobset_uid,
            jobset_name=jobset_name(self.observed.job),
            now=self.now,
        )


def look(observed: Observed, settings: Settings) -> View:
    """Return what was observed, read once."""
    own = f"{jobset_name(observed.job)}-"  # not those of a former job of this name
    named = [pod for pod in observed.pods if pod["metadata"]["name"].startswith(own)]
    pods = read_pods(named, observed.reports)
    attempt = int(status_of(observed.jobset).get("restarts", 0))
    return View(
        observed=observed,
        settings=settings,
        spec=JobSpec.of(observed.job),
        before=observed.job.get("status") or {},
        jobset=observed.jobset,
        pods=tuple(pod for pod in pods if pod.attempt == attempt),
        left=tuple(pod for pod in pods if pod.attempt != attempt),
    )


def status_of(manifest: Manifest | None) -> Manifest:
    """Return an object's status, empty if there is none."""
    return (manifest or {}).get("status") or {}


def is_deleted(manifest: Manifest) -> bool:
    """Return whether an object is being deleted."""
    return "deletionTimestamp" in manifest["metadata"]


def has_ended(status: Status) -> bool:
    """Return whether a TransferJob has succeeded or failed, by its status."""
    conditions = status.get("conditions", ())
    return holds(conditions, SUCCEEDED) or holds(conditions, FAILED)


def is_owned(manifest: Manifest, uid: str) -> bool:
    """Return whether an object was made for the one with this uid."""
    owners = manifest["metadata"].get("ownerReferences") or ()
    return any(owner.get("uid") == uid for owner in owners)


def is_suspended(jobset: Manifest) -> bool:
    """Return whether a JobSet is to be suspended."""
    return bool((jobset.get("spec") or {}).get("suspend", False))


def admitted(spec: JobSpec) -> Condition:
    """Return what is told of a job whose pods may start."""
    if spec.queue:
        return Condition(
            ADMITTED, True, "AdmittedByQueue", f"Kueue admitted the job from the queue {spec.queue}."
        )
    return Condition(ADMITTED, True, "Started", "The job's JobSet was made.")


def admitted_at(view: View, jobset: Manifest) -> datetime:
    """Return when the pods were let start, as near as can be known."""
    suspended = find(status_of(jobset).get("conditions") or (), "Suspended")
    if suspended.get("status") == "True":
        return view.now  # let go, and JobSet has not taken note of it yet
    resumed = suspended.get("lastTransitionTime")
    return moment(resumed) or moment(jobset["metadata"].get("creationTimestamp")) or view.now


def delete_jobset(jobset: Manifest) -> Delete:
    """Return the deletion of the very JobSet that was read, and only if it is unchanged."""
    metadata = jobset["metadata"]
    return Delete(
        KIND,
        metadata["name"],
        metadata.get("namespace", ""),
        metadata.get("uid", ""),
        metadata.get("resourceVersion", ""),
    )


def tell(view: View, conditions: list[Condition], **changes: Any) -> tuple[Action, ...]:
    """Return the write of the status, and events for people, if anything worth it changed."""
    after = next_status(view.facts(), conditions, **changes)
    if not worth_writing(view.before, after):
        return ()
    events = [
        Event(kind, condition["reason"], condition["message"])
        for kind, condition in changed_conditions(view.before, after)
    ]
    return (PatchStatus(after), *events)
