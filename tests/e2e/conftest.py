"""What cluster tests share: the images, the overlay in the cluster, data on its volume, and object stores in it.

The cluster is that of the current KUBECONFIG. Variables: KUBEGRAFT_E2E_IMAGE, an image that the nodes can get, in
place of building one and loading it into kind; KUBEGRAFT_E2E_DATA, photographs in place of ../shared/data/signs.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.e2e.kube import NAMESPACE, Cluster, Refused, archive, restricted_pod, run, secret, until
from tests.e2e.operator_installation import Jobs, Operator, build_standin, installed

ROOT = Path(__file__).resolve().parents[2]
BUCKET = "photographs"
ACCESS_KEY = "AKIDKUBEGRAFTE2E"
SECRET_KEY = "wJalrXUtnFEMI-never-to-be-seen"
# Small enough for two cores; everything else is chosen as for any user.
QUICK = {
    "head": {"input_size": 96, "num_epochs": 8, "checkpoint_interval_seconds": 1},
    "fine_tune": {"num_epochs": 2, "num_blocks": 3, "checkpoint_interval_seconds": 1},
    "evaluate": {"num_bootstrap_samples": 200},
}


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def kind_cluster() -> str:
    """Return the name of the kind cluster of the current context."""
    context = run(["kubectl", "config", "current-context"]).strip()
    if not context.startswith("kind-"):
        pytest.fail(
            f"The current context must be of a kind cluster, or KUBEGRAFT_E2E_IMAGE must name an image that the nodes "
            f"can get. Received: context {context!r}."
        )
    return context.removeprefix("kind-")


def load(kind_cluster: str, image: str) -> str:
    run(["kind", "load", "docker-image", image, "--name", kind_cluster], seconds=600)
    return image


@pytest.fixture(scope="session")
def image(request) -> str:
    """Return the train image, built from this checkout and loaded into the cluster."""
    if named := os.environ.get("KUBEGRAFT_E2E_IMAGE"):
        return named
    flags = os.environ.get("DOCKER_FLAGS", "--network host")
    make = ["make", "--directory", str(ROOT), "--no-print-directory", "images", f"PYTHON={sys.executable}"]
    said = run([*make, f"DOCKER_FLAGS={flags}"], seconds=1500)
    name = said.splitlines()[-1].split()[0]
    return load(request.getfixturevalue("kind_cluster"), name)


@pytest.fixture(scope="session")
def operator_image(request) -> str:
    """Return the operator's image, built from this checkout and loaded into the cluster."""
    if named := os.environ.get("KUBEGRAFT_E2E_OPERATOR_IMAGE"):
        return named
    flags = os.environ.get("DOCKER_FLAGS", "--network host")
    make = ["make", "--directory", str(ROOT), "--no-print-directory", "images", f"PYTHON={sys.executable}"]
    said = run([*make, "TARGETS=operator", f"DOCKER_FLAGS={flags}"], seconds=900)
    return load(request.getfixturevalue("kind_cluster"), said.splitlines()[-1].split()[0])


@pytest.fixture(scope="session")
def operator(cluster, operator_image) -> Operator:
    """Return the operator, installed for all namespaces; skip where there is no JobSet for it to make."""
    try:
        cluster.kubectl("get", "crd", "jobsets.jobset.x-k8s.io")
    except Refused:
        pytest.skip(
            "The operator's tests need JobSet: https://jobset.sigs.k8s.io; on the testbed, `install-jobset`."
        )
    operator = Operator()
    train = os.environ.get("KUBEGRAFT_E2E_IMAGE") or "kubegraft-train:none"
    objects = installed({"operator": operator_image, "train": train})
    operator.remove(objects)
    operator.apply(objects)
    yield operator
    operator.remove(objects)


@pytest.fixture(scope="session")
def standin_image(kind_cluster) -> str:
    """Return an image whose pods say what pods of a job say, and train nothing."""
    return build_standin(lambda image: load(kind_cluster, image))


@pytest.fixture(scope="session")
def jobs(cluster, operator, standin_image) -> Jobs:
    """Return what makes TransferJobs and looks at them."""
    return Jobs(cluster, standin_image)


@pytest.fixture(scope="session")
def servers_image(kind_cluster, tmp_path_factory) -> str:
    """Return an image with object stores, tagged by what goes into it."""
    context = tmp_path_factory.mktemp("servers")
    digest = hashlib.sha256()
    for path in (ROOT / "tests" / "e2e" / "servers.Dockerfile", ROOT / "constraints.txt"):
        digest.update(path.read_bytes())
        shutil.copy(path, context)
    name = f"kubegraft-e2e-servers:{digest.hexdigest()[:12]}"
    if subprocess.run(["docker", "image", "inspect", name], capture_output=True, check=False).returncode:
        build = ["docker", "build", "--network", "host", "--file", str(context / "servers.Dockerfile")]
        run([*build, "--tag", name, str(context)], seconds=900)
    return load(kind_cluster, name)


def overlay(directory: str = "kind") -> bytes:
    return run(["kubectl", "kustomize", str(ROOT / "manifests" / "overlays" / directory)]).encode()


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    """Return the cluster with the kind overlay applied, and take it away at the end."""
    cluster = Cluster()
    remove_overlay(cluster)  # what an interrupted run left behind
    cluster.kubectl("apply", "--filename", "-", content=overlay())
    open_volume(cluster)
    yield cluster
    remove_overlay(cluster)


def open_volume(cluster: Cluster) -> None:
    """Let any user write to a volume that is a folder of a kind node.

    Kubernetes gives a pod's group (`fsGroup`) to every kind of volume but these, and the testbed's provisioner, unlike
    kind's own, leaves them to root.
    """
    name = until(
        lambda: cluster.get("persistentvolumeclaim", "kubegraft-work")["spec"].get("volumeName"),
        seconds=10,
        or_else="not bound before it is used",
    )
    if " " in str(name):
        return
    path = cluster.get("persistentvolume", str(name))["spec"].get("hostPath", {}).get("path")
    if path:
        for node in cluster.get("nodes")["items"]:
            if "kwok.x-k8s.io/node" in node["metadata"].get("labels", {}):
                continue  # a pretended one, of tests of scale
            run(["docker", "exec", node["metadata"]["name"], "install", "-d", "-m", "0777", path])


def remove_overlay(cluster: Cluster) -> None:
    cluster.kubectl(
        "delete", "--filename", "-", "--ignore-not-found", "--timeout=150s", content=overlay(), seconds=180
    )


@pytest.fixture(scope="session")
def photographs() -> Path:
    """Return a folder train/<class>/*.jpg, validation/<class>/*.jpg of real photographs."""
    folder = Path(os.environ.get("KUBEGRAFT_E2E_DATA") or ROOT.parent / "shared" / "data" / "signs")
    if not (folder / "train").is_dir():
        pytest.fail(
            f"Photographs must be in `train` and `validation`. Received: {str(folder)!r}. Set KUBEGRAFT_E2E_DATA."
        )
    return folder


@pytest.fixture(scope="session")
def toolbox(cluster, image, photographs) -> str:
    """Return a pod with the volume, on which `data/signs` has the photographs and `data/few` a part of them."""
    command = ["python3", "-c", "import time; time.sleep(36000)"]
    cluster.apply(restricted_pod("toolbox", image, command))
    cluster.kubectl("wait", "--for=condition=Ready", "pod/toolbox", "--timeout=180s", seconds=200)
    for name, keep in (("signs", is_image), ("few", is_one_of_few)):
        unpack = (
            "import sys, tarfile; tarfile.open(fileobj=sys.stdin.buffer, mode='r|')"
            f".extractall('/workspace/data/{name}', filter='data')"
        )
        cluster.execute("toolbox", "python3", "-c", unpack, content=archive(photographs, keep))
    return "toolbox"


def is_image(path: Path) -> bool:
    return path.parts[0] in ("train", "validation") and path.suffix.lower() in (".jpg", ".jpeg", ".png")


def is_one_of_few(path: Path) -> bool:
    """Whether it is one of about 24 training and 8 validation images of the first five classes."""
    import zlib

    every = 5 if path.parts[0] == "train" else 4
    return is_image(path) and path.parts[1] < "5" and zlib.crc32(path.name.encode()) % every == 0


@pytest.fixture(scope="session")
def stores(cluster, servers_image, toolbox) -> dict[str, str]:
    """Start both object stores in the cluster; return the secret for each scheme, which leads pods to it."""
    identities = {
        "identities": [
            {
                "name": "kubegraft",
                "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
                "actions": ["Admin", "Read", "List", "Tagging", "Write"],
            }
        ]
    }
    cluster.apply(
        secret("s3-identities", {"s3.json": json.dumps(identities)}),
        secret(
            "s3-access",
            {
                "AWS_ACCESS_KEY_ID": ACCESS_KEY,
                "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_ENDPOINT_URL": "http://s3:8333",
            },
        ),
        secret("gs-access", {"STORAGE_EMULATOR_HOST": "http://gs:9023"}),
        *server("gs", servers_image, 9023, [
            "python3", "-m", "gcp_storage_emulator", "start", "--host", "0.0.0.0", "--port", "9023",
            "--in-memory", "--default-bucket", BUCKET,
        ]),
        *server("s3", servers_image, 8333, [
            "weed", "server", "-s3", "-dir=/tmp", "-ip=127.0.0.1", "-ip.bind=0.0.0.0", "-master.volumeSizeLimitMB=64",
            "-volume.max=20", "-s3.port=8333", "-s3.config=/etc/identities/s3.json", "-s3.port.iceberg=0",
            "-s3.port.lance=0", "-master.telemetry=false",
        ], "s3-identities"),
    )  # fmt: skip
    for name in ("gs", "s3"):
        cluster.kubectl("wait", "--for=condition=Ready", f"pod/{name}", "--timeout=120s", seconds=130)
    in_store(cluster, "s3", f"import boto3; boto3.client('s3').create_bucket(Bucket={BUCKET!r})")
    return {"gs": "gs-access", "s3": "s3-access"}


def server(name: str, image: str, port: int, command: list[str], mounted: str = "") -> list[dict]:
    volumes = [{"name": "identities", "secret": {"secretName": mounted}}] if mounted else []
    mounts = [{"name": "identities", "mountPath": "/etc/identities"}] if mounted else []
    pod = restricted_pod(
        name,
        image,
        command,
        ports=[{"containerPort": port}],
        readinessProbe={"tcpSocket": {"port": port}, "periodSeconds": 1},
        volumes=volumes,
        volumeMounts=mounts,
    )
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"selector": {"app": name}, "ports": [{"port": port}]},
    }
    return [pod, service]


ACCESS = {
    "s3": {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": "http://s3:8333",
    },
    "gs": {"STORAGE_EMULATOR_HOST": "http://gs:9023"},
}


def in_store(cluster: Cluster, scheme: str, program: str) -> str:
    """Run a Python program in the toolbox with access to a store, trying for a while until the store answers."""
    variables = "; ".join(f"os.environ[{key!r}] = {value!r}" for key, value in ACCESS[scheme].items())
    command = ("python3", "-c", f"import os; {variables}; {program}")

    def attempt() -> str:
        try:
            return cluster.execute("toolbox", *command, seconds=180) or "done"
        except Refused as refusal:
            problems.append(str(refusal))
            return ""

    problems: list[str] = []
    said = until(attempt, seconds=60, or_else="never")
    assert said != "never", problems[-1]
    return str(said)


@pytest.fixture(scope="session")
def rendered(tmp_path_factory, image):
    """Return a function that calls `kubegraft render` with a quick config and returns the objects."""

    def render(kind: str, *arguments: str, config: dict | None = None) -> list[dict]:
        path = tmp_path_factory.mktemp("render") / "run.yaml"
        path.write_text(yaml.safe_dump(config or QUICK))
        takes_config = kind != "serving"
        command = [sys.executable, "-m", "kubegraft", "render", kind, *arguments, "--namespace", NAMESPACE]
        command += ["--config", str(path), "--cpu", "2", "--memory", "4Gi"] if takes_config else []
        return list(yaml.safe_load_all(run([*command, "--image", image])))

    return render


def named(objects: list[dict], kind: str) -> str:
    return next(one["metadata"]["name"] for one in objects if one["kind"] == kind)


@pytest.fixture(scope="session")
def trained(cluster, toolbox, stores, rendered) -> str:
    """Return the job that trained on all photographs, on the volume, and published to the bucket."""
    objects = rendered(
        "job", "/workspace/data/signs", "--name", "signs", "--publish", f"gs://{BUCKET}/signs", "--secret", stores["gs"]
    )  # fmt: skip
    cluster.apply(*objects)
    job = named(objects, "Job")
    cluster.wait_for_job(job, seconds=600)
    return job
