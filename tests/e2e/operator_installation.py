"""The operator in the cluster of the tests: installed from manifests/operator, asked, killed; and jobs for it."""

import copy
import hashlib
import json
import subprocess
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import yaml

from tests.e2e.kube import NAMESPACE, Cluster, Refused, run, until

ROOT = Path(__file__).resolve().parents[2]
OPERATOR_NAMESPACE = "kubegraft-operator"
LEASE_SECONDS = 4  # a killed operator keeps its successor waiting for so long
SMALL = {
    "requests": {"cpu": "10m", "memory": "24Mi", "ephemeral-storage": "8Mi"},
    "limits": {"cpu": "1", "memory": "96Mi", "ephemeral-storage": "64Mi"},
}


def objects_of(directory: str) -> list[dict]:
    built = run(["kubectl", "kustomize", str(ROOT / "manifests" / directory)])
    return [one for one in yaml.safe_load_all(built) if one]


def installed(images: dict[str, str], directory: str = "operator") -> list[dict]:
    """Return the manifests of the operator with other images, and a short lease."""
    objects = objects_of(directory)
    (deployment,) = [one for one in objects if one["kind"] == "Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    container["image"] = images["operator"]
    container["args"].append(f"--lease-seconds={LEASE_SECONDS}")
    for variable in container["env"]:
        if variable["name"] == "KUBEGRAFT_TRAIN_IMAGE":
            variable["value"] = images["train"]
    return objects


class Operator:
    """The operator that is installed."""

    def __init__(self) -> None:
        self.cluster = Cluster(OPERATOR_NAMESPACE)

    def apply(self, objects: list[dict]) -> None:
        text = yaml.safe_dump_all(objects)
        self.cluster.kubectl(
            "apply", "--server-side", "--force-conflicts", "--filename", "-", content=text.encode()
        )
        self.cluster.kubectl(
            "rollout", "status", "deployment/kubegraft-operator", "--timeout=120s", seconds=130
        )
        # The definitions are served a moment after they are there.
        self.cluster.kubectl(
            "wait", "--for=condition=Established", "crd/transferjobs.kubegraft.dev", "--timeout=30s"
        )

    def remove(self, objects: list[dict]) -> None:
        text = yaml.safe_dump_all(objects)
        self.cluster.kubectl(
            "delete",
            "--filename",
            "-",
            "--ignore-not-found",
            "--timeout=100s",
            content=text.encode(),
            seconds=120,
        )

    def pods(self) -> list[str]:
        found = self.cluster.get("pods", **{"app.kubernetes.io/component": "operator"})["items"]
        return [pod["metadata"]["name"] for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def kill(self) -> None:
        """Take the operator away in the middle of whatever it does."""
        for pod in self.pods():
            self.cluster.kubectl("delete", "pod", pod, "--grace-period=0", "--force", "--ignore-not-found")

    def log(self) -> str:
        return self.cluster.kubectl("logs", "deployment/kubegraft-operator", "--tail=80")

    def metrics(self) -> str:
        (pod, *_) = self.pods()
        with (
            forwarded(OPERATOR_NAMESPACE, f"pod/{pod}", 8080) as port,
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer,
        ):
            return answer.read().decode()


@contextmanager
def forwarded(namespace: str, what: str, port: int):
    """Yield a local port that leads to one of a pod."""
    command = ["kubectl", "--namespace", namespace, "port-forward", what, f":{port}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield int(process.stdout.readline().rpartition("->")[0].strip().rpartition(":")[2])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class Jobs:
    """TransferJobs of the tests' namespace."""

    def __init__(self, cluster: Cluster, standin: str) -> None:
        self.cluster, self.standin = cluster, standin

    def of_standin(self, name: str, behaviour: str = "ok", seconds: float = 1.0, **spec) -> dict:
        """A job whose pods only say what pods say."""
        return {
            "apiVersion": "kubegraft.dev/v1alpha1",
            "kind": "TransferJob",
            "metadata": {"name": name},
            "spec": {
                "ingest": {"source": f"/standin/{behaviour}/{seconds}"},
                "nodes": 1,
                "image": self.standin,
                "resources": copy.deepcopy(SMALL),
                "artifacts": {"claim": "kubegraft-work"},
                **spec,
            },
        }

    def start(self, *jobs: dict) -> None:
        """Create jobs, where older ones of the same names are gone."""
        self.remove(*[job["metadata"]["name"] for job in jobs])
        self.cluster.apply(*jobs)

    def remove(self, *names: str) -> None:
        if names:
            self.cluster.kubectl("delete", "tj", *names, "--ignore-not-found", "--timeout=90s", seconds=100)

    def get(self, name: str) -> dict:
        return self.cluster.get("tj", name)

    def condition(self, name: str, kind: str) -> dict:
        conditions = self.get(name).get("status", {}).get("conditions", [])
        return next((one for one in conditions if one["type"] == kind), {"status": "Unknown", "reason": ""})

    def wait(self, name: str, kind: str = "Succeeded", *, seconds: float = 120, status: str = "True") -> dict:
        """Return a condition as soon as it has a status; fail with the job's story if it comes otherwise."""

        def look():
            found = {c["type"]: c for c in self.get(name).get("status", {}).get("conditions", [])}
            if found.get(kind, {}).get("status") == status:
                return found[kind]
            others = {"Succeeded", "Failed"} - {kind}
            ended = [one for other, one in found.items() if other in others and one["status"] == "True"]
            assert not ended, f"{ended}\n{self.story(name)}"
            return None

        return until(look, seconds=seconds, or_else={}) or self._fail(name, kind, status)

    def _fail(self, name: str, kind: str, status: str) -> dict:
        raise AssertionError(f"{name} is not {kind}={status}\n{self.story(name)}")

    def jobset(self, name: str) -> dict | None:
        found = self.cluster.get("jobsets", **{"kubegraft.dev/transfer-job": name})["items"]
        assert len(found) <= 1, f"{name} has {len(found)} JobSets"
        return found[0] if found else None

    def pods(self, name: str, role: str = "") -> list[dict]:
        labels = {"kubegraft.dev/transfer-job": name}
        if role:
            labels["jobset.sigs.k8s.io/replicatedjob-name"] = role
        found = self.cluster.get("pods", **labels)["items"]
        return sorted(found, key=lambda pod: pod["metadata"]["name"])

    def story(self, name: str) -> str:
        """What a person would look at."""
        parts = [self.cluster.kubectl("describe", "tj", name)[-5000:]]
        for pod in self.pods(name):
            parts.append(f"--- {pod['metadata']['name']}: {json.dumps(pod['status'])[:1500]}")
            try:
                parts.append(self.cluster.logs(pod["metadata"]["name"], "--tail=40"))
            except Refused as refusal:
                parts.append(str(refusal))
        return "\n".join([*parts, Operator().log()])


def build_standin(kind_load) -> str:
    """Build the image of the pods that only speak, tagged by what goes into it; return its name."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for name in ("standin.Dockerfile", "standin_job.py"):
        digest.update((folder / name).read_bytes())
    image = f"kubegraft-e2e-standin:{digest.hexdigest()[:12]}"
    if subprocess.run(["docker", "image", "inspect", image], capture_output=True, check=False).returncode:
        build = ["docker", "build", "--network", "host", "--file", str(folder / "standin.Dockerfile")]
        run([*build, "--tag", image, str(folder)], seconds=600)
    return kind_load(image)


__all__ = ["NAMESPACE", "Jobs", "Operator", "build_standin", "forwarded", "installed", "objects_of"]
