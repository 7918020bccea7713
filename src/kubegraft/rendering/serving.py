"""A server for the exported model: TensorFlow Serving with its Service, or KServe's InferenceService."""

from __future__ import annotations

from typing import Final

from kubegraft.rendering.pods import Manifest, Setting, container_security, labels, pod_security

SERVING_IMAGE: Final = "tensorflow/serving:2.19.1"
SERVERS: Final = ("tf-serving", "kserve")
_REST_PORT: Final = 8501
_GRPC_PORT: Final = 8500


def render_serving(setting: Setting, server: str, run_name: str) -> list[Manifest]:
    """Return what serves the model that the run of a name left on the volume.

    The answer to `POST /v1/models/<name>:predict` with `{"signature_name": "serve", "instances": [{"b64": "..."}]}`, an
    image's bytes, is its class and probabilities.

    Args:
        setting: Where it goes; `name` is also the model's in URLs.
        server: `tf-serving` or `kserve`.
        run_name: Name that the Job or CronJob was rendered with, or the directory that `run --output` made.
    """
    if server == "kserve":
        return [_inference_service(setting, run_name)]
    return [_deployment(setting, run_name), _service(setting)]


def _deployment(setting: Setting, run_name: str) -> Manifest:
    ports: list[Manifest] = [
        {"name": "grpc", "containerPort": _GRPC_PORT},
        {"name": "http", "containerPort": _REST_PORT},
    ]
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": setting.metadata("serving"),
        "spec": {
            "replicas": 1,
            "strategy": {"type": "Recreate"},  # the volume may be mountable on one node only
            "selector": {"matchLabels": _selector(setting)},
            "template": {
                "metadata": {"labels": labels("serving", setting.name)},
                "spec": _pod(setting, run_name, "tensorflow-serving", ports),
            },
        },
    }


def _service(setting: Setting) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": setting.metadata("serving"),
        "spec": {
            "selector": _selector(setting),
            "ports": [
                {"name": "grpc", "port": _GRPC_PORT, "targetPort": "grpc"},
                {"name": "http", "port": _REST_PORT, "targetPort": "http"},
            ],
        },
    }


def _inference_service(setting: Setting, run_name: str) -> Manifest:
    metadata = setting.metadata("serving")
    # A Deployment and no more: needs neither Knative nor Istio.
    metadata["annotations"] = {"serving.kserve.io/deploymentMode": "RawDeployment"}
    ports: list[Manifest] = [{"name": "http1", "containerPort": _REST_PORT, "protocol": "TCP"}]
    predictor = {
        "minReplicas": 1,
        "maxReplicas": 1,
        "labels": labels("serving", setting.name),
        **_pod(setting, run_name, "kserve-container", ports),
    }
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": metadata,
        "spec": {"predictor": predictor},
    }


def _selector(setting: Setting) -> Manifest:
    return {
        "app.kubernetes.io/component": "serving",
        "app.kubernetes.io/instance": setting.name,
    }


def _pod(setting: Setting, run_name: str, container_name: str, ports: list[Manifest]) -> Manifest:
    return {
        "serviceAccountName": setting.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_security(),
        "containers": [_container(setting, run_name, container_name, ports)],
        "volumes": [
            {"name": "work", "persistentVolumeClaim": {"claimName": setting.claim, "readOnly": True}},
            {"name": "tmp", "emptyDir": {"sizeLimit": "64Mi"}},
        ],
    }


def _container(setting: Setting, run_name: str, name: str, ports: list[Manifest]) -> Manifest:
    status = {"httpGet": {"path": f"/v1/models/{setting.name}", "port": _REST_PORT}}
    return {
        "name": name,
        "image": setting.image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["tensorflow_model_server"],
        "args": [
            f"--port={_GRPC_PORT}",
            f"--rest_api_port={_REST_PORT}",
            f"--model_name={setting.name}",
            f"--model_base_path=/models/{setting.name}",
        ],
        "ports": ports,
        "resources": {
            "requests": {"cpu": "500m", "memory": "512Mi", "ephemeral-storage": "64Mi"},
            "limits": {"cpu": setting.cpu, "memory": setting.memory, "ephemeral-storage": "256Mi"},
        },
        "startupProbe": {**status, "failureThreshold": 30, "periodSeconds": 2},
        "readinessProbe": status,
        "livenessProbe": {"tcpSocket": {"port": _REST_PORT}},
        "securityContext": container_security(),
        "volumeMounts": [
            {
                "name": "work",
                "mountPath": f"/models/{setting.name}/1",  # the number is the version that TensorFlow Serving wants
                "subPath": f"{run_name}/model/saved_model",
                "readOnly": True,
            },
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }
