"""The JobSet that a TransferJob becomes, and the ConfigMap with its config.

    prepare (1 pod)  ->  train (N pods that find each other)  ->  finish (1 pod)

Names come from the TransferJob's uid alone, so that reconciling again finds what is there and never doubles it. The
JobSet is made once and never rewritten: JobSets are immutable but for `suspend`, and others (Kueue) change them, too.

How failures are told apart (docs/adr/0018-operator.md): a Job fails for one of two reasons that JobSet can act on, a
rule of its pod failure policy or its backoff limit of 0. In `prepare` and `finish` the rule is "another try can't
help" and fails the JobSet; a lost node or SIGTERM only replaces the pod. In `train` the rule is "the program failed by
itself" and restarts the JobSet, counted; every other death of a pod (killed, lost, told to go on elsewhere) ends at the
backoff limit and restarts it without counting. The Job controller (1.34, `syncJob`) looks for the rule before the
limit, so that a crash counts though its peers give up in the same moment. What another try can't help is ended by the
operator (`failures.final_failure`), as are uncounted restarts that lead nowhere (`failures.no_progress`).
"""

from __future__ import annotations

import functools
import hashlib
import json
from typing import Final

from kubegraft.controller.pod_template import CONTAINER, config_arguments, config_map, pod_spec
from kubegraft.controller.settings import Settings
from kubegraft.controller.spec import JobSpec
from kubegraft.errors import KubegraftError
from kubegraft.rendering.pods import Manifest

API_VERSION: Final = "jobset.x-k8s.io/v1alpha2"
KIND: Final = "JobSet"
PREPARE: Final = "prepare"
TRAIN: Final = "train"
FINISH: Final = "finish"
ROLES: Final = (PREPARE, TRAIN, FINISH)
QUEUE_LABEL: Final = "kueue.x-k8s.io/queue-name"
PRIORITY_LABEL: Final = "kueue.x-k8s.io/priority-class"
ROLE_LABEL: Final = "jobset.sigs.k8s.io/replicatedjob-name"
ATTEMPT_LABEL: Final = "jobset.sigs.k8s.io/restart-attempt"
PORT: Final = 2222  # which manifests/base opens
AGAIN: Final = 75  # a peer died, never came or froze
STOPPED: Final = 143  # SIGTERM, with a checkpoint
KILLED: Final = 137  # SIGKILL
_HASH_DIGITS: Final = 10
# `<JobSet>-prepare-0-0-abcde` must be a label of DNS, which has 63 characters.
_MAX_JOBSET_NAME: Final = 63 - len("-prepare-0-0-abcde")


def jobset_name(job: Manifest) -> str:
    """Return the name of the one JobSet that a TransferJob may have."""
    return _named(job["metadata"]["name"], job["metadata"].get("uid", ""))


def config_map_name(job: Manifest) -> str:
    """Return the name of the ConfigMap with its config."""
    return jobset_name(job)


@functools.lru_cache(maxsize=4096)  # asked for at each look
def _named(name: str, uid: str) -> str:
    digest = hashlib.sha256(uid.encode()).hexdigest()[:_HASH_DIGITS]
    start = name[: _MAX_JOBSET_NAME - _HASH_DIGITS - 1].rstrip("-")
    # Names of Services, which JobSet makes of it, begin with a letter.
    return f"{start}-{digest}" if start[:1].isalpha() else f"j{start[:-1] or ''}-{digest}"


@functools.cache
def final_exit_codes() -> frozenset[int]:
    """Return the exit codes after which another try can't help (docs/errors.md)."""
    kinds = _subclasses(KubegraftError) - {KubegraftError}
    return frozenset(kind.exit_code for kind in kinds if not kind.retryable)


@functools.cache
def program_exit_codes() -> frozenset[int]:
    """Return the exit codes of the program's own errors; any other end came from outside, or from a peer."""
    return frozenset(kind.exit_code for kind in _subclasses(KubegraftError)) - {AGAIN, STOPPED}


def _subclasses(kind: type[KubegraftError]) -> set[type[KubegraftError]]:
    return {kind}.union(*(_subclasses(below) for below in kind.__subclasses__()))


def render_config_map(job: Manifest) -> Manifest:
    """Return the ConfigMap with the config file of the pods.

    Raises:
        ConfigError: If the spec breaks a rule that the schema does not know.
    """
    spec = JobSpec.of(job)
    return config_map(spec, _metadata(spec, config_map_name(job)))


def _metadata(spec: JobSpec, name: str, **labels: str) -> Manifest:
    return {
        "name": name,
        "namespace": spec.namespace,
        "labels": {**spec.labels(), **labels},
        "ownerReferences": [spec.owner()],
    }


def render_jobset(job: Manifest, settings: Settings) -> Manifest:
    """Return the JobSet of a TransferJob; with a queue it is made suspended, and Kueue lets it go.

    Args:
        job: The TransferJob.
        settings: What the operator's installation chose.
    """
    spec = JobSpec.of(job)
    name = jobset_name(job)
    kueue = {QUEUE_LABEL: spec.queue} if spec.queue else {}
    if spec.queue and spec.priority_class:
        kueue[PRIORITY_LABEL] = spec.priority_class
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": _metadata(spec, name, **kueue),
        "spec": {
            "suspend": bool(spec.queue),
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "successPolicy": {"operator": "All"},
            "failurePolicy": _failure_policy(spec),
            "replicatedJobs": [_replicated_job(role, spec, name, settings) for role in ROLES],
        },
    }


def _failure_policy(spec: JobSpec) -> Manifest:
    by_exit_code = ["PodFailurePolicy"]
    return {
        "maxRestarts": spec.max_restarts,
        "rules": [
            {
                "name": "another_try_can_not_help",
                "action": "FailJobSet",
                "onJobFailureReasons": by_exit_code,
                "targetReplicatedJobs": [PREPARE, FINISH],
            },
            {
                "name": "the_program_failed",
                "action": "RestartJobSet",
                "onJobFailureReasons": by_exit_code,
                "targetReplicatedJobs": [TRAIN],
            },
            {
                "name": "the_gang_was_broken",
                "action": "RestartJobSetAndIgnoreMaxRestarts",
                "onJobFailureReasons": ["BackoffLimitExceeded"],
                "targetReplicatedJobs": [TRAIN],
            },
        ],
    }


def _replicated_job(role: str, spec: JobSpec, name: str, settings: Settings) -> Manifest:
    num_pods = spec.nodes if role == TRAIN else 1
    job: Manifest = {
        "name": role,
        "replicas": 1,
        "template": {
            "metadata": {"labels": spec.labels()},
            "spec": {
                "completionMode": "Indexed",
                "completions": num_pods,
                "parallelism": num_pods,
                "backoffLimit": 0,
                "podReplacementPolicy": "Failed",
                "podFailurePolicy": {"rules": _train_rules() if role == TRAIN else _single_pod_rules()},
                "template": {
                    "metadata": {"labels": spec.labels()},
                    "spec": _pod_spec(role, spec, name, settings),
                },
            },
        },
    }
    if role != PREPARE:
        before = ROLES[ROLES.index(role) - 1]
        job["dependsOn"] = [{"name": before, "status": "Complete"}]
    return job


def _on_exit(action: str, codes: list[int]) -> Manifest:
    return {
        "action": action,
        "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": codes},
    }


def _on_disruption(action: str) -> Manifest:
    return {"action": action, "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}


def _train_rules() -> list[Manifest]:
    return [_on_exit("FailJob", sorted(program_exit_codes()))]


def _single_pod_rules() -> list[Manifest]:
    final = sorted(final_exit_codes())
    return [_on_exit("FailJob", final), _on_exit("Ignore", [STOPPED]), _on_disruption("Ignore")]


def _pod_spec(role: str, spec: JobSpec, name: str, settings: Settings) -> Manifest:
    arguments = ["job", role, *config_arguments(spec.name)]
    if role == FINISH and spec.publish_uri:
        arguments += ["--publish", spec.publish_uri]
    pod = pod_spec(spec, settings, arguments, config_map=name, trains=role == TRAIN)
    if role == TRAIN:
        container = pod["containers"][0]
        container["ports"] = [{"name": "training", "containerPort": PORT}]
        container["env"] += _cluster_variables(spec, name) if spec.nodes > 1 else []
    return pod


def _cluster_variables(spec: JobSpec, name: str) -> list[Manifest]:
    """Return what tells a worker its place; Kubernetes fills in `$(TASK_INDEX)`, which must stand before."""
    hosts = [f"{name}-{TRAIN}-0-{index}.{name}:{PORT}" for index in range(spec.nodes)]
    cluster = json.dumps({"worker": hosts}, separators=(",", ":"))
    index = {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
    return [
        {"name": "TASK_INDEX", "valueFrom": {"fieldRef": index}},
        {
            "name": "TF_CONFIG",
            "value": f'{{"cluster":{cluster},"task":{{"type":"worker","index":$(TASK_INDEX)}}}}',
        },
    ]
