"""A pretend GPU: where our pods go, and that a task which sees none ends at once."""

import json

import pytest

from tests.e2e.kube import until

LABEL, TAINT = "kubegraft.dev/test-gpu", "nvidia.com/gpu=present:NoSchedule"
ASKING = ("--accelerator-count", "1", "--node-selector", f"{LABEL}=yes")


@pytest.fixture(scope="module")
def node(cluster):
    """A node that says it has a GPU, with the label and taint of a GPU node."""
    name = cluster.get("nodes")["items"][0]["metadata"]["name"]
    resource = "nvidia.com~1gpu"
    gpu = [{"op": "add", "path": f"/status/capacity/{resource}", "value": "1"}]
    cluster.kubectl("patch", "node", name, "--subresource=status", "--type=json", "--patch", json.dumps(gpu))
    cluster.kubectl("label", "node", name, f"{LABEL}=yes", "--overwrite")
    cluster.kubectl("taint", "node", name, TAINT, "--overwrite")
    until(lambda: cluster.get("node", name)["status"]["allocatable"].get("nvidia.com/gpu") == "1", seconds=60)
    yield name
    cluster.kubectl("taint", "node", name, "nvidia.com/gpu:NoSchedule-")
    cluster.kubectl("label", "node", name, f"{LABEL}-")
    gone = [{"op": "remove", "path": f"/status/capacity/{resource}"}]
    cluster.kubectl("patch", "node", name, "--subresource=status", "--type=json", "--patch", json.dumps(gone))


def start(cluster, rendered, name, *arguments, tolerant=True):
    objects = rendered("job", "sample://digits", "--name", name, *arguments)
    (job,) = [one for one in objects if one["kind"] == "Job"]
    if not tolerant:
        del job["spec"]["template"]["spec"]["tolerations"]
    cluster.apply(*objects)
    return job["metadata"]["name"]


def why_pending(cluster, job):
    pods = cluster.pods_of(job)
    conditions = pods[0]["status"].get("conditions", []) if pods else []
    return next(
        (c.get("message", "") for c in conditions if c["type"] == "PodScheduled" and c["status"] == "False"),
        "",
    )


@pytest.mark.parametrize(
    ("arguments", "tolerant", "reason"),
    [
        (ASKING, False, "untolerated taint"),
        (("--accelerator-count", "1", "--node-selector", "kubegraft.dev/no-such=node"), True, "selector"),
        (("--accelerator-count", "2"), True, "nvidia.com/gpu"),
    ],
    ids=["no toleration", "another selector", "more than there are"],
)
def test_a_pod_that_does_not_fit_stays_pending_and_says_why(
    cluster, toolbox, node, rendered, arguments, tolerant, reason
):
    job = start(cluster, rendered, "waiting", *arguments, tolerant=tolerant)
    assert reason in until(lambda: why_pending(cluster, job), seconds=60)
    cluster.kubectl("delete", "job", job, "--wait=true")


def test_with_selector_and_toleration_it_is_scheduled_and_ends_at_once_for_want_of_a_gpu(
    cluster, toolbox, node, rendered
):
    job = start(cluster, rendered, "asking", *ASKING)
    cluster.wait_for_job(job, "Failed", seconds=180)
    (pod,) = cluster.pods_of(job)
    assert pod["spec"]["nodeName"] == node
    assert pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    ended = pod["status"]["containerStatuses"][0]["state"]["terminated"]
    assert ended["exitCode"] == 9
    said = cluster.logs(pod["metadata"]["name"])
    assert "accelerator" in said.splitlines()[-1].lower()
    assert "train_head" not in said
