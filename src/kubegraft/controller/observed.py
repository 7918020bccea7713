"""What the pure functions see: objects as the API gave them, maybe stale, and the time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from kubegraft.job_report import Report
from kubegraft.rendering.pods import Manifest

# Objects of a TransferJob or TransferSchedule carry its name in this label; pods of a JobSet do, too.
JOB_LABEL = "kubegraft.dev/transfer-job"
SCHEDULE_LABEL = "kubegraft.dev/transfer-schedule"


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """One TransferJob and what belongs to it.

    Attributes:
        job: The TransferJob as read.
        jobset: The JobSet of the name `jobset.jobset_name(job)`, whoever made it; None if there is none.
        config_map: The ConfigMap of the name `jobset.config_map_name(job)`; None if there is none.
        pods: Pods with the label `JOB_LABEL` of the job: `metadata`, `spec`, `status` as the API gives them.
        events: Recent warnings about the job's pods, Jobs and JobSet: `reason`, `message`, and where known the
            `kind` and `name` of the object they are about.
        reports: Newest report in the log of each running pod, by the pod's name; termination messages need not be
            here, they are in `pods`.
        now: The time, with a time zone.
    """

    job: Manifest
    jobset: Manifest | None = None
    config_map: Manifest | None = None
    pods: tuple[Manifest, ...] = ()
    events: tuple[Mapping[str, str], ...] = ()
    reports: Mapping[str, Report] = dataclasses.field(default_factory=dict)
    now: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedSchedule:
    """One TransferSchedule and what it made.

    Attributes:
        schedule: The TransferSchedule as read.
        jobs: TransferJobs with the label `SCHEDULE_LABEL` of the schedule.
        looks: Jobs (batch/v1) with that label: each looked at the data once (docs/adr/0018-operator.md).
        pods: Pods with that label, of the looks.
        refusal: Why the API server refused the last job or look; "" if it did not.
        now: The time, with a time zone.
    """

    schedule: Manifest
    jobs: tuple[Manifest, ...] = ()
    looks: tuple[Manifest, ...] = ()
    pods: tuple[Manifest, ...] = ()
    refusal: str = ""
    now: datetime
