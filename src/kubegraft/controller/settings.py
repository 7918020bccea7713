"""What an installation of the operator chooses, for all jobs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Defaults of whoever installed the operator.

    Attributes:
        image: Image of the pods of a job that names none: the training image of the operator's own version.
        service_account: Account of the pods of a job that names none; manifests/base makes it. "" for the
            namespace's default.
        namespace: The only namespace that is watched; "" for all.
        report_wait_seconds: How long the last report of a pod is waited for after its JobSet ended, in seconds: the
            API may show a JobSet's end before the pod's.
        unschedulable_seconds: How long a pod may wait for a node before its job says so: after a restart, nodes
            are full for a moment with the pods before.
    """

    image: str
    service_account: str = "kubegraft-task"
    namespace: str = ""
    report_wait_seconds: float = 15
    unschedulable_seconds: float = 10
