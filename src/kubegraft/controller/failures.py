"""What went wrong, so that a person understands it within a minute: a reason, and a message that says how to fix it.

Two kinds: a pod that ended, and a pod that does not start. The first may be the end of the job (`reconcile` decides),
the second may resolve itself and is only told.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from kubegraft.controller.job_pods import JobPod
from kubegraft.controller.jobset import (
    AGAIN,
    KILLED,
    STOPPED,
    TRAIN,
    final_exit_codes,
    program_exit_codes,
)
from kubegraft.controller.status_schema import MAX_ENDS, MAX_STALLED


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong.

    Attributes:
        reason: CamelCase.
        message: For people.
    """

    reason: str
    message: str


NAME_CONFLICT: Final = "NameConflict"
DEADLINE_EXCEEDED: Final = "DeadlineExceeded"
TOO_MANY_RESTARTS: Final = "TooManyRestarts"
CONFIG_REJECTED: Final = "ConfigRejected"
OUT_OF_MEMORY: Final = "OutOfMemory"
DISK_FULL: Final = "DiskFull"
CRASHED: Final = "Crashed"
NO_PROGRESS: Final = "NoProgress"
WAS_KILLED: Final = "Killed"
INTERRUPTED: Final = "Interrupted"

_FINAL: Final = final_exit_codes()
_OWN: Final = program_exit_codes()
_MAX_END: Final = 160
_MAX_LISTED: Final = 3
_BY_ERROR: Final = {
    "ConfigError": CONFIG_REJECTED,
    "DataError": "DataRejected",
    "ModelError": "ModelRejected",
    "WeightsError": "WeightsRejected",
    "TrainingError": "TrainingFailed",
    "DivergenceError": "TrainingDiverged",
    "EvaluationError": "EvaluationFailed",
    "ExportError": "ExportFailed",
    "StorageError": "StorageFailed",
    "EnvironmentFault": "EnvironmentUnfit",
}
_BY_EXIT_CODE: Final = {
    2: CONFIG_REJECTED,
    3: "DataRejected",
    4: "ModelRejected",
    5: "TrainingFailed",
    6: "EvaluationFailed",
    7: "ExportFailed",
    8: "StorageFailed",
    9: "EnvironmentUnfit",
}
_NO_SPACE: Final = re.compile(
    r"no space left|disk is full|disk quota exceeded|ephemeral|DiskPressure", re.IGNORECASE
)
_IMAGE: Final = frozenset(
    {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"}
)
_CONTAINER_CONFIG: Final = frozenset(
    {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}
)
_MOUNT: Final = frozenset({"FailedMount", "FailedAttachVolume"})
_CREATION: Final = frozenset(
    {"FailedCreate", "JobCreationFailed", "HeadlessServiceCreationFailed", "ApplyFailed"}
)
_STUCK: Final = timedelta(seconds=60)


def explain_end(pod: JobPod) -> Failure:
    """Return why a pod failed."""
    if _out_of_memory(pod):
        limit = f"its limit of {pod.memory}" if pod.memory else "its node had, without a limit,"
        return Failure(
            OUT_OF_MEMORY,
            f"Pod {pod.name} needed more memory than {limit} and was killed. Raise `resources.limits.memory`, or lower "
            "`batch_size` or `input_size`, and create the job anew.",
        )
    said = _said(pod)
    if _NO_SPACE.search(said):
        return Failure(
            DISK_FULL,
            f"Pod {pod.name} ran out of disk space: {said} Enlarge the volume of `artifacts.claim` or delete what is "
            "no longer needed there; for the pod's own disk give `resources.limits` more ephemeral-storage.",
        )
    if pod.reason == "Evicted":
        return Failure("Evicted", f"Pod {pod.name} was evicted from node {pod.node}: {said}")
    return _by_exit(pod, said)


def _out_of_memory(pod: JobPod) -> bool:
    """Return whether a pod died for want of memory; one that lost a child only, and went on to its end, did not."""
    return pod.failed and pod.killed_by == "OOMKilled"


def _said(pod: JobPod) -> str:
    if pod.report and pod.ended and pod.report.message:
        return pod.report.message
    return pod.message


def _by_exit(pod: JobPod, said: str) -> Failure:
    if pod.exit_code in (AGAIN, STOPPED):
        return Failure(
            INTERRUPTED, f"Pod {pod.name} was interrupted (exit code {pod.exit_code}) and can go on."
        )
    if pod.exit_code == KILLED:
        return Failure(
            WAS_KILLED,
            f"Pod {pod.name} was killed (SIGKILL, exit code {KILLED}), by its node or by somebody. {said}".rstrip(),
        )
    error = pod.report.error if pod.report and pod.ended else ""
    reason = _BY_ERROR.get(error) or _BY_EXIT_CODE.get(pod.exit_code or 0, CRASHED)
    if said:
        return Failure(reason, f"{said} (pod {pod.name}, exit code {pod.exit_code})")
    return Failure(
        reason,
        f"Pod {pod.name} ended with exit code {pod.exit_code}, {pod.killed_by or pod.reason or 'without a reason'}. "
        f"`kubectl logs {pod.name}` may say more; docs/errors.md explains the code.",
    )


def culprit(pods: Iterable[JobPod]) -> JobPod | None:
    """Return the failed pod that explains most: those that stop because another did explain nothing."""
    failed = [pod for pod in pods if pod.failed]
    return min(failed, key=lambda pod: (_rank(pod), pod.name), default=None)


def explains(pod: JobPod) -> bool:
    """Return whether a failed pod failed by itself, and not since another pod or its node did."""
    return _rank(pod) < len(_RANKS)


_RANKS: Final[tuple[Callable[[JobPod], bool], ...]] = (
    lambda pod: pod.exit_code in _FINAL,
    _out_of_memory,
    lambda pod: bool(_NO_SPACE.search(_said(pod))),
    lambda pod: pod.exit_code in _OWN,
    lambda pod: pod.exit_code not in (AGAIN, STOPPED),
)


def _rank(pod: JobPod) -> int:
    return next((rank for rank, applies in enumerate(_RANKS) if applies(pod)), len(_RANKS))


def final_failure(pods: Iterable[JobPod]) -> Failure | None:
    """Return why another try can't succeed where the JobSet would make one (`jobset`), or None."""
    cause = culprit(
        pod for pod in pods if _out_of_memory(pod) or (pod.role == TRAIN and pod.exit_code in _FINAL)
    )
    return explain_end(cause) if cause else None


def last_ends(pods: Iterable[JobPod]) -> str:
    """Return how pods ended that did not end well, in few words and each way once; "" if there are none."""
    failed = sorted((pod for pod in pods if pod.failed), key=lambda pod: (_rank(pod), pod.name))
    ways = list(dict.fromkeys(_way(pod)[:_MAX_END] for pod in failed))
    return "; ".join(ways[:_MAX_LISTED])[:MAX_ENDS]


def _way(pod: JobPod) -> str:
    code = pod.reason or "no exit code" if pod.exit_code is None else f"exit code {pod.exit_code}"
    said = _said(pod) or pod.killed_by
    return f"{pod.role} {code}: {said}" if said else f"{pod.role} {code}"


def no_progress(reached: str, ends: str) -> Failure:
    """Return what it means that the pods died again and again without the job going on.

    Args:
        reached: How far the job came, for people.
        ends: How the pods ended, of `last_ends`.
    """
    seen = ends or "nothing is left of them: they were deleted, or their nodes were lost"
    return Failure(
        NO_PROGRESS,
        f"The pods were started again {MAX_STALLED} times in a row, and the job came no further than {reached}. "
        f"How they ended last: {seen}. Mend what ends them (`kubectl get events`, the health of the nodes, the network "
        "between the pods); then create the job anew: it goes on from its last checkpoint.",
    )


def pending_problem(
    pods: Sequence[JobPod],
    events: Sequence[Mapping[str, str]],
    *,
    now: datetime,
    patience: timedelta,
) -> Failure | None:
    """Return what keeps pods from starting, or None.

    Args:
        pods: Pods of the present attempt, and what is left of those before.
        events: Warnings about the job's objects.
        now: The time.
        patience: How long a pod may be without a node before that counts.
    """
    pending = [pod for pod in pods if pod.pending]
    for pod in pending:
        if problem := _not_starting(pod, now, patience):
            return problem
    if problem := _not_mounted(pending, events):  # also while others run, which wait for this pod
        return problem
    if any(pod.running for pod in pods):
        return None
    return (None if pending else _not_created(events)) or _lost_node(pods, now)


def _not_starting(pod: JobPod, now: datetime, patience: timedelta) -> Failure | None:
    if pod.waiting_reason in _IMAGE:
        return Failure(
            "ImagePullFailed",
            f"Pod {pod.name} can't pull its image {pod.image}: {pod.waiting_message or pod.waiting_reason}. Check the "
            "name in `image`, and `imagePullSecrets` for a private registry. It starts as soon as the image can be "
            "had; another name needs a new job.",
        )
    if pod.waiting_reason in _CONTAINER_CONFIG:
        return Failure(
            "CreateContainerConfigError",
            f"Pod {pod.name} can't start: {pod.waiting_message or pod.waiting_reason}. What the job names, such as "
            "the Secret of `secretName`, must exist in its namespace.",
        )
    if pod.unschedulable and pod.unschedulable_since and now - pod.unschedulable_since >= patience:
        return _unschedulable(pod)
    return None


def _unschedulable(pod: JobPod) -> Failure:
    if "persistentvolumeclaim" in pod.unschedulable and "not found" in pod.unschedulable:
        return Failure(
            "VolumeNotFound",
            f"Pod {pod.name} waits: {pod.unschedulable} Create the claim in this namespace, and the pod starts.",
        )
    return Failure(
        "Unschedulable",
        f"No node takes pod {pod.name}: {pod.unschedulable} It starts as soon as one does; else ask for less in "
        "`resources` or `accelerators`, or check `nodeSelector` and `tolerations`.",
    )


def _not_mounted(pending: Sequence[JobPod], events: Sequence[Mapping[str, str]]) -> Failure | None:
    names = {pod.name for pod in pending}
    for event in events:
        if event.get("reason") in _MOUNT and event.get("name") in names:
            return Failure(
                "VolumeNotMounted",
                f"Pod {event['name']} can't mount a volume: {event.get('message', '')} The claims of `artifacts` and "
                "`cache` must be usable on several nodes at once (ReadWriteMany) where pods run on several.",
            )
    return None


def _not_created(events: Sequence[Mapping[str, str]]) -> Failure | None:
    messages = (event.get("message", "") for event in events if event.get("reason") in _CREATION)
    message = next(messages, None)
    return None if message is None else creation_problem(message)


def creation_problem(message: str) -> Failure:
    """Return what it means that the API refused to create an object of the job."""
    if re.search(r"service ?account.*not found", message, re.IGNORECASE):
        return Failure(
            "ServiceAccountNotFound",
            f"The pods' service account must exist in the namespace: {message} Create it with `kubectl create "
            "serviceaccount`, or name another in `serviceAccountName`.",
        )
    if re.search(r"forbidden|quota|denied", message, re.IGNORECASE):
        return Failure(
            "Forbidden",
            f"The cluster refuses what the job needs: {message} Ask for less, or have the quota, policy or role of "
            "this namespace changed.",
        )
    return Failure("CreationFailed", f"The job's pods can't be created: {message}")


def _lost_node(pods: Iterable[JobPod], now: datetime) -> Failure | None:
    for pod in pods:
        if pod.deleted_at and now - pod.deleted_at > _STUCK:
            return Failure(
                "NodeLost",
                f"Pod {pod.name} does not end, since its node {pod.node} does not answer. Delete the node, or the pod "
                f"with `kubectl delete pod {pod.name} --force`, and the job goes on.",
            )
    return None
