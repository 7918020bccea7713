"""A cluster in memory: an API with resource versions, JobSets and pods that fare as it is written, people, Kueue.

The JobSets follow the policies of their own manifests (pod failure policy, failure policy, dependsOn), as JobSet 0.8.2
and Kubernetes 1.34 read them. What becomes of a pod depends on its part and attempt alone (`Fate`), so that a job must
end the same way however often its operator crashes, reads old objects or misses events.
"""

import dataclasses
import functools
import json
import random
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from kubegraft.controller.actions import Action, Apply, Delete, Event, PatchStatus, Requeue
from kubegraft.controller.conditions import timestamp
from kubegraft.controller.jobset import (
    ATTEMPT_LABEL,
    QUEUE_LABEL,
    ROLE_LABEL,
    config_map_name,
    jobset_name,
)
from kubegraft.controller.observed import JOB_LABEL, Observed
from kubegraft.controller.reconcile import reconcile
from kubegraft.controller.settings import Settings
from kubegraft.job_report import Report

START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
SETTINGS = Settings(image="kubegraft-train:1")
# What an operator's copies may lag behind, and, longer than that, how long it waits for last reports.
LAG = timedelta(seconds=45)
PATIENT = Settings(image="kubegraft-train:1", report_wait_seconds=60)
STAGES = {"prepare": ("ingest",), "train": ("train_head", "fine_tune"), "finish": ("evaluate", "export")}
METRICS = {
    "prepare": {},
    "train": {"validation_accuracy": 0.98},
    "finish": {"test_accuracy": 0.97, "test_accuracy_low": 0.95, "test_accuracy_high": 0.99},
}
Manifest = dict[str, Any]
Key = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Fate:
    """How a pod ends: its exit code, Kubernetes' word for it, the error in its report; `hangs` never ends.

    What `vanishes` leaves no object, as a pod deleted by force; its Job has counted it nevertheless.
    """

    exit_code: int = 0
    killed_by: str = "Error"
    error: str = ""
    message: str = ""
    disrupted: bool = False
    hangs: bool = False
    vanishes: bool = False


WELL = Fate(killed_by="Completed")
CRASH = Fate(exit_code=1)
OUT_OF_MEMORY = Fate(exit_code=137, killed_by="OOMKilled")
BAD_CONFIG = Fate(
    exit_code=2, error="ConfigError", message="`backbone` must be known. Received: backbone='x'."
)
BAD_DATA = Fate(exit_code=3, error="DataError", message="`source` has no images.")
DIVERGED = Fate(exit_code=5, error="DivergenceError", message="The loss is not a number.")
FULL_DISK = Fate(exit_code=8, error="StorageError", message="No space left on device: '/artifacts/signs'.")
PEER_LOST = Fate(exit_code=75)
KILLED = Fate(exit_code=137)
VANISHED = Fate(exit_code=137, vanishes=True)
NODE_LOST = Fate(exit_code=143, disrupted=True)
HANGS = Fate(hangs=True)


def condition(kind: str, status: str, reason: str, now: datetime, message: str = "") -> Manifest:
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": timestamp(now),
    }


def transfer_job(name: str = "signs", **spec: Any) -> Manifest:
    return {
        "apiVersion": "kubegraft.dev/v1alpha1",
        "kind": "TransferJob",
        "metadata": {"name": name, "namespace": "team", "uid": f"uid-{name}", "generation": 1},
        "spec": {"suspend": False, "maxRestarts": 2, **spec},
    }


def pod_of(
    jobset: str, role: str, *, index: int = 0, attempt: int = 0, job: str = "signs", suffix: str = ""
) -> Manifest:
    """Return a pod that waits for its node."""
    name = f"{jobset}-{role}-0-{index}-a{attempt}{suffix}"
    labels = {JOB_LABEL: job, ROLE_LABEL: role, ATTEMPT_LABEL: str(attempt)}
    limits = {"memory": "8Gi"}
    return {
        "metadata": {"name": name, "namespace": "team", "labels": labels},
        "spec": {"containers": [{"name": "kubegraft", "image": "image:1", "resources": {"limits": limits}}]},
        "status": {"phase": "Pending"},
    }


def running(pod: Manifest, now: datetime) -> Manifest:
    state = {"running": {"startedAt": timestamp(now)}}
    status = {"phase": "Running", "containerStatuses": [{"name": "kubegraft", "state": state}]}
    return {**pod, "status": status, "spec": {**pod["spec"], "nodeName": "node-1"}}


def ended(pod: Manifest, fate: Fate, now: datetime, report: Report | None = None) -> Manifest:
    statuses = pod["status"].get("containerStatuses") or [{"state": {}}]
    started = statuses[0]["state"].get("running", {}).get("startedAt", timestamp(now))
    terminated = {
        "exitCode": fate.exit_code,
        "reason": fate.killed_by,
        "startedAt": started,
        "finishedAt": timestamp(now),
    }
    if report:
        terminated["message"] = report.to_json()
    status: Manifest = {
        "phase": "Failed" if fate.exit_code else "Succeeded",
        "containerStatuses": [{"name": "kubegraft", "state": {"terminated": terminated}}],
    }
    if fate.disrupted:
        status["conditions"] = [{"type": "DisruptionTarget", "status": "True"}]
    return {**pod, "status": status}


def last_report(role: str, fate: Fate) -> Report | None:
    """Return what a pod leaves: nothing, if it was killed."""
    if fate.exit_code == KILLED.exit_code:
        return None
    if fate.exit_code:
        return Report(stage=STAGES[role][0], error=fate.error, message=fate.message, exit_code=fate.exit_code)
    return Report(
        stage=STAGES[role][-1],
        progress=100,
        metrics=METRICS[role],
        done=True,
        dataset_digest="d" * 64 if role == "prepare" else "",
        model_uri="gs://models/signs" if role == "finish" else "",
    )


class Conflict(Exception):
    """409: a precondition does not hold."""


@dataclasses.dataclass
class World:
    """Objects by (kind, name), replaced and never changed in place, so that a copy of the dict is a snapshot.

    `snapshots` are what was, each with the time at which it was no longer so.
    """

    fate: Callable[[str, int, int], Fate] = lambda role, attempt, index: WELL
    now: datetime = START
    objects: dict[Key, Manifest] = dataclasses.field(default_factory=dict)
    logs: dict[str, Report] = dataclasses.field(default_factory=dict)
    snapshots: list[tuple[datetime, dict[Key, Manifest]]] = dataclasses.field(default_factory=list)
    events: list[Event] = dataclasses.field(default_factory=list)
    vanished: set[str] = dataclasses.field(
        default_factory=set
    )  # parts of the present attempt that lost a pod
    writes: int = 0
    version: int = 0

    # The API.

    def _remember(self) -> None:
        self.snapshots.append((self.now, dict(self.objects)))
        del self.snapshots[:-24]

    def put(self, manifest: Manifest) -> None:
        self._remember()
        self.version += 1
        kind, metadata = manifest.get("kind", "Pod"), manifest["metadata"]
        version = str(self.version)
        self.objects[kind, metadata["name"]] = {
            **manifest,
            "metadata": {"uid": f"uid-{version}", **metadata, "resourceVersion": version},
        }

    def get(self, kind: str) -> Manifest | None:
        return next((value for (found, _), value in self.objects.items() if found == kind), None)

    def of_kind(self, kind: str) -> list[Manifest]:
        return [value for (found, _), value in self.objects.items() if found == kind]

    def remove(self, key: Key) -> None:
        self._remember()
        self.objects.pop(key, None)

    def carry_out(self, action: Action, job: Manifest) -> None:
        """Do what the operator wants.

        Raises:
            Conflict: If a precondition does not hold.
        """
        if isinstance(action, Apply):
            self._apply(action)
        elif isinstance(action, Delete):
            self._delete(action)
        elif isinstance(action, PatchStatus):
            self._patch_status(action, job)
        elif isinstance(action, Event):
            self.events.append(action)

    def _apply(self, action: Apply) -> None:
        manifest = action.manifest
        key = (manifest["kind"], manifest["metadata"]["name"])
        found = self.objects.get(key)
        if action.create and found is not None:
            return  # AlreadyExists: the read was stale
        self._check(found, manifest["metadata"])
        if found is None:
            owner = manifest["metadata"]["ownerReferences"][0]
            assert owner["controller"]
            if ("TransferJob", owner["name"]) not in self.objects:
                return  # the garbage collector would take it at once
            metadata = {**manifest["metadata"], "creationTimestamp": timestamp(self.now)}
            self.put({**manifest, "metadata": metadata})
        else:
            assert set(manifest["spec"]) == {"suspend"}, "all else is immutable"
            assert QUEUE_LABEL not in found["metadata"]["labels"], "whether it is suspended is Kueue's to say"
            self.put({**found, "spec": {**found["spec"], **manifest["spec"]}})
        self.writes += 1
        owners = [each["metadata"]["ownerReferences"][0]["uid"] for each in self.of_kind("JobSet")]
        assert len(owners) == len(set(owners)), "two JobSets of one job"

    def _check(self, found: Manifest | None, metadata: Manifest) -> None:
        for name in ("uid", "resourceVersion"):
            if metadata.get(name) and (found is None or found["metadata"][name] != metadata[name]):
                raise Conflict(name)

    def _delete(self, action: Delete) -> None:
        key = (action.kind, action.name)
        found = self.objects.get(key)
        if found is None:
            return
        self._check(found, {"uid": action.uid, "resourceVersion": action.resource_version})
        self.writes += 1
        if action.kind == "JobSet":  # in the foreground: its pods go first
            self.put({**found, "metadata": {**found["metadata"], "deletionTimestamp": timestamp(self.now)}})
        else:
            self.remove(key)
            self._collect_garbage()

    def _collect_garbage(self) -> None:
        uids = {each["metadata"]["uid"] for each in self.objects.values()}
        for key, value in list(self.objects.items()):
            owners = value["metadata"].get("ownerReferences") or ()
            if owners and not any(owner["uid"] in uids for owner in owners):
                self.remove(key)
        if not self.get("JobSet"):
            for key in [key for key in self.objects if key[0] == "Pod"]:
                self.remove(key)

    def _patch_status(self, action: PatchStatus, job: Manifest) -> None:
        found = self.objects.get(("TransferJob", job["metadata"]["name"]))
        self._check(found, {"resourceVersion": job["metadata"]["resourceVersion"]})
        assert found is not None
        before = found.get("status") or {}
        assert before != action.status, "a write that changes nothing"
        for old in before.get("conditions", ()):
            new = next(each for each in action.status["conditions"] if each["type"] == old["type"])
            changed = new["status"] != old["status"]
            assert changed or new["lastTransitionTime"] == old["lastTransitionTime"]
            assert not (old["type"] in ("Succeeded", "Failed") and changed), "an end is for ever"
        self.put({**found, "status": json.loads(json.dumps(action.status))})
        self.writes += 1

    # People and Kueue.

    def change_spec(self, **changes: Any) -> None:
        job = self.get("TransferJob")
        if job is not None:
            metadata = {**job["metadata"], "generation": job["metadata"]["generation"] + 1}
            self.put({**job, "metadata": metadata, "spec": {**job["spec"], **changes}})

    def admit(self) -> None:
        """Let go what waits in a queue, as Kueue does."""
        for jobset in self.of_kind("JobSet"):
            if QUEUE_LABEL in jobset["metadata"]["labels"] and jobset["spec"]["suspend"]:
                self.put({**jobset, "spec": {**jobset["spec"], "suspend": False}})

    # JobSets, Jobs and pods: one small step at a time.

    def step(self, seconds: float = 5) -> None:
        self.now += timedelta(seconds=seconds)
        for jobset in self.of_kind("JobSet"):
            self._step_jobset(jobset)

    def _pods(self) -> list[Manifest]:
        return self.of_kind("Pod")

    def _step_jobset(self, jobset: Manifest) -> None:
        name = jobset["metadata"]["name"]
        if "deletionTimestamp" in jobset["metadata"]:
            if not self._drop_pods(lambda pod: True):
                self.remove(("JobSet", name))
            return
        status = jobset.get("status") or {}
        if status.get("terminalState"):
            return
        attempt = status.get("restarts", 0)
        if self._drop_pods(lambda pod: pod["metadata"]["labels"][ATTEMPT_LABEL] != str(attempt)):
            return
        if jobset["spec"]["suspend"]:
            self._suspend(jobset, status)
        elif self._resume(jobset, status):
            self._step_roles(jobset, status, attempt)

    def _drop_pods(self, applies: Callable[[Manifest], bool]) -> bool:
        doomed = [pod["metadata"]["name"] for pod in self._pods() if applies(pod)]
        for name in doomed:
            self.remove(("Pod", name))
            self.logs.pop(name, None)
        return bool(doomed)

    def _suspend(self, jobset: Manifest, status: Manifest) -> None:
        self._drop_pods(lambda pod: pod["status"]["phase"] in ("Pending", "Running"))
        self._set_suspended(jobset, status, "True", "SuspendedJobs")

    def _set_suspended(self, jobset: Manifest, status: Manifest, value: str, reason: str) -> None:
        conditions = status.get("conditions", [])
        old = next((each for each in conditions if each["type"] == "Suspended"), None)
        if (old or {"status": "False"})["status"] == value:
            return
        rest = [each for each in conditions if each["type"] != "Suspended"]
        made = condition("Suspended", value, reason, self.now)
        self.put({**jobset, "status": {**status, "conditions": [*rest, made]}})

    def _resume(self, jobset: Manifest, status: Manifest) -> bool:
        """Return whether it was not suspended before; else make that known."""
        before = self.version
        self._set_suspended(jobset, status, "False", "ResumeJobs")
        return self.version == before

    def _step_roles(self, jobset: Manifest, status: Manifest, attempt: int) -> None:
        for role_job in jobset["spec"]["replicatedJobs"]:
            role, wanted = role_job["name"], role_job["template"]["spec"]["completions"]
            pods = [pod for pod in self._pods() if pod["metadata"]["labels"][ROLE_LABEL] == role]
            if sum(pod["status"]["phase"] == "Succeeded" for pod in pods) == wanted:
                continue
            self._step_job(jobset, status, role_job, pods, attempt)
            return
        done = condition("Completed", "True", "AllJobsCompleted", self.now)
        self._terminate(jobset, status, "Completed", done)

    def _terminate(self, jobset: Manifest, status: Manifest, state: str, made: Manifest) -> None:
        conditions = [*status.get("conditions", []), made]
        self.put({**jobset, "status": {**status, "terminalState": state, "conditions": conditions}})
        self._drop_pods(lambda pod: pod["status"]["phase"] in ("Pending", "Running"))

    def _step_job(
        self, jobset: Manifest, status: Manifest, role_job: Manifest, pods: list[Manifest], attempt: int
    ) -> None:
        role, name = role_job["name"], jobset["metadata"]["name"]
        live = [pod for pod in pods if pod["status"]["phase"] != "Failed"]
        if not live:
            suffix = f"-r{len(pods)}" if pods else ""  # a replacement of pods whose failure was ignored
            for index in range(role_job["template"]["spec"]["completions"]):
                self.put(pod_of(name, role, index=index, attempt=attempt, suffix=suffix))
            return
        for pod in live:
            self._step_pod(pod, role, attempt, replaced=len(pods) - len(live))
        if reason := self._job_failure(role_job, role):
            self._fail_job(self.objects["JobSet", name], status, role, reason)

    def _step_pod(self, pod: Manifest, role: str, attempt: int, replaced: int) -> None:
        name, phase = pod["metadata"]["name"], pod["status"]["phase"]
        if phase == "Pending":
            self.put(running(pod, self.now))
            self.logs[name] = Report(stage=STAGES[role][0], progress=0)
        elif phase == "Running":
            index = int(name.split("-0-")[1].split("-")[0])
            fate = self.fate(role, attempt, index) if not replaced else WELL
            if self.logs[name].progress == 0:
                self.logs[name] = Report(stage=STAGES[role][-1], progress=50, metrics=METRICS[role])
            elif fate.vanishes:
                self.remove(("Pod", name))
                self.logs.pop(name)
                self.vanished.add(role)
            elif not fate.hangs:
                self.put(ended(pod, fate, self.now, last_report(role, fate)))
                self.logs.pop(name)

    def _job_failure(self, role_job: Manifest, role: str) -> str:
        """Return why the Job fails by its own pod failure policy and backoff limit, or ""."""
        counted = int(role in self.vanished)
        for pod in self._pods():
            labels = pod["metadata"]["labels"]
            if labels[ROLE_LABEL] != role or pod["status"]["phase"] != "Failed":
                continue
            action = _action(role_job["template"]["spec"]["podFailurePolicy"]["rules"], pod)
            if action == "FailJob":
                return "PodFailurePolicy"
            counted += action != "Ignore"
        return "BackoffLimitExceeded" if counted > role_job["template"]["spec"]["backoffLimit"] else ""

    def _fail_job(self, jobset: Manifest, status: Manifest, role: str, reason: str) -> None:
        policy = jobset["spec"]["failurePolicy"]
        self.vanished.clear()
        action = next(
            (
                rule["action"]
                for rule in policy["rules"]
                if reason in rule["onJobFailureReasons"] and role in rule["targetReplicatedJobs"]
            ),
            "RestartJobSet",
        )
        counted = status.get("restartsCountTowardsMax", 0)
        words = f"(first failed job: {jobset['metadata']['name']}-{role}-0)"
        if action == "FailJobSet":
            made = condition("Failed", "True", "FailJobSetFailurePolicyAction", self.now, f"applied {words}")
            return self._terminate(jobset, status, "Failed", made)
        if action == "RestartJobSet" and counted >= policy["maxRestarts"]:
            made = condition(
                "Failed", "True", "ReachedMaxRestarts", self.now, f"max number of restarts {words}"
            )
            return self._terminate(jobset, status, "Failed", made)
        counted += action == "RestartJobSet"
        restarts = status.get("restarts", 0) + 1
        self.put({**jobset, "status": {**status, "restarts": restarts, "restartsCountTowardsMax": counted}})
        return None


def _action(rules: list[Manifest], pod: Manifest) -> str:
    terminated = pod["status"]["containerStatuses"][0]["state"]["terminated"]
    conditions = {each["type"] for each in pod["status"].get("conditions", ())}
    for rule in rules:
        by_code = terminated["exitCode"] in rule.get("onExitCodes", {}).get("values", ())
        if by_code or conditions & {each["type"] for each in rule.get("onPodConditions", ())}:
            return str(rule["action"])
    return "Count"


# The operator, well or perturbed.


def observe(world: World, view_of: Callable[[str], Mapping[Key, Manifest]]) -> Observed | None:
    """Return what an operator sees that reads each kind of object from a snapshot of its own."""
    found = next(
        (value for (kind, _), value in view_of("TransferJob").items() if kind == "TransferJob"), None
    )
    if found is None:
        return None
    return Observed(
        job=found,
        jobset=view_of("JobSet").get(("JobSet", jobset_name(found))),
        config_map=view_of("ConfigMap").get(("ConfigMap", config_map_name(found))),
        pods=tuple(value for (kind, _), value in view_of("Pod").items() if kind == "Pod"),
        reports=dict(world.logs),
        now=world.now,
    )


def operate(world: World, observed: Observed | None, crash_after: int | None = None) -> tuple[Action, ...]:
    """Reconcile once; return the actions that were wanted besides waiting.

    Args:
        world: Where they are carried out.
        observed: What is seen.
        crash_after: How many actions are done before the operator dies; None for all.
    """
    if observed is None:
        return ()
    actions = tuple(each for each in reconcile(observed, PATIENT) if not isinstance(each, Requeue))
    for action in actions[:crash_after]:
        try:
            world.carry_out(action, observed.job)
        except Conflict:
            break
    return actions


def operate_fresh(world: World) -> tuple[Action, ...]:
    return operate(world, observe(world, lambda kind: world.objects))


def operate_perturbed(world: World, rng: random.Random) -> None:
    """Reconcile on what may be old, and maybe crash in the middle."""
    old = [snapshot for until, snapshot in world.snapshots if world.now - until < LAG] or [world.objects]
    views = [world.objects, world.objects, *rng.choices(old, k=2)]
    observed = observe(world, lambda kind: rng.choice(views))
    operate(world, observed, rng.choice((None, None, 0, 1, 2, 3)))


def settle(world: World, steps: int = 400) -> None:
    """Let the world go on, with an operator that is well, until nothing is left to do."""
    quiet = 0
    for _ in range(steps):
        world.admit()
        world.step()
        quiet = 0 if operate_fresh(world) else quiet + 1
        if quiet > _longest_pause(world) and not _goes_on(world):
            return
    raise AssertionError("the world never comes to rest")


def _longest_pause(world: World) -> int:
    """Return the steps after which nothing more can come: longer than any time to live."""
    job = world.get("TransferJob")
    return 7 if job and "ttlSecondsAfterFinished" in job["spec"] else 2


def _goes_on(world: World) -> bool:
    job = world.get("TransferJob")
    conditions = (job or {}).get("status", {}).get("conditions", ())
    return job is not None and not any(
        each["type"] in ("Succeeded", "Failed") and each["status"] == "True" for each in conditions
    )


def statuses(conditions: list[Manifest]) -> Iterator[tuple[str, str, str, str]]:
    for each in sorted(conditions, key=lambda each: str(each["type"])):
        yield each["type"], each["status"], each["reason"], each["message"]


@functools.cache
def fate_table(fates: tuple[tuple[str, int, Fate], ...]) -> Callable[[str, int, int], Fate]:
    """Return the fates of pods: (part, attempt or -1 for every one, what becomes of its first pod)."""

    def fate(role: str, attempt: int, index: int) -> Fate:
        for wanted, at, found in fates:
            if role == wanted and at in (attempt, -1):
                return HANGS if found.exit_code and index > 0 else found  # until it notices, seconds later
        return WELL

    return fate
