"""Many TransferJobs at once: how soon they have their JobSets, what the operator takes, how often it writes.

    python -m benchmarks.operator_scale [--jobs 1000] [--nodes 2]

Needs a cluster of the current KUBECONFIG with JobSet, the definitions (manifests/crds) and pretended nodes of kwok, on
which pods go through their phases and run nothing. No operator may be at work there: this starts one, as a process of
this machine. Works in the namespace `operator-scale`, which it makes and deletes. Prints a table, and JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path

import yaml

NAMESPACE = "operator-scale"
POLL_SECONDS = 1.0
CLIENTS = 4
QUIET_SECONDS = 20.0
MOST_SECONDS = 3600.0


def kubectl(*arguments: str, content: str | None = None) -> str:
    command = ["kubectl", "--namespace", NAMESPACE, *arguments]
    return subprocess.run(command, input=content, capture_output=True, text=True, check=True).stdout


def transfer_job(number: int, nodes: int) -> dict:
    return {
        "apiVersion": "kubegraft.dev/v1alpha1",
        "kind": "TransferJob",
        "metadata": {"name": f"scale-{number:05}", "namespace": NAMESPACE},
        "spec": {
            "ingest": {"source": "/artifacts/data/photographs"},
            "nodes": nodes,
            "image": "pretended:1",
            "nodeSelector": {"kwok.x-k8s.io/node": "fake"},
            "tolerations": [{"key": "kwok.x-k8s.io/node", "operator": "Exists"}],
            "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}},
        },
    }


def place() -> str:
    """The namespace, the account of the pods, and the claim that they name."""
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    objects = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"name": "kubegraft-task", "namespace": NAMESPACE},
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "kubegraft-work", "namespace": NAMESPACE},
            "spec": claim,
        },
    ]
    return yaml.safe_dump_all(objects)


class Process:
    """The operator, as a process of this machine."""

    def __init__(self, log: Path) -> None:
        self.log = log
        command = [
            sys.executable,
            "-m",
            "kubegraft",
            "operator",
            "run",
            f"--namespace={NAMESPACE}",
            "--metrics-port=0",
        ]
        environment = {**os.environ, "KUBEGRAFT_LOG_FORMAT": "json"}
        self.process = subprocess.Popen(
            [*command, f"--lease-namespace={NAMESPACE}"], env=environment, stderr=log.open("w")
        )
        self.port = self._port()

    def _port(self) -> int:
        while self.process.poll() is None:
            if found := re.search(r'"port": (\d+)', self.log.read_text()):
                return int(found[1])
            time.sleep(0.1)
        raise SystemExit(self.log.read_text())

    def metrics(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60) as answer:
            return answer.read().decode()

    def peak_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)


def samples(text: str, name: str) -> dict[str, float]:
    return {
        m[1] or "": float(m[2]) for m in re.finditer(rf"^{name}(?:\{{(.*)\}})? (\S+)$", text, re.MULTILINE)
    }


def number_of(kind_path: str) -> int:
    found = json.loads(kubectl("get", "--raw", f"/apis/{kind_path}?limit=1"))
    return len(found["items"]) + found["metadata"].get("remainingItemCount", 0)


def measured(jobs: int, nodes: int) -> dict:
    kubectl("apply", "--filename", "-", content=place())
    with tempfile.TemporaryDirectory() as directory:
        operator = Process(Path(directory) / "operator.log")
        try:
            return followed(operator, jobs, nodes)
        finally:
            operator.end()
            kubectl("delete", "namespace", NAMESPACE, "--wait=false")


def create(jobs: int, nodes: int) -> list[subprocess.Popen]:
    """Create all jobs at once, by several clients; return them."""
    clients = []
    for first in range(CLIENTS):
        documents = [transfer_job(number, nodes) for number in range(first, jobs, CLIENTS)]
        command = ["kubectl", "create", "--validate=false", "--filename", "-"]
        client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        client.stdin.write(yaml.dump_all(documents, Dumper=yaml.CSafeDumper))
        client.stdin.close()
        clients.append(client)
    return clients


def followed(operator: Process, jobs: int, nodes: int) -> dict:
    began, clients = time.monotonic(), create(jobs, nodes)
    found = {"jobs": jobs, "nodes": nodes}
    path = f"jobset.x-k8s.io/v1alpha2/namespaces/{NAMESPACE}/jobsets"
    while number_of(path) < jobs:
        if "seconds_to_create" not in found and all(client.poll() is not None for client in clients):
            found["seconds_to_create"] = round(time.monotonic() - began, 1)
        time.sleep(POLL_SECONDS)
    found["seconds_to_all_jobsets"] = round(time.monotonic() - began, 1)
    for client in clients:
        client.wait()
    print(json.dumps(found), flush=True)
    found["seconds_to_steady"] = round(steady(operator, jobs) - began, 1)
    return found | costs(operator, jobs)


def steady(operator: Process, jobs: int) -> float:
    """Return when the last write was after which nothing was written for a while, all jobs having ended."""
    written, since, deadline = -1.0, time.monotonic(), time.monotonic() + MOST_SECONDS
    while time.monotonic() < deadline:
        text = operator.metrics()
        writes = samples(text, "kubegraft_operator_api_writes_total")
        now = sum(number for labels, number in writes.items() if 'kind="Lease"' not in labels)
        if now != written:
            written, since = now, time.monotonic()
        ended = samples(text, "kubegraft_operator_jobs").get('condition="Succeeded"', 0)
        if ended >= jobs and time.monotonic() - since > QUIET_SECONDS:
            return since
        time.sleep(POLL_SECONDS * 2)
    print(operator.log.read_text()[-3000:], file=sys.stderr)
    raise SystemExit(f"not steady after {MOST_SECONDS:.0f} s: {samples(text, 'kubegraft_operator_jobs')}")


def costs(operator: Process, jobs: int) -> dict:
    text, writes = operator.metrics(), Counter()
    for labels, number in samples(text, "kubegraft_operator_api_writes_total").items():
        label = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if label["kind"] != "Lease":
            result = "" if label["result"] == "ok" else f" ({label['result']})"
            writes[f"{label['kind']} {label['verb']}{result}"] += number
    reconciles = sum(samples(text, "kubegraft_operator_reconciles_total").values())
    return {
        "peak_memory_mib": round(operator.peak_mib()),
        "cpu_seconds": round(samples(text, "process_cpu_seconds_total")[""], 1),
        "reconciles_per_job": round(reconciles / jobs, 1),
        "writes_per_job": round(sum(writes.values()) / jobs, 2),
        "writes_per_job_by_kind": {kind: round(number / jobs, 2) for kind, number in sorted(writes.items())},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--nodes", type=int, default=2, help="workers of each job")
    options = parser.parse_args()
    found = measured(options.jobs, options.nodes)
    for name, value in found.items():
        print(f"| {name} | {value} |")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
