"""What the API server says to TransferJobs and TransferSchedules, in dry runs; an upgrade of the definitions."""

import copy

import pytest
import yaml

from tests.e2e.kube import Refused, until
from tests.e2e.operator_installation import ROOT, Operator, objects_of

DRY_RUN = ("--dry-run=server",)
PREVIOUS = ROOT / "tests" / "e2e" / "transferjobs-previous.yaml"


def changed(document: dict, path: str, value) -> dict:
    found = copy.deepcopy(document)
    *parents, last = path.split(".")
    inner = found["spec"]
    for parent in parents:
        inner = inner.setdefault(parent, {})
    inner[last] = value
    return found


def sample(name: str) -> dict:
    return yaml.safe_load((ROOT / "manifests" / "samples" / f"{name}.yaml").read_text())


@pytest.mark.parametrize("name", ["transferjob", "transferschedule"])
def test_the_samples_are_accepted(name, cluster, operator):
    assert "created" in cluster.apply(sample(name), flags=DRY_RUN)


ACCEPTED = [
    ("nodes", 64),
    ("head.backbone", "resnet50"),
    ("fine_tune.learning_rate", 0.001),
    ("ingest.source", "gs://bucket/photographs"),
    ("accelerators", {"count": 8}),
    ("model_store", {"uri": "s3://bucket/models"}),
    ("tolerations", [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]),
    ("queueName", "team"),
    ("ttlSecondsAfterFinished", 0),
]


@pytest.mark.parametrize(("path", "value"), ACCEPTED, ids=[path for path, _ in ACCEPTED])
def test_what_makes_sense_is_accepted(path, value, cluster, operator):
    assert "created" in cluster.apply(changed(sample("transferjob"), path, value), flags=DRY_RUN)


REJECTED = [
    ("nodes", 0, "nodes"),
    ("nodes", 65, "nodes"),
    ("nodes", "two", "nodes"),
    ("ingest.source", "photographs", "absolute path"),
    ("budget", {"hours": 3}, "reserved"),
    ("search", {}, "reserved"),
    ("promotion", {}, "reserved"),
    ("head.dropout", 2, "dropout"),
    ("head.backbone", "", "backbone"),
    ("fine_tune.num_blocks", -2, "num_blocks"),
    ("cache", {"claim": "a", "uri": "gs://b/c"}, "not both"),
    ("artifacts", {"claim": "Not_A_Name"}, "claim"),
    ("maxRestarts", -1, "maxRestarts"),
    ("resources", {"limits": {"nvidia.com/gpu": "1"}}, "accelerators.count"),
]


@pytest.mark.parametrize(("path", "value", "word"), REJECTED, ids=[f"{p}={v}" for p, v, _ in REJECTED])
def test_nonsense_is_rejected_with_a_message_about_it(path, value, word, cluster, operator):
    with pytest.raises(Refused, match=word):
        cluster.apply(changed(sample("transferjob"), path, value), flags=DRY_RUN)


def test_a_misspelt_field_is_rejected(cluster, operator):
    with pytest.raises(Refused, match="learning_rat"):
        cluster.apply(changed(sample("transferjob"), "head.learning_rat", 0.1), flags=DRY_RUN)


def test_what_can_not_change_is_rejected_and_what_can_is_not(jobs):
    job = jobs.of_standin("fixed", suspend=True)
    jobs.start(job)
    for path, value in (("nodes", 2), ("ingest.source", "/standin/ok/2"), ("image", "other:1")):
        with pytest.raises(Refused, match=f"{path.split('.')[0]}.*can't change"):
            jobs.cluster.apply(changed(job, path, value), flags=DRY_RUN)
    for path, value in (
        ("activeDeadlineSeconds", 60),
        ("suspend", False),
        ("queueName", "q"),
    ):
        jobs.cluster.apply(changed(job, path, value), flags=DRY_RUN)
    jobs.remove("fixed")


def test_a_schedule_without_a_cron_is_rejected(cluster, operator):
    schedule = sample("transferschedule")
    del schedule["spec"]["cron"]
    with pytest.raises(Refused, match="cron"):
        cluster.apply(schedule, flags=DRY_RUN)
    with pytest.raises(Refused, match="concurrencyPolicy"):
        cluster.apply(changed(sample("transferschedule"), "concurrencyPolicy", "Perhaps"), flags=DRY_RUN)


def test_the_trainer_s_runtime_is_a_jobset(cluster, operator):
    """Its definition is Kubeflow's; what it makes must at least be what JobSet and Pod Security accept."""
    (runtime,) = [one for one in objects_of("trainer") if one["kind"] == "ClusterTrainingRuntime"]
    spec = runtime["spec"]["template"]["spec"]
    jobset = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": "runtime"},
        "spec": spec,
    }
    assert "created" in cluster.apply(jobset, flags=DRY_RUN)
    for job in spec["replicatedJobs"]:
        template = job["template"]["spec"]["template"]
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"runtime-{job['name']}"},
            "spec": template["spec"],
        }
        assert "created" in cluster.apply(pod, flags=DRY_RUN)


def define(document: dict) -> None:
    content = yaml.safe_dump(document).encode()
    Operator().cluster.kubectl(
        "apply", "--server-side", "--force-conflicts", "--filename", "-", content=content
    )


def test_jobs_of_the_definition_before_go_on_after_an_upgrade(jobs, operator):
    (now,) = [one for one in objects_of("crds") if one["metadata"]["name"].startswith("transferjobs")]
    define(yaml.safe_load(PREVIOUS.read_text()))
    try:
        jobs.start(jobs.of_standin("old", seconds=4))
        jobs.wait("old", "Running", seconds=60)
        uid = jobs.get("old")["metadata"]["uid"]
    finally:
        define(now)
    jobs.wait("old")
    job = jobs.get("old")
    assert job["metadata"]["uid"] == uid
    assert job["status"]["progress"] == 100

    def checked():
        try:
            jobs.cluster.apply(changed(jobs.of_standin("old"), "nodes", 3), flags=DRY_RUN)
        except Refused as refusal:
            return "can't change" in str(refusal)
        return False

    until(checked, seconds=20)  # the rules of the new definition hold for the old job
    jobs.remove("old")
