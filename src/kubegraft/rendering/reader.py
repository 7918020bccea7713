"""A pod that does nothing but hold the volume, so that `kubectl cp` can take from it what a run left there."""

from __future__ import annotations

from typing import Final

from kubegraft.rendering.pods import Manifest, Setting, at_most, container_security, pod_security

_LIFE_SECONDS: Final = 3600


def render_reader(setting: Setting) -> list[Manifest]:
    """Return a pod `<name>-reader` with the volume, read-only, at /workspace; it ends by itself after an hour.

    `kubectl cp` needs `tar` in the pod, which the image of the tasks has. The pod's label is none that a network
    policy of manifests/ opens anything for.
    """
    setting.require_claim()
    name = f"{setting.name}-reader"
    container = {
        "name": "reader",
        "image": setting.image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["sleep", str(_LIFE_SECONDS)],
        "resources": {
            "requests": {
                "cpu": at_most("50m", setting.cpu),
                "memory": at_most("64Mi", setting.memory),
                "ephemeral-storage": "64Mi",
            },
            "limits": {"cpu": setting.cpu, "memory": setting.memory, "ephemeral-storage": "64Mi"},
        },
        "securityContext": container_security(),
        "volumeMounts": [{"name": "work", "mountPath": "/workspace", "readOnly": True}],
    }
    spec = {
        "serviceAccountName": setting.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "restartPolicy": "Never",
        "activeDeadlineSeconds": _LIFE_SECONDS,
        "terminationGracePeriodSeconds": 0,
        "securityContext": pod_security(),
        "containers": [container],
        "volumes": [
            {"name": "work", "persistentVolumeClaim": {"claimName": setting.claim, "readOnly": True}},
        ],
    }
    return [
        {"apiVersion": "v1", "kind": "Pod", "metadata": setting.metadata("reader", name), "spec": spec},
    ]
