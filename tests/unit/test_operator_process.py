"""`kubegraft operator run` as a process, with kopf's watches, against a small API server on the loopback."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest
import yaml

from kubegraft.controller.jobset import jobset_name
from tests.kubernetes_standin import Standin
from tests.operator_manifests import transfer_job


@pytest.fixture
def standin():
    with Standin().running() as standin:
        yield standin


@contextmanager
def operator(standin, tmp_path, name="first", port=0):
    kubeconfig = tmp_path / "kubeconfig"
    config = {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u", "namespace": "operator"}}],
        "clusters": [{"name": "k", "cluster": {"server": standin.url}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
    }
    kubeconfig.write_text(yaml.safe_dump(config))
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("KUBERNETES_")},
        "KUBECONFIG": str(kubeconfig),
        "KUBEGRAFT_LOG_FORMAT": "json",
        "POD_NAME": name,
    }
    command = [sys.executable, "-W", "error", "-m", "kubegraft", "operator", "run", f"--metrics-port={port}"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def event(process, name):
    """Return the next event of a name that the process logs."""
    for line in process.stderr:
        assert line.startswith("{"), line
        if (found := json.loads(line))["event"] == name:
            return found
    raise AssertionError(f"the operator ended with {process.wait()} before {name!r}")


def test_a_job_becomes_a_jobset_and_the_operator_ends_gracefully(standin, tmp_path):
    before = standin.put("transferjobs", transfer_job("before"))
    with operator(standin, tmp_path) as process:
        port = event(process, "started")["port"]
        standin.wait(lambda: ("jobsets", "team", jobset_name(before)) in standin.objects)
        after = standin.put("transferjobs", transfer_job("after"))
        standin.wait(lambda: ("jobsets", "team", jobset_name(after)) in standin.objects)
        for path in ("healthz", "readyz"):
            assert ask(port, path) == "ok\n"
        # It counts a write when it has the answer, which is after the object is there.
        counted = 'kubegraft_operator_api_writes_total{kind="JobSet",result="ok",verb="create"} 2.0'
        for _ in range(100):
            if counted in (text := ask(port, "metrics")):
                break
            time.sleep(0.1)
        assert counted in text
        assert 'kubegraft_operator_jobs{condition="New"}' in text or "kubegraft_operator_jobs" in text
        assert "process_resident_memory_bytes" in text
        process.send_signal(signal.SIGTERM)
        event(process, "ended")
        assert process.wait(timeout=20) == 0
    lease = standin.get("leases", "operator", "kubegraft-operator")["spec"]
    assert lease["holderIdentity"] == ""
    for plural in ("transferjobs", "jobsets"):  # kopf leaves nothing on them
        for found in standin.of(plural):
            assert not found["metadata"].get("annotations")
            assert not found["metadata"].get("finalizers")


def ask(port, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=10) as answer:
        return answer.read().decode()


def test_a_second_operator_stands_by_and_takes_over(standin, tmp_path):
    with operator(standin, tmp_path, "first") as first:
        event(first, "leading")
        with operator(standin, tmp_path, "second") as second:
            assert event(second, "standing by")["leader"] == "first"
            first.send_signal(signal.SIGTERM)
            event(second, "leading")
            job = standin.put("transferjobs", transfer_job("later"))
            standin.wait(lambda: ("jobsets", "team", jobset_name(job)) in standin.objects)
            assert first.wait(timeout=20) == 0
            second.send_signal(signal.SIGTERM)
            assert second.wait(timeout=20) == 0


def test_a_schedule_whose_job_the_api_server_refuses_says_so_until_it_is_made(standin, tmp_path):
    def ready():
        conditions = (standin.get("transferschedules", "team", "often").get("status") or {}).get(
            "conditions", ()
        )
        return next((each for each in conditions if each["type"] == "Ready"), {"status": "", "message": ""})

    standin.refuse["create", "transferjobs"] = (403, "Forbidden", "exceeded quota: jobs")
    standin.put(
        "transferschedules",
        {
            "apiVersion": "kubegraft.dev/v1alpha1",
            "kind": "TransferSchedule",
            "metadata": {"name": "often", "namespace": "team", "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"cron": "0 * * * *", "template": {"spec": transfer_job()["spec"]}},
        },
    )
    with operator(standin, tmp_path) as process:
        event(process, "leading")
        standin.wait(lambda: ready()["status"] == "False")
        assert "exceeded quota" in ready()["message"]
        assert "lastDecision" not in standin.get("transferschedules", "team", "often")["status"]
        standin.refuse.clear()
        standin.wait(lambda: ready()["status"] == "True")
        assert standin.of("transferjobs")
