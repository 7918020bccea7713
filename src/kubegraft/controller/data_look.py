"""The Job that looks whether the data has changed, for `onDataChange`: one pod, no accelerators, outside of any queue.

It reads the images as `prepare` does, says their digest and how many differ from the last run's, and leaves the list of
images on the volume for the next look (`kubegraft.look`).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from kubegraft.controller.conditions import find, holds, moment
from kubegraft.controller.failures import Failure, pending_problem
from kubegraft.controller.job_pods import read_pod
from kubegraft.controller.observed import SCHEDULE_LABEL
from kubegraft.controller.pod_template import CONTAINER, config_arguments, config_map, pod_spec
from kubegraft.controller.settings import Settings
from kubegraft.controller.spec import JobSpec
from kubegraft.job_report import Report, parse_report
from kubegraft.rendering.pods import Manifest, labels

CHANGED_FRACTION: Final = "changed_fraction"
_TRIES: Final = 2
_LONGEST_SECONDS: Final = 6 * 3600


@dataclass(frozen=True, slots=True)
class Seen:
    """What a look came to.

    Attributes:
        report: What it saw; None if it failed.
        at: When it ended.
        message: Why it failed.
    """

    report: Report | None
    at: datetime | None
    message: str = ""


def render_look(spec: JobSpec, metadata: Manifest, known_digest: str, settings: Settings) -> list[Manifest]:
    """Return the ConfigMap and the Job of a look.

    Args:
        spec: The schedule's template; its name is the schedule's.
        metadata: Of both objects.
        known_digest: Digest of the last run's data; "" if there was none.
        settings: What the operator's installation chose.

    Raises:
        ConfigError: If the template breaks a rule that the schema does not know.
    """
    folder = f"{spec.name}.looks"  # no job's: their names have no dot
    pod = pod_spec(spec, settings, [], config_map=metadata["name"])
    command = ["python", "-m", "kubegraft.look", *config_arguments(folder), "--known", known_digest]
    container = pod["containers"][0]
    container["command"] = command
    del container["args"]
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            "backoffLimit": _TRIES,
            "activeDeadlineSeconds": _LONGEST_SECONDS,
            "template": {"metadata": {"labels": look_labels(spec.name)}, "spec": pod},
        },
    }
    return [config_map(spec, metadata), job]


def look_labels(schedule: str) -> Manifest:
    """Return the labels of all that belongs to a schedule's looks."""
    return {**labels("task", schedule), SCHEDULE_LABEL: schedule}


def what_was_seen(look: Manifest, pods: tuple[Manifest, ...]) -> Seen | None:
    """Return what a look came to, or None while it goes on.

    Args:
        look: The Job.
        pods: Pods of the schedule's looks.
    """
    conditions = (look.get("status") or {}).get("conditions") or ()
    reports = [report for pod in pods if (report := _end_report(pod, look["metadata"]["name"]))]
    if holds(conditions, "Complete"):
        done = [report for report in reports if report.done]
        return Seen(
            done[-1] if done else None, moment(find(conditions, "Complete").get("lastTransitionTime"))
        )
    if holds(conditions, "Failed"):
        failed = find(conditions, "Failed")
        said = [report.message for report in reports if report.message] or [failed.get("message", "")]
        return Seen(None, None, said[-1])
    return None


def look_problem(
    look: Manifest, pods: tuple[Manifest, ...], *, now: datetime, patience: timedelta
) -> Failure | None:
    """Return what keeps the pod of a look from starting, or None.

    Args:
        look: The Job.
        pods: Pods of the schedule's looks.
        now: The time.
        patience: How long a pod may be without a node before that counts.
    """
    own = [read_pod(pod) for pod in pods if _is_of(pod, look["metadata"]["name"])]
    return pending_problem(own, (), now=now, patience=patience)


def _is_of(pod: Manifest, look: str) -> bool:
    return bool((pod["metadata"].get("labels") or {}).get("batch.kubernetes.io/job-name") == look)


def _end_report(pod: Manifest, look: str) -> Report | None:
    if not _is_of(pod, look):
        return None
    for status in (pod.get("status") or {}).get("containerStatuses") or ():
        if status.get("name") == CONTAINER:
            return parse_report(((status.get("state") or {}).get("terminated") or {}).get("message") or "")
    return None
