"""Make a TransferJob and follow it to its end: what the KFP component `train_distributed` does, and any script may.

A job's name derives from the run that it is for and from its spec. So whoever tries again after a lost pod finds the
job that runs, and two runs never share one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from kubegraft.errors import (
    ClusterError,
    ConfigError,
    DataError,
    EnvironmentFault,
    Interrupted,
    TrainingError,
)
from kubegraft.reporting.events import log_event, run_name

_GROUP: Final = ("kubegraft.dev", "v1alpha1")
_PLURAL: Final = "transferjobs"
_JOB_LABEL: Final = "kubegraft.dev/transfer-job"
_INDEX: Final = "batch.kubernetes.io/job-completion-index"
_NAMESPACE_FILE: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_POLL_SECONDS: Final = 3.0
_MOST_NAME: Final = 40
_DIGITS: Final = 10
_GIVE_UP_SECONDS: Final = 300.0
_NOT_FOUND: Final = 404
_CONFLICT: Final = 409
_INVALID: Final = (400, 422)
_FIRST_SERVER_ERROR: Final = 500
# By the reason of the condition `Failed`; anything else is a TrainingError.
_ERRORS: Final = {"ConfigRejected": ConfigError, "DataRejected": DataError, "Forbidden": EnvironmentFault}
Object = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The TransferJob to make.

    Attributes:
        spec: As in `manifests/samples/transferjob.yaml`.
        run: What the job is for; the same run and spec are the same job. "" for the run that this process is of.
        prefix: Beginning of the job's name.
        namespace: Where; "" for that of this pod or kubeconfig.
        labels: Of the job.
        keep_on_stop: Whether a job whose follower is asked to stop is suspended; else it is deleted. Its results so far
            stay on the volume either way, and the same call goes on from them.
    """

    spec: Mapping[str, Any]
    run: str = ""
    prefix: str = "distributed"
    namespace: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    keep_on_stop: bool = False

    @property
    def name(self) -> str:
        """Return the job's name."""
        words = json.dumps([self.run or run_name(), self.spec], sort_keys=True, default=list)
        digest = hashlib.sha256(words.encode()).hexdigest()[:_DIGITS]
        prefix = re.sub(r"[^a-z0-9-]+", "-", self.prefix.lower()).strip("-")[:_MOST_NAME].rstrip("-")
        return f"{prefix or 'job'}-{digest}"


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
        DataError: If the images can't be used.
        TrainingError: If it fails otherwise.
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
        if _condition(found, "Succeeded") or _condition(found, "Failed"):
            return found
        stop.wait(_POLL_SECONDS)
    return None


def _condition(job: Object, name: str) -> Object | None:
    for condition in (job.get("status") or {}).get("conditions", ()):
        if condition["type"] == name and condition["status"] == "True":
            found: Object = condition
            return found
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
    if failed := _condition(job, "Failed"):
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


class TransferJobs:
    """TransferJobs of a namespace, through the `kubernetes` client.

    Attributes:
        namespace: Where they are.
    """

    def __init__(self, namespace: str = "", api_client: Any = None) -> None:
        from kubernetes import client, config

        if api_client is None:
            try:
                config.load_incluster_config()
            except config.ConfigException:
                config.load_kube_config()
        self.namespace = namespace or _own_namespace()
        self._custom = client.CustomObjectsApi(api_client)
        self._core = client.CoreV1Api(api_client)

    def ensure(self, wanted: Wanted) -> Object:
        """Return the job of the wanted name, made now or found; one that was suspended at a stop goes on."""
        body = {
            "apiVersion": "/".join(_GROUP),
            "kind": "TransferJob",
            "metadata": {"name": wanted.name, "labels": dict(wanted.labels)},
            "spec": dict(wanted.spec),
        }
        try:
            return self._call(self._custom.create_namespaced_custom_object, body)
        except ClusterError as error:
            if error.status in _INVALID:
                raise ConfigError(str(error)) from error
            if error.status != _CONFLICT:
                raise
        found = self.get(wanted.name)
        if found is None:
            return self.ensure(wanted)
        log_event("distributed", "found", job=wanted.name)
        if found["spec"].get("suspend") and not wanted.spec.get("suspend"):
            found = self.suspend(wanted.name, suspended=False)
        return found

    def get(self, name: str) -> Object | None:
        """Return a job, or None."""
        try:
            return self._call(self._custom.get_namespaced_custom_object, name)
        except ClusterError as error:
            if error.status == _NOT_FOUND:
                return None
            raise

    def suspend(self, name: str, *, suspended: bool) -> Object:
        """Suspend a job or let it go on; return it."""
        return self._call(self._custom.patch_namespaced_custom_object, name, {"spec": {"suspend": suspended}})

    def delete(self, name: str) -> None:
        """Delete a job and all that was made for it; one that is gone is gone."""
        try:
            self._call(self._custom.delete_namespaced_custom_object, name, propagation_policy="Background")
        except ClusterError as error:
            if error.status != _NOT_FOUND:
                raise

    def pods(self, name: str) -> list[Object]:
        """Return the pods of a job that say how far it is, the oldest first."""
        call = self._core.list_namespaced_pod
        pods = _answered(call, self.namespace, label_selector=f"{_JOB_LABEL}={name}").items
        first = [pod for pod in pods if (pod.metadata.annotations or {}).get(_INDEX, "0") == "0"]
        return [
            {"name": pod.metadata.name, "phase": pod.status.phase}
            for pod in sorted(first, key=lambda pod: pod.metadata.creation_timestamp)
        ]

    def log(self, pod: str, since_seconds: int) -> str:
        """Return what a pod has logged in the last seconds, each line with its time; "" where there is nothing."""
        call = self._core.read_namespaced_pod_log
        try:
            return str(
                _answered(call, pod, self.namespace, timestamps=True, since_seconds=max(since_seconds, 1))
                or ""
            )
        except ClusterError:  # it is not up yet, or it is gone; the status says which
            return ""

    def _call(self, call: Callable[..., Any], *rest: Any, **options: Any) -> Object:
        group, version = _GROUP
        found: Object = _answered(call, group, version, self.namespace, _PLURAL, *rest, **options)
        return found


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


def _answered(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        return call(*arguments, **options, _request_timeout=30)
    except ApiException as refusal:
        raise _refused(refusal) from refusal
    except (HTTPError, OSError) as error:
        raise ClusterError(
            f"The API server does not answer: {type(error).__name__}: {error}. It is tried again."
        ) from error


def _refused(refusal: Any) -> ClusterError:
    try:
        message = json.loads(refusal.body)["message"]
    except (TypeError, ValueError, KeyError):
        message = str(refusal.reason)
    advice = {
        403: " Bind the ClusterRole kubegraft-submit to this pod's service account (docs/operator.md).",
        404: " Is the operator installed (docs/operator.md)?",
    }.get(refusal.status, "")
    error = ClusterError(f"The API server refuses: {message}.{advice}")
    error.status = refusal.status
    return error


def _own_namespace() -> str:
    if _NAMESPACE_FILE.exists():
        return _NAMESPACE_FILE.read_text(encoding="ascii").strip()
    from kubernetes import config

    with contextlib.suppress(config.ConfigException):
        _, context = config.list_kube_config_contexts()
        return context["context"].get("namespace") or "default"
    return os.environ.get("POD_NAMESPACE", "default")
