"""A training that loses its pod again and again ends as one that nobody disturbed."""

import contextlib
import json
import subprocess

import pytest

from tests.e2e.conftest import QUICK, named
from tests.e2e.kube import Refused, until

# Epochs enough for three ends and three beginnings; on kept activations one takes less than a second.
CONFIG = {
    **QUICK,
    "fine_tune": {**QUICK["fine_tune"], "num_epochs": 60, "num_blocks": 5, "patience": 60},
}
# What is in a memory-backed volume counts as the pod's memory, whoever wrote it, and the largest process pays for it.
FILL_MEMORY = """
with open("/ballast/full", "wb", buffering=0) as file:
    while True:
        file.write(bytes(32 << 20))
"""


def progress(events):
    return [
        event for event in events if event["stage"] == "fine_tune" and event["event"] in ("epoch", "progress")
    ]


class Disturbed:
    def __init__(self, cluster, job):
        self.cluster, self.job = cluster, job

    def training_pod(self, *known):
        """Wait for a pod that is none of `known` and has trained an epoch or more; return its name."""

        def look():
            for pod in self.cluster.pods_of(self.job):
                name = pod["metadata"]["name"]
                if name in known or pod["status"]["phase"] == "Pending":
                    continue
                assert pod["status"]["phase"] == "Running", self.cluster.story(self.job)
                return name if progress(self.cluster.events_of(name)) else None
            return None

        return until(look, seconds=300)

    def status(self, pod):
        try:
            return self.cluster.get("pod", pod)["status"]
        except Refused:
            return {"phase": "gone"}


@pytest.fixture(scope="module")
def results(cluster, toolbox, rendered):
    """Run the same training twice, one of them disturbed; return the summaries of both and what was seen."""
    calm, stormy = (
        rendered("job", "/workspace/data/few", "--name", name, config=CONFIG) for name in ("calm", "stormy")
    )
    for objects in (calm, stormy):
        with_ballast(objects)
    cluster.apply(*stormy)
    disturbed = Disturbed(cluster, named(stormy, "Job"))
    killed = disturbed.training_pod()
    cluster.kubectl("delete", "pod", killed, "--grace-period=0", "--force")
    evicted = disturbed.training_pod(killed)
    cluster.kubectl("create", "--raw", f"/api/v1/namespaces/{cluster.namespace}/pods/{evicted}/eviction", "-f", "-",
                    content=eviction(evicted, cluster.namespace))  # fmt: skip
    starved = disturbed.training_pod(killed, evicted)
    with contextlib.suppress(Refused, subprocess.TimeoutExpired):
        cluster.execute(starved, "python3", "-c", FILL_MEMORY, seconds=60)
    ended = until(
        lambda: (
            disturbed.status(starved).get("containerStatuses", [{}])[0].get("state", {}).get("terminated")
        ),
        seconds=60,
    )
    cluster.wait_for_job(disturbed.job, seconds=400)
    cluster.apply(*calm)
    cluster.wait_for_job(named(calm, "Job"), seconds=400)
    summaries = {
        name: json.loads(cluster.execute(toolbox, "cat", f"/workspace/{name}/run.json"))
        for name in ("calm", "stormy")
    }
    last = cluster.pods_of(disturbed.job)[-1]["metadata"]["name"]
    return summaries, ended, list(cluster.events_of(last))


def with_ballast(objects):
    """Give a job's pod a volume in memory, without a bound of its own."""
    (job,) = [one for one in objects if one["kind"] == "Job"]
    pod = job["spec"]["template"]["spec"]
    pod["volumes"].append({"name": "ballast", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}})
    pod["containers"][0]["volumeMounts"].append({"name": "ballast", "mountPath": "/ballast"})


def eviction(pod, namespace):
    return json.dumps({
        "apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": namespace},
    }).encode()  # fmt: skip


def test_killed_evicted_and_out_of_memory_it_ends_with_the_same_model(results):
    summaries, _, _ = results
    assert summaries["stormy"]["digests"] == summaries["calm"]["digests"]
    assert summaries["stormy"]["test"] == summaries["calm"]["test"]


def test_running_out_of_memory_is_seen_as_such_and_tried_again(results):
    _, ended, _ = results
    assert ended["reason"] == "OOMKilled"
    assert ended["exitCode"] in (1, 137)  # of the run, whose stage was killed, or of the run itself


def test_the_last_pod_went_on_from_a_checkpoint(results):
    _, _, events = results
    assert any("resum" in event["event"] or "continu" in event["event"] for event in events)
    assert not [event for event in events if event["stage"] == "ingest" and event["event"] == "progress"]
