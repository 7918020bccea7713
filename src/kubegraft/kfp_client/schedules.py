"""Recurring runs: made, found again, paused, resumed and deleted by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from kubegraft.cron import FIELDS, check_fields
from kubegraft.errors import ConfigError, suggestion
from kubegraft.kfp_client.backend import Backend
from kubegraft.kfp_client.digests import content_digest

_DIGEST_LINE: Final = re.compile(r"kubegraft content: ([0-9a-f]+)")
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
LATEST: Final = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """When something runs, and what.

    Attributes:
        name: Name of the recurring run, by which it is found again.
        cron: Six fields, the first of them seconds, in the time zone of the installation; "" for an interval.
        interval_seconds: Seconds from one start to the next; 0 for a cron expression.
        pipeline_id: Which pipeline.
        version_id: Which version of it; `LATEST` for whichever is the newest when it starts.
        parameters: Parameters of each run.
        max_concurrency: Most runs at once; 1, since a second run on the same data only repeats the first.
        catch_up: Whether missed ticks are made up for.
        service_account: Account of the pods; "" for the installation's own.
        pipeline_root: Where artifacts go; "" for the installation's own.
    """

    name: str
    cron: str = ""
    interval_seconds: int = 0
    pipeline_id: str
    version_id: str = LATEST
    parameters: Mapping[str, Any] = field(default_factory=dict)
    max_concurrency: int = 1
    catch_up: bool = False
    service_account: str = ""
    pipeline_root: str = ""

    def __post_init__(self) -> None:
        """Check when it runs.

        Raises:
            ConfigError: If neither or both of cron and interval are given, or one breaks its rule.
        """
        if bool(self.cron) == bool(self.interval_seconds):
            raise ConfigError(
                "`cron` or `interval` must say when to run, and not both. Received: "
                f"cron={self.cron!r}, interval={self.interval_seconds}. For example --cron '0 0 3 * * *'."
            )
        if self.cron:
            check_cron(self.cron)

    def trigger(self) -> dict[str, Any]:
        """Return the API's trigger as plain values."""
        if self.cron:
            return {"cron_schedule": {"cron": self.cron}}
        return {"periodic_schedule": {"interval_second": str(self.interval_seconds)}}


def check_cron(cron: str) -> None:
    """Raise unless KFP reads a cron expression as it is meant.

    Raises:
        ConfigError: If it does not have six fields, or one is out of its range.
    """
    num_fields = len(cron.split())
    if num_fields != len(FIELDS):
        hint = f" With seconds before it that is '0 {cron}'." if num_fields == len(FIELDS) - 1 else ""
        raise ConfigError(
            "`cron` must have six fields: second, minute, hour, day of month, month, day of week. Received: "
            f"cron={cron!r}, {num_fields} fields.{hint}"
        )
    check_fields(cron, FIELDS)


def parse_interval(text: str) -> int:
    """Return seconds from a text such as 90s, 30m, 12h or 7d.

    Raises:
        ConfigError: If it has another form.
    """
    match = re.fullmatch(r"([1-9]\d*)([smhd])", text.strip())
    if not match:
        raise ConfigError(
            "`interval` must be a whole number and a unit of s, m, h or d. Received: "
            f"interval={text!r}. For example 12h."
        )
    return int(match[1]) * _UNITS[match[2]]


def ensure_schedule(backend: Backend, schedule: Schedule, experiment_id: str) -> tuple[Any, str]:
    """Make a recurring run be there as described, and say what that took.

    The API can't change one, so one of that name with other content is replaced: the new one is made before the
    old one is deleted, and is paused if the old one was. What a broken call left twice is one again.

    Returns:
        The recurring run, and `created`, `replaced` or `unchanged`.

    Raises:
        ClusterError: If the API can't be reached, or refuses.
    """
    digest = _digest(schedule, experiment_id)
    found = backend.recurring_runs(schedule.name, experiment_id)
    same = [run for run in found if _digest_of(run) == digest]
    if same:
        _delete(backend, [run for run in found if run is not same[0]])
        return same[0], "unchanged" if len(found) == 1 else "replaced"
    paused = bool(found) and all(is_paused(run) for run in found)
    made = _create(backend, schedule, experiment_id, digest, paused=paused)
    _delete(backend, found)
    return made, "replaced" if found else "created"


def _create(backend: Backend, schedule: Schedule, experiment_id: str, digest: str, *, paused: bool) -> Any:
    version = {"pipeline_id": schedule.pipeline_id}
    if schedule.version_id != LATEST:
        version["pipeline_version_id"] = schedule.version_id
    return backend.create_recurring_run(
        display_name=schedule.name,
        description=f"kubegraft content: {digest}",
        experiment_id=experiment_id,
        namespace=backend.namespace,
        mode="DISABLE" if paused else "ENABLE",
        trigger=schedule.trigger(),
        max_concurrency=str(schedule.max_concurrency),
        no_catchup=not schedule.catch_up,
        service_account=schedule.service_account or None,
        version=version,
        runtime_config={
            "parameters": dict(schedule.parameters),
            "pipeline_root": schedule.pipeline_root or None,
        },
    )


def _digest(schedule: Schedule, experiment_id: str) -> str:
    import dataclasses

    return content_digest({**dataclasses.asdict(schedule), "experiment_id": experiment_id})


def _digest_of(recurring_run: Any) -> str:
    match = _DIGEST_LINE.search(recurring_run.description or "")
    return match[1] if match else ""


def _delete(backend: Backend, recurring_runs: list[Any]) -> None:
    for run in recurring_runs:
        backend.change_recurring_run(run.recurring_run_id, "delete")


def is_paused(recurring_run: Any) -> bool:
    """Return whether a recurring run starts nothing for now."""
    return bool(recurring_run.status == "DISABLED" or recurring_run.mode == "DISABLE")


def change_schedule(backend: Backend, name: str, change: str) -> list[str]:
    """Pause, resume or delete the recurring runs of a name; what is so already is left alone.

    Args:
        backend: Where they are.
        name: Name as it was made with.
        change: `pause`, `resume` or `delete`.

    Returns:
        Ids of what was changed.

    Raises:
        ConfigError: If there is none of that name; deleting one that is gone is no error.
        ClusterError: If the API can't be reached, or refuses.
    """
    found = backend.recurring_runs(name)
    if not found and change != "delete":
        known = [run.display_name for run in backend.recurring_runs()]
        raise ConfigError(
            f"`name` must be that of a recurring run. Received: name={name!r}.{suggestion(name, known)} "
            "`kubegraft schedule list` shows all."
        )
    call = {"pause": "disable", "resume": "enable", "delete": "delete"}[change]
    wanted = {"pause": [r for r in found if not is_paused(r)], "resume": [r for r in found if is_paused(r)]}
    changed = wanted.get(change, found)
    for run in changed:
        backend.change_recurring_run(run.recurring_run_id, call)
    return [str(run.recurring_run_id) for run in changed]


def described(recurring_run: Any) -> dict[str, Any]:
    """Return what a person wants to know about a recurring run, as plain values."""
    trigger = recurring_run.trigger
    cron = trigger.cron_schedule.cron if trigger and trigger.cron_schedule else ""
    interval = trigger.periodic_schedule.interval_second if trigger and trigger.periodic_schedule else ""
    reference = recurring_run.pipeline_version_reference
    pinned = reference.pipeline_version_id if reference else None
    return {
        "name": recurring_run.display_name,
        "state": "paused" if is_paused(recurring_run) else "active",
        "when": cron or f"every {interval} s",
        "version": pinned or "latest",
        "recurring_run_id": recurring_run.recurring_run_id,
    }
