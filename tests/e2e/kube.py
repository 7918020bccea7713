"""The cluster of the current KUBECONFIG, through kubectl as its users have it."""

import base64
import io
import json
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

NAMESPACE = "kubegraft"
USER = 65532
POLL_SECONDS = 0.5


class Refused(Exception):
    """The API server, or kubectl, said no."""


def run(command: list[str], *, content: bytes | None = None, seconds: float = 120) -> str:
    done = subprocess.run(command, input=content, capture_output=True, timeout=seconds, check=False)
    if done.returncode:
        said = f"{done.stderr.decode()}\n{done.stdout.decode()[-3000:]}"
        raise Refused(f"{' '.join(command[:8])} ended with {done.returncode}:\n{said}")
    return done.stdout.decode()


class Cluster:
    """Calls kubectl in one namespace."""

    def __init__(self, namespace: str = NAMESPACE) -> None:
        self.namespace = namespace

    def kubectl(self, *arguments: str, content: bytes | None = None, seconds: float = 120) -> str:
        return run(["kubectl", "--namespace", self.namespace, *arguments], content=content, seconds=seconds)

    def apply(self, *objects: dict, flags: tuple[str, ...] = ()) -> str:
        text = yaml.safe_dump_all(objects)
        return self.kubectl("apply", "--filename", "-", *flags, content=text.encode())

    def get(self, kind: str, name: str = "", **labels: str) -> dict:
        selector = ",".join(f"{key}={value}" for key, value in labels.items())
        flags = ["--selector", selector] if selector else []
        return json.loads(self.kubectl("get", kind, *([name] if name else []), *flags, "--output", "json"))

    def pods_of(self, job: str) -> list[dict]:
        pods = self.get("pods", **{"batch.kubernetes.io/job-name": job})["items"]
        return sorted(pods, key=lambda pod: pod["metadata"]["creationTimestamp"])

    def logs(self, what: str, *flags: str) -> str:
        return self.kubectl("logs", what, *flags)

    def events_of(self, what: str) -> Iterator[dict]:
        """Return the JSON events that a pod or job has logged so far."""
        for line in self.logs(what).splitlines():
            if line.startswith("{"):
                yield json.loads(line)

    def execute(self, pod: str, *command: str, content: bytes | None = None, seconds: float = 120) -> str:
        stdin = ["--stdin"] if content is not None else []
        return self.kubectl("exec", pod, *stdin, "--", *command, content=content, seconds=seconds)

    def story(self, job: str) -> str:
        """Return what a person would look at when a job does not do as it should."""
        parts = [self.kubectl("describe", "job", job)]
        for pod in self.pods_of(job):
            name = pod["metadata"]["name"]
            parts.append(self.kubectl("describe", "pod", name))
            try:
                parts.append(self.logs(name, "--tail=60"))
            except Refused as refusal:
                parts.append(str(refusal))
        return "\n".join(parts)

    def wait_for_job(self, job: str, condition: str = "Complete", *, seconds: float = 400) -> None:
        """Wait until a job has ended; fail with its story if it ended otherwise, or not at all."""

        def ended() -> str:
            conditions = self.get("job", job)["status"].get("conditions", [])
            return next(
                (
                    c["type"]
                    for c in conditions
                    if c["type"] in ("Complete", "Failed") and c["status"] == "True"
                ),
                "",
            )

        found = until(ended, seconds=seconds, or_else="")
        if found != condition:
            raise AssertionError(f"job {job} is {found or 'not over'}, not {condition}\n{self.story(job)}")


def until(look: Callable[[], object], *, seconds: float, or_else: object = None) -> object:
    """Return the first true value that `look` returns within `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > deadline:
            if or_else is not None:
                return or_else
            raise AssertionError(f"nothing within {seconds:.0f} s")
        time.sleep(POLL_SECONDS)
    return found


def restricted_pod(name: str, image: str, command: list[str], **container: object) -> dict:
    """Return a pod that Pod Security `restricted` admits, with the volume at /workspace."""
    volumes = container.pop("volumes", [])
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name, "app.kubernetes.io/component": "task"}},
        "spec": {
            "serviceAccountName": "kubegraft-task",
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 0,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": name,
                    "image": image,
                    "imagePullPolicy": "IfNotPresent",
                    "command": command,
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "resources": {
                        "requests": {"cpu": "50m", "memory": "64Mi"},
                        "limits": {"cpu": "2", "memory": "3Gi"},
                    },
                    **container,
                    "volumeMounts": [
                        {"name": "tmp", "mountPath": "/tmp"},
                        {"name": "work", "mountPath": "/workspace"},
                        *container.get("volumeMounts", []),
                    ],
                }
            ],
            "volumes": [
                {"name": "tmp", "emptyDir": {}},
                {"name": "work", "persistentVolumeClaim": {"claimName": "kubegraft-work"}},
                *volumes,
            ],
        },
    }


def archive(folder: Path, keep: Callable[[Path], bool] = lambda _: True) -> bytes:
    """Return a tar of a folder's files, with paths relative to it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and keep(path.relative_to(folder)):
                tar.add(path, path.relative_to(folder).as_posix())
    return buffer.getvalue()


def secret(name: str, values: dict[str, str]) -> dict:
    data = {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "type": "Opaque", "data": data}
