"""Make a TransferJob and follow it to its end: what the KFP component `train_distributed` does, and any script may.

A job's name derives from the run that it is for and from its spec. So whoever tries again after a lost pod finds the
job that runs, and two runs never share one.
"""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from kubegraft.errors import (
    ClusterError,
    ConfigError,
    DataError,
    DivergenceError,
    EnvironmentFault,
    EvaluationError,
    ExportError,
    Interrupted,
    ModelError,
    StorageError,
    TrainingError,
    WeightsError,
)
from kubegraft.reporting.events import log_event
from kubegraft.transfer_job_api import Object, TransferJobs, Wanted, true_condition

_POLL_SECONDS: Final = 3.0
_GIVE_UP_SECONDS: Final = 300.0
_FIRST_SERVER_ERROR: Final = 500
# By the reason of the condition `Failed`; anything else is a TrainingError.
_ERRORS: Final = {
    "ConfigRejected": ConfigError,
    "DataRejected": DataError,
    "ModelRejected": ModelError,
    "WeightsRejected": WeightsError,
    "TrainingDiverged": DivergenceError,
    "EvaluationFailed": EvaluationError,
    "ExportFailed": ExportError,
    "StorageFailed": StorageError,
    "EnvironmentUnfit": EnvironmentFault,
    "Forbidden": EnvironmentFault,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a job ended well.

    Attributes:
        name: Of the job.
        model_uri: Where the exported model is.
        dataset_digest: What it was trained on.
        metrics: Numbers of the validation and test splits, by snake_case name.
    """

    name: str
    model_uri: str
    dataset_digest: str
    metrics: Mapping[str, float]


def job_spec(
    *, config: Mapping[str, Any], cluster: Mapping[str, Any], further: Mapping[str, Any] | None = None
) -> Object:
    """Return a TransferJob's spec without what is left open.

    Args:
        config: The config file's part, by section, for example `{"ingest": {"source": ...}}`.
        cluster: The cluster's part, for example `{"nodes": 2}`.
        further: Anything else of a spec; wins over the others, section by section.
    """
    spec: Object = {}
    for part in (config, cluster, further or {}):
        for name, value in part.items():
            if isinstance(value, Mapping) and isinstance(spec.get(name), Mapping):
                spec[name] = {**spec[name], **_given(value)}
            elif not _is_open(value):
                spec[name] = _given(value) if isinstance(value, Mapping) else value
    return {name: value for name, value in spec.items() if not _is_open(value)}


def _given(values: Mapping[str, Any]) -> Object:
    return {name: value for name, value in values.items() if not _is_open(value)}


def _is_open(value: Any) -> bool:
    return value is None or (isinstance(value, str | Mapping | list | tuple) and not value)


def wanted_of(given: Mapping[str, Any]) -> Wanted:
    """Return the job that the arguments of the component `train_distributed` describe.

    Args:
        given: The component's arguments, by name.
    """
    count = given["accelerators_per_node"]
    cluster = {
        "nodes": given["nodes"],
        "accelerators": {"count": count, "resource": given["accelerator_resource"]} if count else None,
        "nodeSelector": given["node_selector"],
        "tolerations": given["tolerations"],
        "image": given["training_image"],
        "artifacts": {"claim": given["claim"]},
        "model_store": {"uri": given["publish"]},
        "queueName": given["queue_name"],
    }
    config = {
        "seed": given["seed"],
        "ingest": {"source": given["source"]},
        "head": {"backbone": given["backbone"]},
    }
    return Wanted(
        spec=job_spec(config=config, cluster=cluster, further=given["further"]),
        namespace=given["job_namespace"],
        keep_on_stop=given["keep_on_stop"],
    )


def train(wanted: Wanted, jobs: TransferJobs | None = None) -> Outcome:
    """Make the job, or find it, and follow it to its end; its pods' log lines go to this process's output.

    Args:
        wanted: The job.
        jobs: The API; None for that of this pod or kubeconfig.

    Raises:
        ConfigError: If the API server or the job refuses the config.
        KubegraftError: If it fails, the kind that its pods ended with; `TrainingError` where that is not known.
        Interrupted: If this process was asked to stop.
        ClusterError: If the API can't be reached, or the job was deleted by somebody.
    """
    jobs = jobs or TransferJobs(wanted.namespace)
    with _stopping() as stop:
        made = jobs.ensure(wanted)
        log_event("distributed", "following", job=wanted.name, namespace=jobs.namespace)
        ended = _follow(jobs, made, stop)
        if ended is None:
            _end(jobs, wanted)
            done = "suspended" if wanted.keep_on_stop else "deleted"
            raise Interrupted(
                f"This process was asked to stop, so the TransferJob {wanted.name} was {done}. "
                "The same call goes on from what is on the volume."
            )
    return _outcome(ended)


@contextlib.contextmanager
def _stopping() -> Iterator[threading.Event]:
    """Within the block SIGTERM sets the event that is yielded."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(jobs: TransferJobs, wanted: Wanted) -> None:
    if wanted.keep_on_stop:
        jobs.suspend(wanted.name, suspended=True)
    else:
        jobs.delete(wanted.name)


def _follow(jobs: TransferJobs, job: Object, stop: threading.Event) -> Object | None:
    """Return the job as it ended; None if this process was asked to stop before."""
    name, shown, logs = job["metadata"]["name"], "", Logs(jobs, job["metadata"]["name"])
    answered = time.monotonic()
    while not stop.is_set():
        try:
            found = jobs.get(name)
            answered = time.monotonic()
        except ClusterError as error:
            if time.monotonic() - answered > _GIVE_UP_SECONDS or 0 < error.status < _FIRST_SERVER_ERROR:
                raise
            log_event("distributed", "no answer", text=str(error))
            stop.wait(_POLL_SECONDS)
            continue
        if found is None or found["metadata"]["uid"] != job["metadata"]["uid"]:
            raise ClusterError(
                f"The TransferJob {name} was deleted while it was followed. Start the task again."
            )
        logs.show()
        if (line := _progress(found)) != shown:
            shown = line
            log_event("distributed", "progress", job=name, state=line)
        if true_condition(found, "Succeeded") or true_condition(found, "Failed"):
            return found
        stop.wait(_POLL_SECONDS)
    return None


def _progress(job: Object) -> str:
    status = job.get("status") or {}
    running: Object = next((c for c in status.get("conditions", ()) if c["type"] == "Running"), {})
    words = [status.get("stage") or "waiting", f"{status.get('progress', 0)} %"]
    if restarts := status.get("restarts"):
        words.append(f"{restarts} restarts")
    if running.get("status") == "False" and running.get("reason"):
        words.append(f"{running['reason']}: {running.get('message', '')}")
    return ", ".join(words)


def _outcome(job: Object) -> Outcome:
    name, status = job["metadata"]["name"], job["status"]
    if failed := true_condition(job, "Failed"):
        kind = _ERRORS.get(failed.get("reason", ""), TrainingError)
        raise kind(f"The TransferJob {name} failed: {failed.get('reason')}: {failed.get('message')}")
    metrics = {_snake(key): float(value) for key, value in (status.get("metrics") or {}).items()}
    return Outcome(
        name=name,
        model_uri=status.get("modelUri", ""),
        dataset_digest=status.get("datasetDigest", ""),
        metrics=metrics,
    )


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


class Logs:
    """Shows each line of the pods of a job once."""

    def __init__(self, jobs: TransferJobs, job: str) -> None:
        self._jobs, self._job = jobs, job
        self._shown: dict[str, str] = {}
        self._looked = time.monotonic()

    def show(self) -> None:
        """Print what has come since the last call."""
        since = int(time.monotonic() - self._looked) + 30
        self._looked = time.monotonic()
        try:
            pods = self._jobs.pods(self._job)
        except ClusterError as error:
            log_event("distributed", "no answer", text=str(error))
            return
        for pod in pods:
            if pod["phase"] != "Pending":
                self._show(pod["name"], since if pod["name"] in self._shown else 86400)

    def _show(self, pod: str, since: int) -> None:
        last = self._shown.setdefault(pod, "")
        for line in self._jobs.log(pod, since).splitlines():
            at, _, text = line.partition(" ")
            if at > last:
                self._shown[pod] = at
                sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
