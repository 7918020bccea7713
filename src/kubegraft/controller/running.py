"""Whether a job makes headway, and if not, why: its condition `Running` while it has not ended."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from kubegraft.controller.conditions import RUNNING, Condition, find
from kubegraft.controller.failures import Failure, culprit, explain_end, explains, pending_problem
from kubegraft.controller.job_pods import JobPod
from kubegraft.controller.jobset import FINISH, PREPARE, TRAIN
from kubegraft.controller.view import View

_STAGE_REASONS: Final = {PREPARE: "Preparing", TRAIN: "Training", FINISH: "Finishing"}


def running_condition(view: View) -> Condition:
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
        return restarting_condition(view)
    before = find(view.before.get("conditions", ()), RUNNING)
    if before and before["reason"] not in ("Suspended", "Queued"):
        return Condition(RUNNING, before["status"] == "True", before["reason"], before["message"])
    return Condition(RUNNING, False, "Starting", "The pods are being started.")


def _at_work(view: View, running: list[JobPod]) -> Condition:
    role = running[-1].role
    nodes = f" on {view.spec.nodes} nodes" if role == TRAIN and view.spec.nodes > 1 else ""
    return Condition(RUNNING, True, _STAGE_REASONS[role], f"The pods of `{role}` run{nodes}.")


def restarting_condition(view: View) -> Condition:
    """Return what is told of a restart: why, as far as pods that are left show it."""
    cause = culprit((*view.left, *view.pods))
    told = explain_end(cause) if cause else Failure("Restarting", "A pod or its node was lost.")
    reason = told.reason if cause and explains(cause) else "Restarting"
    return Condition(
        RUNNING, False, reason, f"The pods are started again from the last checkpoint. {told.message}"
    )
