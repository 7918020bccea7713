"""A Job that runs the whole pipeline in one pod, and a CronJob that does so when the data has changed."""

from __future__ import annotations

from typing import Any, Final

from kubegraft.accelerators import REQUIRE_VARIABLE
from kubegraft.cache import BUDGET_VARIABLE, CACHE_VARIABLE, OPEN_BUDGET
from kubegraft.cluster_inputs import check_inputs
from kubegraft.config_file import to_yaml
from kubegraft.cron import FIELDS, check_fields
from kubegraft.errors import ConfigError, EnvironmentFault, KubegraftError
from kubegraft.rendering.pods import (
    Accelerators,
    Manifest,
    Setting,
    container_security,
    labels,
    pod_security,
    scaled,
)
from kubegraft.reporting.metrics import PORT_VARIABLE
from kubegraft.run_config import RunConfig

_CONTAINER: Final = "kubegraft"
_CONFIG_DIR: Final = "/etc/kubegraft"
_WORK_DIR: Final = "/workspace"
_CRON_FIELDS: Final = 5
_CRON_WORDS: Final = ("@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly")
_METRICS_PORT: Final = 9090  # which manifests/base opens
_TRIES: Final = 3
_HASH_DIGITS: Final = 10


def render_job(run_config: RunConfig, setting: Setting, accelerators: Accelerators) -> list[Manifest]:
    """Return a ConfigMap with the config and a Job that runs it.

    Their names end in the content's hash: applying the same again changes nothing, and other content is another
    Job on the same directory of the volume, which continues what it can.

    Args:
        run_config: As for `kubegraft run`.
        setting: Where it goes.
        accelerators: What the pod asks its node for.

    Raises:
        ConfigError: If the images or weights are where the pod can't read them, or the backbone is unknown.
    """
    config = _config_map(run_config, setting)
    template = _template(setting, accelerators, config["metadata"]["name"])
    name = f"{setting.name}-{_hash([config['data'], template])}"
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": setting.metadata("task", name),
        "spec": _job_spec(template),
    }
    return [config, job]


def render_cron_job(
    run_config: RunConfig, setting: Setting, accelerators: Accelerators, *, cron: str, time_zone: str
) -> list[Manifest]:
    """Return a ConfigMap with the config and a CronJob whose ticks end at once while the data is unchanged.

    Args:
        run_config: As for `kubegraft run`.
        setting: Where it goes.
        accelerators: What the pod asks its node for.
        cron: Five fields, as Kubernetes has them: minute, hour, day of month, month, day of week.
        time_zone: Name in the time zone database, for example `Europe/Berlin`.

    Raises:
        ConfigError: As `render_job`, or if when to run has another form.
    """
    _check_cron(cron, time_zone)
    config = _config_map(run_config, setting)
    template = _template(setting, accelerators, config["metadata"]["name"], "--if-changed")
    cron_job = {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": setting.metadata("task"),
        "spec": {
            "schedule": cron,
            "timeZone": time_zone,
            "concurrencyPolicy": "Forbid",  # two in one output directory would only wait for each other
            "startingDeadlineSeconds": 3600,
            "successfulJobsHistoryLimit": 3,
            "failedJobsHistoryLimit": 3,
            "jobTemplate": {
                "metadata": {"labels": labels("task", setting.name)},
                "spec": _job_spec(template),
            },
        },
    }
    return [config, cron_job]


def _check_cron(cron: str, time_zone: str) -> None:
    import zoneinfo

    if cron not in _CRON_WORDS and len(cron.split()) != _CRON_FIELDS:
        raise ConfigError(
            "`cron` of a CronJob must have five fields: minute, hour, day of month, month, day of week. Received: "
            f"cron={cron!r}. For example '0 3 * * *'; it is KFP's that begin with seconds."
        )
    if cron not in _CRON_WORDS:
        check_fields(cron, FIELDS[1:])
    known = zoneinfo.available_timezones()
    if known and time_zone not in known:
        from kubegraft.errors import suggestion

        raise ConfigError(
            "`time_zone` must be a name of the time zone database, such as Europe/Berlin. Received: "
            f"time_zone={time_zone!r}.{suggestion(time_zone, known)}"
        )


def _config_map(run_config: RunConfig, setting: Setting) -> Manifest:
    check_inputs(run_config, on_volume=True)
    if not (setting.claim or setting.publish_uri):
        raise ConfigError(
            "`claim` or `publish` must say where results stay. Received: neither, and a pod's own disk goes "
            "with the pod. Give --claim NAME, or --publish gs://bucket/folder."
        )
    data = {"run.yaml": to_yaml(run_config)}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": setting.metadata("task", f"{setting.name}-config-{_hash(data)}"),
        "data": data,
    }


def _hash(values: Any) -> str:
    import hashlib
    import json

    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_HASH_DIGITS]


def _job_spec(template: Manifest) -> Manifest:
    kinds = _subclasses(KubegraftError) - {KubegraftError}
    final = {kind.exit_code for kind in kinds if not kind.retryable} | {EnvironmentFault.exit_code}
    return {
        # Each try continues where the one before it was: the output is on the volume.
        "backoffLimit": _TRIES,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",  # another try can't mend it (docs/errors.md)
                    "onExitCodes": {
                        "containerName": _CONTAINER,
                        "operator": "In",
                        "values": sorted(final),
                    },
                },
                {
                    "action": "Ignore",  # an eviction or a drained node is nobody's failure
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
            ]
        },
        "template": template,
    }


def _subclasses(kind: type[KubegraftError]) -> set[type[KubegraftError]]:
    return {kind}.union(*(_subclasses(below) for below in kind.__subclasses__()))


def _template(setting: Setting, accelerators: Accelerators, config_name: str, *flags: str) -> Manifest:
    mounts: list[Manifest] = [
        {"name": "work", "mountPath": _WORK_DIR},
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "config", "mountPath": _CONFIG_DIR, "readOnly": True},
    ]
    volumes: list[Manifest] = [
        {"name": "work", **_work_volume(setting)},
        {"name": "tmp", "emptyDir": {"sizeLimit": "4Gi"}},
        {"name": "config", "configMap": {"name": config_name}},
    ]
    if accelerators.count:
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}})
    if setting.publish_uri:
        flags = (*flags, "--publish", setting.publish_uri)
    output = f"{_WORK_DIR}/{setting.name}"
    arguments = ["run", "--config", f"{_CONFIG_DIR}/run.yaml", "--output", output, *flags]
    spec: Manifest = {
        "serviceAccountName": setting.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 60,  # time for a checkpoint, on SIGTERM
        "securityContext": pod_security(),
        "containers": [_container(setting, accelerators, arguments, mounts)],
        "volumes": volumes,
    }
    if accelerators.node_selector:
        spec["nodeSelector"] = dict(accelerators.node_selector)
    if accelerators.tolerations:
        spec["tolerations"] = [dict(toleration) for toleration in accelerators.tolerations]
    return {"metadata": {"labels": labels("task", setting.name)}, "spec": spec}


def _container(
    setting: Setting, accelerators: Accelerators, arguments: list[str], mounts: list[Manifest]
) -> Manifest:
    container: Manifest = {
        "name": _CONTAINER,
        "image": setting.image,
        "imagePullPolicy": "IfNotPresent",
        "args": arguments,
        "env": _variables(setting, accelerators),
        "resources": _resources(setting, accelerators),
        "securityContext": container_security(),
        "volumeMounts": mounts,
    }
    if setting.metrics:
        container["ports"] = [{"name": "metrics", "containerPort": _METRICS_PORT}]
    if setting.secret:
        container["envFrom"] = [{"secretRef": {"name": setting.secret}}]
    return container


def _variables(setting: Setting, accelerators: Accelerators) -> list[Manifest]:
    field = {"fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/job-name']"}}
    variables: list[Manifest] = [
        {"name": "KUBEGRAFT_LOG_FORMAT", "value": "json"},
        {"name": "KUBEGRAFT_RUN_NAME", "valueFrom": field},
    ]
    if setting.claim:  # for later runs; a fifth of the volume, whatever its size
        variables.append({"name": CACHE_VARIABLE, "value": f"{_WORK_DIR}/cache"})
        variables.append({"name": BUDGET_VARIABLE, "value": OPEN_BUDGET})
    if accelerators.count:
        variables.append({"name": REQUIRE_VARIABLE, "value": str(accelerators.count)})
    if setting.metrics:
        variables.append({"name": PORT_VARIABLE, "value": str(_METRICS_PORT)})
    return variables


def _work_volume(setting: Setting) -> Manifest:
    if setting.claim:
        return {"persistentVolumeClaim": {"claimName": setting.claim}}
    return {"emptyDir": {"sizeLimit": "8Gi"}}


def _resources(setting: Setting, accelerators: Accelerators) -> Manifest:
    limits = {"cpu": setting.cpu, "memory": setting.memory, "ephemeral-storage": "8Gi"}
    if accelerators.count:
        limits[accelerators.resource] = str(accelerators.count)
    requests = {
        "cpu": scaled(setting.cpu, 0.25),
        "memory": scaled(setting.memory, 0.5),
        "ephemeral-storage": "1Gi",
    }
    return {"requests": requests, "limits": limits}
