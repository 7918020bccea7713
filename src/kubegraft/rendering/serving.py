"""A server for the exported model: TensorFlow Serving, kubegraft's own, or KServe's InferenceService."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kubegraft.cluster_inputs import check_bucket_folder
from kubegraft.errors import ConfigError
from kubegraft.rendering.pods import Manifest, Setting, at_most, container_security, labels, pod_security
from kubegraft.storage import public_uri

SERVING_IMAGE: Final = "tensorflow/serving:2.19.1"
SERVERS: Final = ("tf-serving", "kubegraft", "kserve")
_REST_PORT: Final = 8501
_GRPC_PORT: Final = 8500
_PORTS: Final = {"grpc": _GRPC_PORT, "http": _REST_PORT}
# kubegraft's server answers for 25 s what it has begun, after 5 s in which the Service forgets the pod.
_FORGET_SECONDS: Final = 5
_GRACE_SECONDS: Final = 35
# In what a run leaves or publishes.
_MODEL: Final = "model"
_SAVED_MODEL: Final = "model/saved_model"
_FETCHED: Final = "published"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """Where the model is that is served: on the volume, or in a bucket.

    Attributes:
        run_name: Name that the Job or CronJob was rendered with, or the directory that `run --output` made.
        uri: Folder that `run --publish` wrote, `gs://` or `s3://`; "" for the volume.
        fetch_image: Image of the tasks, whose `kubegraft fetch` brings the model from the bucket.
        secret: Secret whose keys become variables of that container; "" for none.
    """

    run_name: str = "kubegraft"
    uri: str = ""
    fetch_image: str = ""
    secret: str = ""

    def __post_init__(self) -> None:
        """Check the choices.

        Raises:
            ConfigError: If the folder is not in a bucket.
        """
        if not self.uri:
            return
        if not self.uri.startswith(("gs://", "s3://")):
            raise ConfigError(
                f"`model` must be a gs:// or s3:// folder, which `kubegraft run --publish` wrote. Received: "
                f"model={public_uri(self.uri)!r}. For a model on the volume give --run NAME."
            )
        check_bucket_folder("model", self.uri)

    @property
    def volume_name(self) -> str:
        """Name of the pod's volume that has the model."""
        return "model" if self.uri else "work"

    def mount(self, part: str, path: str) -> Manifest:
        """Return how a part of what the run left is mounted at `path`."""
        sub_path = f"{_FETCHED if self.uri else self.run_name}/{part}"
        return {"name": self.volume_name, "mountPath": path, "subPath": sub_path, "readOnly": True}


def render_serving(setting: Setting, server: str, model: ServedModel) -> list[Manifest]:
    """Return what serves a model that a run has exported.

    From a bucket an init container fetches it, whole and verified, to the pod's own disk: TensorFlow Serving reads
    gs:// and s3:// in some builds only, and file by file. A new pod fetches what is published then.

    The answer to `POST /v1/models/<name>:predict` with `{"signature_name": "serve", "instances": [{"b64": "..."}]}`, an
    image's bytes, is its class and probabilities.

    Args:
        setting: Where it goes; `name` is also the model's in URLs.
        server: `tf-serving`; `kubegraft`, which is in the image of the tasks and speaks the same protocol, for
            clusters that can't pull TensorFlow Serving's; or `kserve`.
        model: Where the model is.
    """
    if not model.uri:
        setting.require_claim(", or --model gs://bucket/folder")
    policies = [_egress_policy(setting)] if model.uri else []
    if server == "kserve":
        ports: list[Manifest] = [{"name": "http1", "containerPort": _REST_PORT, "protocol": "TCP"}]
        pod = _pod(
            setting, model, _SAVED_MODEL, _tensorflow_serving(setting, model, "kserve-container", ports)
        )
        return [_inference_service(setting, pod), *policies]
    http = {"name": "http", "containerPort": _REST_PORT}
    if server == "kubegraft":
        pod = _pod(setting, model, _MODEL, _own_server(setting, model, [http]))
        pod["terminationGracePeriodSeconds"] = _GRACE_SECONDS
        return [_deployment(setting, model, pod), _service(setting, "http"), *policies]
    grpc = {"name": "grpc", "containerPort": _GRPC_PORT}
    pod = _pod(
        setting, model, _SAVED_MODEL, _tensorflow_serving(setting, model, "tensorflow-serving", [grpc, http])
    )
    return [_deployment(setting, model, pod), _service(setting, "grpc", "http"), *policies]


def _deployment(setting: Setting, model: ServedModel, pod: Manifest) -> Manifest:
    # The volume may be mountable on one node only; what each pod fetches for itself can be replaced without a pause.
    strategy = {} if model.uri else {"strategy": {"type": "Recreate"}}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": setting.metadata("serving"),
        "spec": {
            "replicas": 1,
            **strategy,
            "selector": {"matchLabels": _selector(setting)},
            "template": {
                "metadata": {"labels": labels("serving", setting.name)},
                "spec": pod,
            },
        },
    }


def _service(setting: Setting, *names: str) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": setting.metadata("serving"),
        "spec": {
            "selector": _selector(setting),
            "ports": [{"name": name, "port": _PORTS[name], "targetPort": name} for name in names],
        },
    }


def _inference_service(setting: Setting, pod: Manifest) -> Manifest:
    metadata = setting.metadata("serving")
    # A Deployment and no more: needs neither Knative nor Istio.
    metadata["annotations"] = {"serving.kserve.io/deploymentMode": "RawDeployment"}
    predictor = {
        "minReplicas": 1,
        "maxReplicas": 1,
        "labels": labels("serving", setting.name),
        **pod,
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


def _egress_policy(setting: Setting) -> Manifest:
    """Return the way out to a bucket, which manifests/ opens for tasks and not for servers."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": setting.metadata("serving", f"{setting.name}-fetch"),
        "spec": {
            "podSelector": {"matchLabels": _selector(setting)},
            "policyTypes": ["Egress"],
            "egress": [
                {
                    "to": [
                        {"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}},
                        {"ipBlock": {"cidr": "::/0", "except": ["fe80::/10", "fd00:ec2::254/128"]}},
                    ],
                    "ports": [{"protocol": "TCP", "port": 80}, {"protocol": "TCP", "port": 443}],
                }
            ],
        },
    }


def _pod(setting: Setting, model: ServedModel, part: str, container: Manifest) -> Manifest:
    if model.uri:
        volume: Manifest = {"name": "model", "emptyDir": {"sizeLimit": "4Gi"}}
    else:
        volume = {"name": "work", "persistentVolumeClaim": {"claimName": setting.claim, "readOnly": True}}
    return {
        "serviceAccountName": setting.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_security(),
        **({"initContainers": [_fetching(model, part)]} if model.uri else {}),
        "containers": [container],
        "volumes": [volume, {"name": "tmp", "emptyDir": {"sizeLimit": "64Mi"}}],
    }


def _fetching(model: ServedModel, part: str) -> Manifest:
    container: Manifest = {
        "name": "fetch",
        "image": model.fetch_image,
        "imagePullPolicy": "IfNotPresent",
        # A pod whose node was restarted runs this again, beside what it fetched before.
        "args": ["fetch", model.uri, f"/fetched/{_FETCHED}", "--only", part, "--replace"],
        "env": [{"name": "KUBEGRAFT_LOG_FORMAT", "value": "json"}],
        "resources": {
            "requests": {"cpu": "250m", "memory": "256Mi", "ephemeral-storage": "512Mi"},
            "limits": {"cpu": "1", "memory": "1Gi", "ephemeral-storage": "4Gi"},
        },
        "securityContext": container_security(),
        "volumeMounts": [
            {"name": "model", "mountPath": "/fetched"},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }
    if model.secret:
        container["envFrom"] = [{"secretRef": {"name": model.secret}}]
    return container


def _tensorflow_serving(setting: Setting, model: ServedModel, name: str, ports: list[Manifest]) -> Manifest:
    status = _status(setting)
    return {
        **_container(setting, model, name, ports),
        "command": ["tensorflow_model_server"],
        "args": [
            f"--port={_GRPC_PORT}",
            f"--rest_api_port={_REST_PORT}",
            f"--model_name={setting.name}",
            f"--model_base_path=/models/{setting.name}",
        ],
        "startupProbe": {**status, "failureThreshold": 30, "periodSeconds": 2},
        "readinessProbe": status,
        "livenessProbe": {"tcpSocket": {"port": _REST_PORT}},
        "volumeMounts": [
            # The number is the version that TensorFlow Serving wants.
            model.mount(_SAVED_MODEL, f"/models/{setting.name}/1"),
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }


def _own_server(setting: Setting, model: ServedModel, ports: list[Manifest]) -> Manifest:
    status = _status(setting)
    return {
        **_container(setting, model, "kubegraft", ports),
        "args": ["serve", f"/models/{setting.name}", "--name", setting.name, "--port", str(_REST_PORT)],
        "env": [{"name": "KUBEGRAFT_LOG_FORMAT", "value": "json"}],
        "lifecycle": {"preStop": {"sleep": {"seconds": _FORGET_SECONDS}}},
        "startupProbe": {**status, "failureThreshold": 60, "periodSeconds": 2},
        "readinessProbe": status,
        "livenessProbe": {"httpGet": {"path": "/healthz", "port": _REST_PORT}, "timeoutSeconds": 5},
        "volumeMounts": [
            # All of it: the server refuses a model whose verification.json says that it answers wrongly.
            model.mount(_MODEL, f"/models/{setting.name}"),
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }


def _status(setting: Setting) -> Manifest:
    return {"httpGet": {"path": f"/v1/models/{setting.name}", "port": _REST_PORT}}


def _container(setting: Setting, model: ServedModel, name: str, ports: list[Manifest]) -> Manifest:
    # What is fetched to the pod's own disk counts as its containers'.
    disk = ("512Mi", "4Gi") if model.uri else ("64Mi", "256Mi")
    return {
        "name": name,
        "image": setting.image,
        "imagePullPolicy": "IfNotPresent",
        "ports": ports,
        "resources": {
            "requests": {
                "cpu": at_most("500m", setting.cpu),
                "memory": at_most("512Mi", setting.memory),
                "ephemeral-storage": disk[0],
            },
            "limits": {"cpu": setting.cpu, "memory": setting.memory, "ephemeral-storage": disk[1]},
        },
        "securityContext": container_security(),
    }
