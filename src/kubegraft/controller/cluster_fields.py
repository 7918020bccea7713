"""Schemas of the part of a TransferJob that the config file does not have: where and on what it runs."""

from __future__ import annotations

from typing import Any, Final

from kubegraft.controller.schema import MAX_URI, Schema, integer, structure, text

MAX_NODES: Final = 64
DEFAULT_CLAIM: Final = "kubegraft-work"  # which manifests/base makes
DEFAULT_RESOURCE: Final = "nvidia.com/gpu"
DEFAULT_SHM: Final = "2Gi"
DEFAULT_RESTARTS: Final = 3
_NAME: Final = "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
_LABEL_KEY: Final = "^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"
_QUANTITY: Final = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"
_BYTES: Final = r"^[0-9]+(\.[0-9]+)?(k|M|G|T|Ki|Mi|Gi|Ti)?$"
_MAX_SECONDS: Final = 10**9


def existing(help_text: str, default: str | None = None) -> Schema:
    """Return the schema of the name of an object that others made."""
    wrong = "This must be the name of an object: lower-case letters, digits, dashes and dots."
    return {**text(help_text, default=default, pattern=_NAME, otherwise=wrong), "minLength": 1}


def quantity(help_text: str, default: str | None = None) -> Schema:
    """Return the schema of an amount, as Kubernetes writes them: 4, 500m, 8Gi."""
    schema: Schema = {
        "description": help_text,
        "x-kubernetes-int-or-string": True,
        "anyOf": [{"type": "integer"}, {"type": "string"}],
        "pattern": _QUANTITY,
        "maxLength": 32,
    }
    return schema if default is None else {**schema, "default": default}


def _quantities(help_text: str) -> Schema:
    amount = quantity("For example 4 or 500m of CPU, 8Gi of memory.")
    return {"type": "object", "description": help_text, "maxProperties": 8, "additionalProperties": amount}


def text_map(help_text: str, most: int = 16) -> Schema:
    """Return the schema of labels, annotations or a node selector."""
    values = {"type": "string", "maxLength": 253}
    return {"type": "object", "description": help_text, "maxProperties": most, "additionalProperties": values}


def _tolerations() -> Schema:
    properties = {
        "key": text("Taint's key; with operator Exists and no key, all taints.", length=317),
        "operator": {**text("Equal compares the value, Exists does not."), "enum": ["Equal", "Exists"]},
        "value": text("Taint's value.", length=63),
        "effect": {
            **text("Taint's effect; all effects where it is missing."),
            "enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"],
        },
        "tolerationSeconds": integer("How long a NoExecute taint is tolerated, in seconds.", 0, _MAX_SECONDS),
    }
    return {
        "type": "array",
        "description": "Taints that the nodes of all pods may have.",
        "maxItems": 16,
        "x-kubernetes-list-type": "atomic",
        "items": structure("One taint that is tolerated.", properties),
    }


def _pull_secrets() -> Schema:
    return {
        "type": "array",
        "description": "Secrets with which the image is pulled.",
        "maxItems": 8,
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["name"],
        "items": structure("One Secret.", {"name": existing("Name of the Secret.")}, required=["name"]),
    }


def _reserved(name: str) -> Schema:
    return {
        "type": "object",
        "description": f"Reserved: a later version will say what `{name}` means, this one takes no value.",
        "maxProperties": 16,
        "x-kubernetes-preserve-unknown-fields": True,
    }


def _workload_properties() -> dict[str, Schema]:
    accelerators = {
        "count": integer("Accelerators of each training node; 0 trains on CPUs.", 0, 64, 0),
        "resource": text(
            "What Kubernetes calls them.", default=DEFAULT_RESOURCE, length=317, pattern=_LABEL_KEY
        ),
    }
    resources = {
        "requests": _quantities("What a node must have free for a pod."),
        "limits": _quantities("What a pod may use at most."),
    }
    return {
        "nodes": integer(
            "Pods that train together, by synchronous data parallelism; each may be on a node of its own.",
            1,
            MAX_NODES,
            1,
        ),
        "accelerators": structure("What each training pod asks its node for.", accelerators, default={}),
        "image": {
            **text("Image of all pods; without it, the operator's own version.", length=512),
            "minLength": 1,
        },
        "imagePullSecrets": _pull_secrets(),
        "resources": structure(
            "CPU, memory and disk of each pod; without it, requests of 1 CPU and 4Gi and limits of 4 CPUs and 8Gi.",
            resources,
        ),
        "nodeSelector": text_map("Labels that the nodes of all pods must have."),
        "tolerations": _tolerations(),
        "shmSize": quantity(
            "Size of /dev/shm of the training pods where they have accelerators.", DEFAULT_SHM
        ),
    }


def _storage_properties() -> dict[str, Schema]:
    artifacts = {
        "claim": existing(
            "PersistentVolumeClaim that all pods mount at /artifacts; results are in the folder of the job's name. "
            "With several nodes it must be ReadWriteMany.",
            DEFAULT_CLAIM,
        )
    }
    cache = {
        "claim": existing("PersistentVolumeClaim of the feature cache."),
        "uri": text(
            "Folder of the feature cache in a bucket.",
            length=MAX_URI,
            pattern="^(gs|s3)://[^/]+",
            otherwise="`uri` must be a folder in a bucket (gs:// or s3://). For a folder on a volume use `claim`.",
        ),
        "budget": {
            **quantity(
                "Most that the cache may take, such as 50Gi; without it, a fifth of the volume, at most 50Gi."
            ),
            "pattern": _BYTES,
        },
    }
    return {
        "artifacts": structure("Where data, checkpoints and results are.", artifacts, default={}),
        "cache": structure("Feature cache; without it, the folder `.cache` of the artifacts.", cache),
    }


def _policy_properties() -> dict[str, Schema]:
    return {
        "serviceAccountName": existing("Service account of the pods; without it, the operator's setting."),
        "secretName": existing("Secret whose keys become environment variables: credentials of buckets."),
        "queueName": existing("LocalQueue of Kueue that admits the job; without it, it starts at once."),
        "priorityClass": existing(
            "WorkloadPriorityClass with a queue, PriorityClass of the pods without one."
        ),
        "suspend": {
            "type": "boolean",
            "description": "Whether the job waits: its pods are stopped after a checkpoint, and go on from it later.",
            "default": False,
        },
        "maxRestarts": integer(
            "How often the pods are started again after an error of the program. Training pods that were killed, "
            "lost or preempted don't count.",
            0,
            100,
            DEFAULT_RESTARTS,
        ),
        "activeDeadlineSeconds": integer(
            "The job fails if it runs longer than this, in seconds.", 1, _MAX_SECONDS
        ),
        "ttlSecondsAfterFinished": integer(
            "The TransferJob is deleted so long after its end, in seconds; without it, it stays. "
            "What is on the volume stays.",
            0,
            _MAX_SECONDS,
        ),
    }


def cluster_properties() -> dict[str, Schema]:
    """Return the schemas of all that `spec` has besides the config file's fields, in order."""
    store = {
        "uri": text(
            "Folder in a bucket (gs://, s3://), or path on the volume, that the results are published to.",
            length=MAX_URI,
            pattern="^((gs|s3)://[^/]+|/artifacts/)",
            otherwise="`uri` must be a folder in a bucket, such as gs://bucket/models, or one below /artifacts/.",
        )
    }
    reserved: dict[str, Any] = {name: _reserved(name) for name in ("budget", "search", "promotion")}
    return {
        "model_store": structure("Where the finished model goes.", store, required=["uri"]),
        **reserved,
        **_workload_properties(),
        **_storage_properties(),
        **_policy_properties(),
    }
