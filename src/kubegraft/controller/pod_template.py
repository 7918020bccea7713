"""The pods that the operator has made, of JobSets and of looks: restricted, bounded, with the volumes of their job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from kubegraft.accelerators import REQUIRE_VARIABLE
from kubegraft.controller.settings import Settings
from kubegraft.controller.spec import JobSpec
from kubegraft.rendering.pods import Manifest, container_security, pod_security

CONTAINER: Final = "kubegraft"
ARTIFACTS_DIR: Final = "/artifacts"
_CONFIG_DIR: Final = "/etc/kubegraft"
_CONFIG_FILE: Final = "run.yaml"
_CACHE_DIR: Final = "/cache"
# As `kubegraft.cache` reads them, whose import costs numpy.
_CACHE_VARIABLE: Final = "KUBEGRAFT_CACHE"
_BUDGET_VARIABLE: Final = "KUBEGRAFT_CACHE_BUDGET"
_OPEN_BUDGET: Final = "auto"
_LOST_NODE_SECONDS: Final = 30  # Kubernetes' own 300 would leave a gang waiting
# Time for a checkpoint, on SIGTERM. A frozen pod uses it up, and the gang waits for that.
_GRACE_SECONDS: Final = 30
_LIMITS: Final = {"cpu": "4", "memory": "8Gi", "ephemeral-storage": "8Gi"}
_REQUESTS: Final = {"cpu": "1", "memory": "4Gi", "ephemeral-storage": "1Gi"}


def config_arguments(folder: str) -> list[str]:
    """Return where a pod finds its config, and its folder on the volume."""
    return ["--config", f"{_CONFIG_DIR}/{_CONFIG_FILE}", "--directory", f"{ARTIFACTS_DIR}/{folder}"]


def config_map(spec: JobSpec, metadata: Manifest) -> Manifest:
    """Return the ConfigMap with the config file of the pods.

    Raises:
        ConfigError: If the spec breaks a rule that the schema does not know.
    """
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata,
        "immutable": True,
        "data": {_CONFIG_FILE: spec.run_yaml()},
    }


def pod_spec(
    spec: JobSpec, settings: Settings, arguments: Sequence[str], *, config_map: str, trains: bool = False
) -> Manifest:
    """Return the spec of a pod.

    Args:
        spec: The job.
        settings: What the operator's installation chose.
        arguments: Of `kubegraft`.
        config_map: Name of the ConfigMap with the config file.
        trains: Whether it gets the accelerators.
    """
    accelerated = trains and spec.accelerators > 0
    pod: Manifest = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "securityContext": pod_security(),
        "containers": [_container(spec, settings, arguments, accelerated=accelerated)],
        "volumes": _volumes(spec, config_map, accelerated=accelerated),
        "tolerations": [*map(dict, spec.values.get("tolerations", ())), *_lost_node_tolerations()],
    }
    if account := spec.values.get("serviceAccountName", settings.service_account):
        pod["serviceAccountName"] = account
    if spec.priority_class and not spec.queue:
        pod["priorityClassName"] = spec.priority_class
    for field in ("nodeSelector", "imagePullSecrets"):
        if spec.values.get(field):
            pod[field] = spec.values[field]
    return pod


def _lost_node_tolerations() -> list[Manifest]:
    return [
        {
            "key": f"node.kubernetes.io/{state}",
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": _LOST_NODE_SECONDS,
        }
        for state in ("not-ready", "unreachable")
    ]


def _container(spec: JobSpec, settings: Settings, arguments: Sequence[str], *, accelerated: bool) -> Manifest:
    container: Manifest = {
        "name": CONTAINER,
        "image": spec.values.get("image") or settings.image,
        "imagePullPolicy": "IfNotPresent",
        "args": list(arguments),
        "env": _variables(spec, accelerated=accelerated),
        "resources": _resources(spec, accelerated=accelerated),
        "securityContext": container_security(),
        "terminationMessagePolicy": "File",
        "volumeMounts": _mounts(spec, accelerated=accelerated),
    }
    if secret := spec.values.get("secretName"):
        container["envFrom"] = [{"secretRef": {"name": secret}}]
    return container


def _variables(spec: JobSpec, *, accelerated: bool) -> list[Manifest]:
    cache = spec.part("cache")
    folder = cache.get("uri") or (_CACHE_DIR if cache.get("claim") else f"{ARTIFACTS_DIR}/.cache")
    variables: list[Manifest] = [
        {"name": "HOME", "value": "/tmp"},
        {"name": "KUBEGRAFT_LOG_FORMAT", "value": "json"},
        {"name": "KUBEGRAFT_RUN_NAME", "value": spec.name},
        {"name": _CACHE_VARIABLE, "value": folder},
        {"name": _BUDGET_VARIABLE, "value": str(cache.get("budget", _OPEN_BUDGET))},
    ]
    if accelerated:
        variables.append({"name": REQUIRE_VARIABLE, "value": str(spec.accelerators)})
    return variables


def _resources(spec: JobSpec, *, accelerated: bool) -> Manifest:
    chosen = spec.part("resources") or {"requests": _REQUESTS, "limits": _LIMITS}
    amounts: dict[str, dict[str, Any]] = {
        kind: {name: str(amount) for name, amount in (chosen.get(kind) or {}).items()}
        for kind in ("requests", "limits")
    }
    if accelerated:
        amounts["limits"][spec.accelerator_resource] = str(spec.accelerators)
    return amounts


def _mounts(spec: JobSpec, *, accelerated: bool) -> list[Manifest]:
    mounts: list[Manifest] = [
        {"name": "artifacts", "mountPath": ARTIFACTS_DIR},
        {"name": "config", "mountPath": _CONFIG_DIR, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},
    ]
    if spec.part("cache").get("claim"):
        mounts.append({"name": "cache", "mountPath": _CACHE_DIR})
    if accelerated:
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    return mounts


def _volumes(spec: JobSpec, config_map: str, *, accelerated: bool) -> list[Manifest]:
    volumes: list[Manifest] = [
        {"name": "artifacts", "persistentVolumeClaim": {"claimName": spec.artifacts_claim}},
        {"name": "config", "configMap": {"name": config_map}},
        {"name": "tmp", "emptyDir": {"sizeLimit": "4Gi"}},
    ]
    if claim := spec.part("cache").get("claim"):
        volumes.append({"name": "cache", "persistentVolumeClaim": {"claimName": claim}})
    if accelerated:
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": spec.shm_size}})
    return volumes
