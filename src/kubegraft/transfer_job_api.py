"""TransferJobs through the `kubernetes` client: what `transfer_job_client` calls."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from kubegraft.errors import ClusterError, ConfigError
from kubegraft.reporting.events import log_event, run_name

_GROUP: Final = ("kubegraft.dev", "v1alpha1")
_PLURAL: Final = "transferjobs"
_JOB_LABEL: Final = "kubegraft.dev/transfer-job"
_INDEX: Final = "batch.kubernetes.io/job-completion-index"
_NAMESPACE_FILE: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_MOST_NAME: Final = 40
_DIGITS: Final = 10
_AGAIN_SECONDS: Final = 1.0
_NOT_FOUND: Final = 404
_CONFLICT: Final = 409
_INVALID: Final = (400, 422)
_REFUSED_CONFIG: Final = "ConfigRejected"
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
        """Return the job of the wanted name, made now or found.

        One that was suspended at a stop goes on; one that failed is made anew, and goes on from what is on its volume,
        unless it was its config that failed: that is in its name, and another try would end alike.
        """
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
        failed = true_condition(found, "Failed")
        if failed and failed.get("reason") != _REFUSED_CONFIG:
            self.delete(wanted.name)
            time.sleep(_AGAIN_SECONDS)
            return self.ensure(wanted)
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


def true_condition(job: Object, kind: str) -> Object | None:
    """Return the condition of a type, if it is there and true."""
    for condition in (job.get("status") or {}).get("conditions", ()):
        if condition["type"] == kind and condition["status"] == "True":
            found: Object = condition
            return found
    return None
