"""A TransferJob trains on photographs on two workers, and whatever is killed comes to the same weights.

Variables: KUBEGRAFT_E2E_ROUNDS, how many more times a training is disturbed, by chance (default 0).
"""

import json
import os
import random
import sys
import time

import pytest
import yaml

from tests.e2e.conftest import is_one_of_few
from tests.e2e.kube import Refused, archive, run, until
from tests.e2e.operator_installation import ROOT, Jobs

ROUNDS = int(os.environ.get("KUBEGRAFT_E2E_ROUNDS", "0"))
PHOTOGRAPHS = "/artifacts/data/photographs"
# Both phases in epochs, long enough to be killed in the middle of.
CONFIG = {
    "seed": 6,
    "head": {
        "backbone": "efficientnet_lite0",
        "input_size": 96,
        "solver": "adamw",
        "num_epochs": 120,
        "patience": 120,
        "checkpoint_interval_seconds": 1,
    },
    "fine_tune": {"num_blocks": 3, "num_epochs": 30, "patience": 30, "checkpoint_interval_seconds": 1},
    "evaluate": {"num_bootstrap_samples": 200},
}
RESOURCES = {
    "requests": {"cpu": "100m", "memory": "512Mi", "ephemeral-storage": "64Mi"},
    "limits": {"cpu": "2", "memory": "3Gi", "ephemeral-storage": "2Gi"},
}
WEIGHTS = """
import hashlib, io, sys, zipfile, h5py
digest = hashlib.sha256()
with zipfile.ZipFile(sys.argv[1]) as model:
    weights = h5py.File(io.BytesIO(model.read("model.weights.h5")))
names = []
weights.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
for name in sorted(names):
    digest.update(name.encode() + weights[name][()].tobytes())
print(len(names), digest.hexdigest())
"""


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((ROOT / "manifests" / "samples" / name).read_text()))


@pytest.fixture(scope="module")
def loaded(cluster, image, photographs, operator):
    """Load photographs as the sample says; return the pod that has them."""
    objects = documents("loader.yaml")
    (job,) = [one for one in objects if one["kind"] == "Job"]
    pod = job["spec"]["template"]["spec"]
    pod["containers"][0]["image"] = image
    cluster.kubectl("delete", "job/kubegraft-loader", "--ignore-not-found", "--timeout=60s")
    cluster.apply(*objects)
    label = "batch.kubernetes.io/job-name=kubegraft-loader"
    until(lambda: cluster.pods_of("kubegraft-loader"), seconds=30)
    cluster.kubectl("wait", "--for=condition=Ready", "pod", "-l", label, "--timeout=180s", seconds=200)
    said = cluster.execute(
        "job/kubegraft-loader", "kubegraft-load", content=archive(photographs, is_one_of_few)
    )
    assert PHOTOGRAPHS in said
    cluster.wait_for_job("kubegraft-loader", seconds=60)
    return said


@pytest.fixture(scope="module")
def training(cluster, image, operator, loaded, jobs) -> Jobs:
    yield jobs
    jobs.remove("photographs", "gang-calm", "gang-stormy")


def in_pod(cluster, image, name, *command) -> str:
    """Run a command in a pod with the volume at /artifacts, and return what it prints."""
    (_, job) = documents("loader.yaml")
    spec = job["spec"]["template"]["spec"]
    container = spec["containers"][0]
    container |= {"image": image, "command": list(command), "volumeMounts": container["volumeMounts"][:1]}
    container["resources"]["limits"] = {"cpu": "2", "memory": "2Gi", "ephemeral-storage": "256Mi"}
    container["volumeMounts"].append({"name": "tmp", "mountPath": "/tmp"})
    spec["volumes"] = [spec["volumes"][0], {"name": "tmp", "emptyDir": {}}]
    cluster.kubectl("delete", "pod", name, "--ignore-not-found", "--timeout=60s")
    cluster.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec})
    ended = until(
        lambda: (phase := cluster.get("pod", name)["status"]["phase"]) in ("Succeeded", "Failed") and phase,
        seconds=120,
    )
    said = cluster.logs(name)
    assert ended == "Succeeded", said
    cluster.kubectl("delete", "pod", name, "--wait=false")
    return said


def test_the_sample_trains_on_two_workers_to_a_model_that_knows_an_unseen_photograph(
    training, cluster, image, photographs
):
    (job,) = documents("transferjob.yaml")
    assert job["spec"]["nodes"] == 2
    job["spec"]["image"] = image  # as KUBEGRAFT_TRAIN_IMAGE of the operator would
    training.start(job)
    stages = set()

    def ended():
        found = training.get("photographs")
        stages.add(found.get("status", {}).get("stage", ""))
        true = [c["type"] for c in found.get("status", {}).get("conditions", ()) if c["status"] == "True"]
        return {"Succeeded", "Failed"} & set(true)

    assert until(ended, seconds=300, or_else={"nothing"}) == {"Succeeded"}, training.story("photographs")
    status = training.get("photographs")["status"]
    assert {"train_head", "fine_tune"} & stages
    assert float(status["metrics"]["testAccuracy"]) > 0.5
    assert status.get("restarts", 0) == 0
    unseen = [
        f"{PHOTOGRAPHS}/validation/{folder.name}/{name.name}"
        for folder in sorted((photographs / "validation").iterdir())
        for name in sorted(folder.iterdir())
        if is_one_of_few(name.relative_to(photographs))
    ]
    said = in_pod(cluster, image, "asks", "kubegraft", "predict", status["modelUri"], *unseen[:20], "--json")
    answers = json.loads(said[said.index("[") :])
    right = [answer["path"].split("/")[-2] == answer["class"] for answer in answers]
    assert sum(right) >= 0.6 * len(right), answers


def disturbable(training, name, image) -> dict:
    found = training.of_standin(name, nodes=2, image=image, resources=RESOURCES, maxRestarts=20, **CONFIG)
    found["spec"]["ingest"] = {"source": PHOTOGRAPHS}
    return found


def weights(cluster, image, name) -> str:
    path = f"/artifacts/{name}/fine-tune/model/model.keras"
    return in_pod(cluster, image, f"weighs-{name}", "python3", "-c", WEIGHTS, path).splitlines()[-1]


class Disturbed:
    """A training, and what happens to it."""

    def __init__(self, jobs: Jobs, name: str) -> None:
        self.jobs, self.name, self.kills = jobs, name, 0

    def pod(self, index: int) -> dict | None:
        """Return the worker that runs now."""
        for pod in self.jobs.pods(self.name, "train"):
            number = pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"]
            if number == str(index) and "deletionTimestamp" not in pod["metadata"]:
                state = (pod["status"].get("containerStatuses") or [{}])[0].get("state", {})
                return pod if "running" in state else None
        return None

    def at_work(self, stage: str) -> bool:
        """Wait until the chief that runs now is in the middle of a stage; return whether that came."""

        def look():
            assert self.jobs.condition(self.name, "Failed")["status"] != "True", self.jobs.story(self.name)
            if self.jobs.condition(self.name, "Succeeded")["status"] == "True":
                return "over"
            chief = self.pod(0)
            if chief is None or self.pod(1) is None:
                return None
            try:
                lines = self.jobs.cluster.logs(chief["metadata"]["name"], "--tail=200").splitlines()
            except Refused:
                return None
            reports = [json.loads(line)["kubegraft_report"] for line in lines if "kubegraft_report" in line]
            last = reports[-1] if reports else {"stage": "", "progress": 0}
            if last["stage"] == "fine_tune" and stage == "train_head":
                return "over"
            return "there" if last["stage"] == stage and 40 <= last["progress"] < 100 else None

        return until(look, seconds=200) == "there"

    def kill(self, index: int) -> None:
        """SIGKILL a worker's process, as the kernel would."""
        self.signal(self.pod(index), "KILL")

    def freeze(self, index: int) -> None:
        """Stop a worker's process; it lives, and answers nobody any more."""
        self.signal(self.pod(index), "STOP")

    def signal(self, pod: dict, name: str) -> None:
        container = pod["status"]["containerStatuses"][0]["containerID"].rpartition("/")[2]
        script = f"grep -l {container} /proc/[0-9]*/cgroup | cut -d/ -f3 | xargs -r kill -{name}"
        run(["docker", "exec", pod["spec"]["nodeName"], "sh", "-c", script])
        self.gone(pod)

    def part(self, index: int) -> None:
        """Lose all packets to a worker, which lives."""
        pod = self.pod(index)
        route = ["docker", "exec", pod["spec"]["nodeName"], "ip", "route"]
        target = f"{pod['status']['podIP']}/32"
        run([*route, "replace", "blackhole", target])
        try:
            self.gone(pod)
        finally:
            run([*route, "delete", "blackhole", target])

    def delete(self, index: int) -> None:
        pod = self.pod(index)
        self.jobs.cluster.kubectl("delete", "pod", pod["metadata"]["name"], "--wait=false")
        self.gone(pod)

    def gone(self, pod: dict) -> None:
        """Wait until the gang has been started anew."""
        uid = pod["metadata"]["uid"]
        until(lambda: (new := self.pod(0)) and self.pod(1) and new and uid not in self.uids(), seconds=120)
        self.kills += 1

    def uids(self) -> set[str]:
        pods = self.jobs.pods(self.name, "train")
        return {pod["metadata"]["uid"] for pod in pods}


def accuracies(status: dict) -> dict[str, str]:
    return {name: value for name, value in status["metrics"].items() if "Accuracy" in name}


def test_killed_deleted_frozen_and_parted_workers_end_in_the_weights_of_an_undisturbed_training(
    training, cluster, image
):
    training.start(disturbable(training, "gang-calm", image))
    training.wait("gang-calm", seconds=400)
    undisturbed = weights(cluster, image, "gang-calm")
    training.start(disturbable(training, "gang-stormy", image))
    stormy = Disturbed(training, "gang-stormy")
    chance = random.Random(6)
    disturbances = [stormy.kill, stormy.delete, stormy.freeze, stormy.part]
    plan = [("train_head", stormy.kill, 1), ("fine_tune", stormy.delete, 0), ("fine_tune", stormy.part, 1)]
    for _ in range(ROUNDS):
        stage = chance.choice(["train_head", "fine_tune"])
        plan.append((stage, chance.choice(disturbances), chance.randrange(2)))
    plan.sort(key=lambda one: one[0], reverse=True)  # the head comes first
    for stage, disturb, index in plan:
        if stormy.at_work(stage):
            started = time.monotonic()
            disturb(index)
            seconds = time.monotonic() - started
            sys.stdout.write(f"{disturb.__name__} {index} in {stage}: again in {seconds:.0f} s\n")
    assert stormy.kills >= 2
    training.wait("gang-stormy", seconds=400)
    status = training.get("gang-stormy")["status"]
    assert status["restarts"] >= stormy.kills
    assert weights(cluster, image, "gang-stormy") == undisturbed
    calm = training.get("gang-calm")["status"]
    assert accuracies(status) == accuracies(calm)


def test_data_that_can_not_be_used_is_told_within_a_minute(training, image):
    name = "no-data"
    job = disturbable(training, name, image)
    job["spec"]["ingest"]["source"] = "/artifacts/data/nothing"
    training.start(job)
    condition = training.wait(name, "Failed", seconds=60)
    assert condition["reason"] in ("DataRejected", "ConfigRejected")
    assert "/artifacts/data/nothing" in condition["message"]
    training.remove(name)
