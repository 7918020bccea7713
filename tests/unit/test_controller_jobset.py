"""The JobSet and ConfigMap that a TransferJob becomes."""

import json
import re
import subprocess
import sys

import kubernetes_validate
import pytest
import yaml

from kubegraft import cache
from kubegraft.config import HeadConfig
from kubegraft.controller import pod_template
from kubegraft.controller.jobset import (
    PRIORITY_LABEL,
    QUEUE_LABEL,
    jobset_name,
    render_config_map,
    render_jobset,
)
from kubegraft.controller.settings import Settings
from kubegraft.controller.spec import JobSpec
from tests.controller_world import SETTINGS, transfer_job

DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")


def jobs_of(job, settings=SETTINGS):
    """Return the Jobs of the JobSet's parts by name, as JobSet makes them."""
    made = render_jobset(job, settings)
    return {part["name"]: part["template"] for part in made["spec"]["replicatedJobs"]}


def container(job, role, settings=SETTINGS):
    return pod(job, role, settings)["containers"][0]


def pod(job, role, settings=SETTINGS):
    return jobs_of(job, settings)[role]["spec"]["template"]["spec"]


def variables(job, role):
    return {each["name"]: each.get("value") for each in container(job, role)["env"]}


FULL = {
    "nodes": 4,
    "accelerators": {"count": 2, "resource": "amd.com/gpu"},
    "image": "mine:1",
    "imagePullSecrets": [{"name": "registry"}],
    "resources": {"requests": {"cpu": 2}, "limits": {"memory": "4Gi"}},
    "nodeSelector": {"pool": "gpu"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "shmSize": "4Gi",
    "artifacts": {"claim": "work"},
    "cache": {"claim": "features", "budget": "5Gi"},
    "model_store": {"uri": "gs://models/signs"},
    "serviceAccountName": "trainer",
    "secretName": "buckets",
    "priorityClass": "high",
}


@pytest.mark.parametrize("spec", [{}, FULL], ids=["defaults", "everything"])
def test_kubernetes_takes_each_part_as_a_job(spec):
    for template in jobs_of(transfer_job(**spec)).values():
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, **template}
        job["metadata"] = {"name": "job", **template["metadata"]}
        kubernetes_validate.validate(job, "1.34", strict=True)
    kubernetes_validate.validate(render_config_map(transfer_job(**spec)), "1.34", strict=True)


@pytest.mark.parametrize(
    "name", ["signs", "s" * 63, "9-lives", "a-" + "b" * 32 + "-" + "c" * 20, "1", "1" * 63]
)
def test_names_of_hosts_and_pods_are_labels_of_dns(name):
    made = jobset_name(transfer_job(name))
    for longest in (f"{made}-train-0-63-abcde", f"{made}-prepare-0-0-abcde"):
        assert DNS_LABEL.fullmatch(longest), longest


def test_the_name_follows_from_the_uid_alone():
    job = transfer_job()
    changed = {**job, "metadata": {**job["metadata"], "generation": 7}, "spec": {"suspend": True}}
    another = {**job, "metadata": {**job["metadata"], "uid": "uid-2"}}
    assert jobset_name(changed) == jobset_name(job) != jobset_name(another)


def test_parts_follow_one_another():
    parts = render_jobset(transfer_job(), SETTINGS)["spec"]["replicatedJobs"]
    assert [part["name"] for part in parts] == ["prepare", "train", "finish"]
    assert "dependsOn" not in parts[0]
    assert [part["dependsOn"] for part in parts[1:]] == [
        [{"name": "prepare", "status": "Complete"}],
        [{"name": "train", "status": "Complete"}],
    ]


def test_only_the_programs_own_errors_count_in_training():
    (rule,) = jobs_of(transfer_job())["train"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    counted = rule["onExitCodes"]["values"]
    assert counted == list(range(1, 11))
    assert not {0, 75, 130, 134, 137, 143} & set(counted)
    rules = render_jobset(transfer_job(), SETTINGS)["spec"]["failurePolicy"]["rules"]
    table = {
        (role, why): each["action"]
        for each in rules
        for role in each["targetReplicatedJobs"]
        for why in each["onJobFailureReasons"]
    }
    assert table == {
        ("prepare", "PodFailurePolicy"): "FailJobSet",
        ("finish", "PodFailurePolicy"): "FailJobSet",
        ("train", "PodFailurePolicy"): "RestartJobSet",
        ("train", "BackoffLimitExceeded"): "RestartJobSetAndIgnoreMaxRestarts",
    }


def test_workers_find_each_other_by_name_and_know_their_index():
    job = transfer_job(nodes=2)
    name = jobset_name(job)
    environment = container(job, "train")["env"]
    order = [each["name"] for each in environment]
    assert order.index("TASK_INDEX") < order.index("TF_CONFIG")  # or Kubernetes would not fill it in
    told = json.loads(variables(job, "train")["TF_CONFIG"].replace("$(TASK_INDEX)", "1"))
    assert told == {
        "cluster": {"worker": [f"{name}-train-0-0.{name}:2222", f"{name}-train-0-1.{name}:2222"]},
        "task": {"type": "worker", "index": 1},
    }
    assert jobs_of(job)["train"]["spec"]["completions"] == 2
    assert "TF_CONFIG" not in variables(transfer_job(nodes=1), "train")
    assert "TF_CONFIG" not in variables(job, "prepare")


def test_only_training_gets_accelerators_and_shared_memory():
    job = transfer_job(**FULL)
    assert container(job, "train")["resources"]["limits"] == {"memory": "4Gi", "amd.com/gpu": "2"}
    assert container(job, "finish")["resources"]["limits"] == {"memory": "4Gi"}
    assert variables(job, "train")["KUBEGRAFT_REQUIRE_ACCELERATORS"] == "2"
    assert [v["name"] for v in pod(job, "train")["volumes"]][-1] == "shm"
    assert pod(job, "train")["volumes"][-1]["emptyDir"] == {"medium": "Memory", "sizeLimit": "4Gi"}
    assert [v["name"] for v in pod(job, "finish")["volumes"]][-1] == "cache"


def test_what_the_job_names_reaches_its_pods():
    job = transfer_job(**FULL)
    made = pod(job, "finish")
    assert made["containers"][0]["image"] == "mine:1"
    assert made["containers"][0]["envFrom"] == [{"secretRef": {"name": "buckets"}}]
    assert made["containers"][0]["args"][-2:] == ["--publish", "gs://models/signs"]
    assert "--publish" not in container(job, "train")["args"]
    assert (made["serviceAccountName"], made["priorityClassName"]) == ("trainer", "high")
    assert made["nodeSelector"] == {"pool": "gpu"}
    assert made["imagePullSecrets"] == [{"name": "registry"}]
    assert made["tolerations"][0] == {"key": "gpu", "operator": "Exists"}
    assert variables(job, "train")["KUBEGRAFT_CACHE"] == "/cache"
    assert variables(job, "train")["KUBEGRAFT_CACHE_BUDGET"] == "5Gi"


def test_without_a_word_the_pods_take_the_operators_settings():
    made = pod(transfer_job(), "train", Settings(image="operator:2", service_account=""))
    assert made["containers"][0]["image"] == "operator:2"
    assert "serviceAccountName" not in made
    assert variables(transfer_job(), "train")["KUBEGRAFT_CACHE"] == "/artifacts/.cache"
    assert variables(transfer_job(cache={"uri": "s3://b/c"}), "train")["KUBEGRAFT_CACHE"] == "s3://b/c"


def test_a_queue_has_its_labels_and_its_own_priority():
    job = transfer_job(queueName="team", priorityClass="high")
    labels = render_jobset(job, SETTINGS)["metadata"]["labels"]
    assert (labels[QUEUE_LABEL], labels[PRIORITY_LABEL]) == ("team", "high")
    assert "priorityClassName" not in pod(job, "train")
    assert PRIORITY_LABEL not in render_jobset(transfer_job(queueName="team"), SETTINGS)["metadata"]["labels"]


def test_pods_pass_pod_security_restricted():
    for role in ("prepare", "train", "finish"):
        made = pod(transfer_job(**FULL), role)
        assert made["securityContext"]["runAsNonRoot"] is True
        assert made["automountServiceAccountToken"] is False
        assert made["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True
        assert made["containers"][0]["terminationMessagePolicy"] == "File"


def test_the_config_map_is_the_jobs_config_file(tmp_path):
    from kubegraft.config_file import load_run_config

    job = transfer_job(seed=3, head={"backbone": "resnet_50", "learning_rate": 0.01}, nodes=2)
    made = render_config_map(job)
    path = tmp_path / "run.yaml"
    path.write_text(made["data"]["run.yaml"])
    config = load_run_config(path)
    assert config == JobSpec.of(job).run_config()
    assert config.head == HeadConfig(seed=3, backbone="resnet_50", learning_rate=0.01)
    assert made["immutable"] is True
    assert "nodes" not in yaml.safe_load(made["data"]["run.yaml"])


def test_everything_belongs_to_the_job():
    job = transfer_job()
    for made in (render_config_map(job), render_jobset(job, SETTINGS)):
        (owner,) = made["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["uid"], owner["controller"]) == ("TransferJob", "uid-signs", True)


def test_the_caches_variables_are_called_as_the_cache_calls_them():
    assert pod_template._CACHE_VARIABLE == cache.CACHE_VARIABLE
    assert pod_template._BUDGET_VARIABLE == cache.BUDGET_VARIABLE
    assert pod_template._OPEN_BUDGET == cache.OPEN_BUDGET


def test_deciding_needs_no_heavy_import():
    """The operator's memory is for jobs: what decides brings neither numpy nor a client of Kubernetes."""
    heavy = ("numpy", "yaml", "click", "kubernetes", "kopf", "tensorflow", "PIL")
    code = "import sys, kubegraft.controller.reconcile, kubegraft.controller.schedule;"
    code += f"print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
