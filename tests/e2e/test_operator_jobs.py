"""The operator with pods that only speak: what it tells of a job, what it survives, what it refuses."""

import json
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.e2e.kube import Refused, until
from tests.e2e.operator_installation import LEASE_SECONDS, Operator

NUM_JOBS = 20


def columns(jobs, name, *flags) -> dict:
    header, row = jobs.cluster.kubectl("get", "tj", name, *flags).splitlines()
    starts = [match.start() for match in re.finditer(r"\S+", header)]
    ends = [*starts[1:], None]
    return {header[a:b].strip(): row[a:b].strip() for a, b in zip(starts, ends, strict=True)}


def test_kubectl_tells_the_story_of_a_job(jobs):
    jobs.start(jobs.of_standin("story", seconds=2))
    jobs.wait("story", "Running", seconds=60)
    stages, seen = set(), {}

    def ended():
        seen.update(columns(jobs, "story"))
        stages.add((seen["STAGE"], seen["PROGRESS"]))
        return jobs.condition("story", "Succeeded")["status"] == "True"

    until(ended, seconds=90)
    last = columns(jobs, "story", "--output", "wide")
    assert last["PROGRESS"] == "100"
    assert last["NODES"] == "1"
    assert last["ACCURACY"].startswith("0.87")
    assert last["RESTARTS"] in ("0", "")
    assert len({stage for stage, _ in stages if stage}) >= 2, stages
    job = jobs.get("story")
    assert job["status"]["modelUri"] == "/artifacts/standin/model"
    assert job["status"]["datasetDigest"] == "d" * 64
    assert job["status"]["observedGeneration"] == job["metadata"]["generation"]
    events = jobs.cluster.get("events")["items"]
    about = [one["reason"] for one in events if one["involvedObject"].get("uid") == job["metadata"]["uid"]]
    assert about
    assert len(about) == len(set(about))


def test_applying_it_again_changes_nothing_and_diff_is_empty(jobs):
    job = jobs.of_standin("gitops", seconds=0.1)
    jobs.start(job)
    jobs.wait("gitops")
    assert "unchanged" in jobs.cluster.apply(job)
    import yaml

    assert jobs.cluster.kubectl("diff", "--filename", "-", content=yaml.safe_dump(job).encode()) == ""


def test_kubectl_delete_takes_everything_with_it(jobs):
    jobs.start(jobs.of_standin("deleted", seconds=30))
    jobs.wait("deleted", "Running", seconds=60)
    jobs.remove("deleted")

    def left():
        kinds = "jobsets,jobs,pods,configmaps,services"
        found = jobs.cluster.get(kinds)["items"]
        return [
            one["metadata"]["name"]
            for one in found
            if (one["metadata"].get("labels") or {}).get("kubegraft.dev/transfer-job") == "deleted"
        ]

    until(lambda: not left(), seconds=60)


def test_a_suspended_job_gives_its_nodes_back_and_goes_on(jobs):
    jobs.start(jobs.of_standin("suspended", seconds=4))
    jobs.wait("suspended", "Running", seconds=60)
    patch(jobs, "suspended", {"suspend": True})
    until(lambda: not [p for p in jobs.pods("suspended") if p["status"]["phase"] == "Running"], seconds=60)
    condition = jobs.wait("suspended", "Running", status="False", seconds=30)
    assert condition["reason"] == "Suspended"
    patch(jobs, "suspended", {"suspend": False})
    jobs.wait("suspended", seconds=90)


def patch(jobs, name, spec):
    jobs.cluster.kubectl("patch", "tj", name, "--type=merge", "--patch", json.dumps({"spec": spec}))


def test_twenty_jobs_end_though_their_operator_is_killed_again_and_again(jobs, operator):
    names = [f"storm-{number:02}" for number in range(NUM_JOBS)]
    chance = random.Random(6)
    jobs.start(*[jobs.of_standin(name, seconds=chance.uniform(0.5, 3)) for name in names])
    kills, deadline = 0, time.monotonic() + 240
    try:
        while time.monotonic() < deadline:
            left = [name for name, status in conditions(jobs, "storm-").items() if not status]
            if not left:
                break
            if kills < 8:
                operator.kill()
                kills += 1
            # By chance in the middle of anything, taking the lease included.
            time.sleep(chance.uniform(2, 2 * LEASE_SECONDS))
        assert kills > 2
        ends = conditions(jobs, "storm-")
        assert set(ends.values()) == {"Succeeded"}, ends
        jobsets = [
            j for j in jobs.cluster.get("jobsets")["items"] if j["metadata"]["name"].startswith("storm-")
        ]
        assert len(jobsets) == NUM_JOBS
        restarts = {
            one["metadata"]["ownerReferences"][0]["name"]: one["status"].get("restarts", 0) for one in jobsets
        }
        for name in names:
            job = jobs.get(name)
            assert job["status"]["progress"] == 100
            assert job["status"].get("restarts", 0) == restarts[name]  # a full node may make some
            assert job["status"]["metrics"]["testAccuracy"].startswith("0.87")
    finally:
        jobs.remove(*names)


def conditions(jobs, prefix) -> dict[str, str]:
    """Return by name how a job ended; "" where it has not."""
    found = {}
    for job in jobs.cluster.get("tj")["items"]:
        if job["metadata"]["name"].startswith(prefix):
            true = [c["type"] for c in job.get("status", {}).get("conditions", []) if c["status"] == "True"]
            found[job["metadata"]["name"]] = next((t for t in true if t in ("Succeeded", "Failed")), "")
    return found


PROBLEMS = {
    "no-image": ("ok", {"image": "registry.invalid/nothing:1"}, "Running", "ImagePullFailed", "image"),
    "no-node": ("ok", {"nodeSelector": {"pool": "of-dreams"}}, "Running", "Unschedulable", "nodeSelector"),
    "no-claim": ("ok", {"artifacts": {"claim": "nowhere"}}, "Running", "VolumeNotFound", "nowhere"),
    "no-secret": ("ok", {"secretName": "nothing"}, "Running", "CreateContainerConfigError", "nothing"),
    "no-memory": ("memory", {"maxRestarts": 0}, "Failed", "OutOfMemory", "memory"),
    "no-disk": ("disk", {"maxRestarts": 0}, "Failed", "DiskFull", "space"),
    "crashes": ("crash", {"maxRestarts": 1}, "Failed", "TooManyRestarts", "maxRestarts"),
}


@pytest.fixture(scope="module")
def problems(jobs):
    """Start every job with a problem at once; return when."""
    jobs.start(*[jobs.of_standin(n, kind, 0.1, **spec) for n, (kind, spec, *_) in PROBLEMS.items()])
    yield time.monotonic()
    jobs.remove(*PROBLEMS)


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_is_told_within_a_minute_and_how_to_fix_it(name, problems, jobs):
    _, _, kind, reason, word = PROBLEMS[name]

    def told():
        found = jobs.condition(name, kind)
        return found if found["reason"] == reason else None

    condition = until(told, seconds=max(problems + 60 - time.monotonic(), 1), or_else={})
    assert condition, jobs.story(name)
    assert word in condition["message"]
    assert condition["status"] == ("True" if kind == "Failed" else "False")


def test_a_quota_that_is_used_up_is_told(jobs):
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "none-left"},
        "spec": {"hard": {"pods": "0"}},
    }
    jobs.cluster.apply(quota)
    try:
        jobs.start(jobs.of_standin("over-quota"))

        def told():
            found = jobs.condition("over-quota", "Running")
            return found if found["reason"] == "Forbidden" else None

        condition = until(told, seconds=60, or_else={})
        assert condition, jobs.story("over-quota")
        assert "none-left" in condition["message"]
    finally:
        jobs.cluster.kubectl("delete", "quota", "none-left")
    jobs.remove("over-quota")


def test_the_operator_may_do_no_more_than_it_needs(operator):
    account = "system:serviceaccount:kubegraft-operator:kubegraft-operator"

    def may(*what):
        try:
            return operator.cluster.kubectl("auth", "can-i", *what, f"--as={account}", "-A").strip() == "yes"
        except Refused:
            return False

    assert may("create", "jobsets.jobset.x-k8s.io")
    assert may("patch", "transferjobs.kubegraft.dev", "--subresource=status")
    for what in (
        ("get", "secrets"), ("list", "secrets"), ("list", "configmaps"), ("create", "pods"), ("delete", "pods"),
        ("create", "pods", "--subresource=exec"), ("get", "nodes"),
        ("create", "rolebindings.rbac.authorization.k8s.io"),
        ("patch", "transferjobs.kubegraft.dev"), ("update", "customresourcedefinitions.apiextensions.k8s.io"),
        ("get", "leases.coordination.k8s.io"),
    ):  # fmt: skip
        assert not may(*what), what


@pytest.mark.parametrize(("role", "verdict"), [("edit", True), ("view", False)])
def test_who_may_edit_a_namespace_may_edit_its_jobs_and_who_may_view_may_not(role, verdict, jobs):
    name, kubectl = f"{role}or", jobs.cluster.kubectl

    def may(verb):
        account = f"--as=system:serviceaccount:kubegraft:{name}"
        try:
            return kubectl("auth", "can-i", verb, "transferjobs.kubegraft.dev", account).strip() == "yes"
        except Refused:
            return False

    kubectl("create", "serviceaccount", name)
    kubectl("create", "rolebinding", name, f"--clusterrole={role}", f"--serviceaccount=kubegraft:{name}")
    try:
        until(lambda: may("get"), seconds=20)  # Kubernetes adds up roles after a moment
        assert may("create") is verdict
    finally:
        kubectl("delete", "rolebinding,serviceaccount", name)


def test_the_metrics_count_what_was_written(operator, jobs):
    jobs.start(jobs.of_standin("counted", seconds=0.2))
    jobs.wait("counted")
    text = until(operator.metrics, seconds=30)
    for name in (
        "reconciles_total",
        "reconcile_seconds_bucket",
        "api_writes_total",
        "queue_depth",
        "jobs",
        "leader",
    ):
        assert f"kubegraft_operator_{name}" in text
    memory = float(re.search(r"^process_resident_memory_bytes (\S+)", text, re.MULTILINE)[1])
    assert memory < 300 * 2**20


FOLLOW = """
import sys
from kubegraft.transfer_job_client import Wanted, train
import json
outcome = train(Wanted(spec=json.loads(sys.argv[1]), run="e2e", prefix="followed", namespace="kubegraft"))
print(outcome.model_uri)
"""


def follower(jobs, seconds):
    spec = jobs.of_standin("x", seconds=seconds)["spec"]
    command = [sys.executable, "-c", FOLLOW, json.dumps(spec)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def followed(jobs) -> list[str]:
    found = jobs.cluster.get("tj")["items"]
    return [j["metadata"]["name"] for j in found if j["metadata"]["name"].startswith("followed-")]


def test_a_task_follows_its_job_shows_its_log_and_a_retry_finds_it(jobs):
    jobs.remove(*followed(jobs))
    lost = follower(jobs, 2)
    (name,) = until(lambda: followed(jobs), seconds=30)
    jobs.wait(name, "Running", seconds=60)
    lost.kill()  # its node is lost
    lost.communicate()
    again = follower(jobs, 2)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert out.splitlines()[-1] == "/artifacts/standin/model"
    assert '"stage": "fine_tune"' in out
    assert followed(jobs) == [name]
    jobs.remove(name)


def test_a_task_that_is_terminated_deletes_its_job(jobs):
    jobs.remove(*followed(jobs))
    task = follower(jobs, 30)
    (name,) = until(lambda: followed(jobs), seconds=30)
    jobs.wait(name, "Running", seconds=60)
    task.send_signal(signal.SIGTERM)
    _, err = task.communicate(timeout=60)
    assert task.returncode != 0
    assert "asked to stop" in err
    assert followed(jobs) == []


def test_a_new_operator_takes_over_at_once_where_the_old_one_ended_well(operator, jobs):
    before = operator.pods()
    jobs.start(jobs.of_standin("rolled", seconds=3))
    jobs.wait("rolled", "Running", seconds=60)
    operator.cluster.kubectl("rollout", "restart", "deployment/kubegraft-operator")
    operator.cluster.kubectl(
        "rollout", "status", "deployment/kubegraft-operator", "--timeout=90s", seconds=100
    )
    jobs.wait("rolled")
    assert set(Operator().pods()).isdisjoint(before)
