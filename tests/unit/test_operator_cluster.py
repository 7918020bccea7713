"""What the operator reads and writes, against a small API server on the loopback."""

import asyncio
import contextlib

import pytest
import yaml

from kubegraft.controller.access import Access
from kubegraft.controller.actions import Apply, Delete, Event, PatchStatus, Requeue
from kubegraft.controller.api import Api, ApiError
from kubegraft.controller.cluster import Cluster, Key
from kubegraft.controller.jobset import jobset_name, render_config_map, render_jobset
from kubegraft.controller.metrics import Metrics
from kubegraft.controller.observed import JOB_LABEL, SCHEDULE_LABEL
from kubegraft.controller.settings import Settings
from kubegraft.job_report import Report
from tests.kubernetes_standin import NOW, Standin
from tests.operator_manifests import ROLE_FILE, allowed, transfer_job, transfer_schedule

KEY = Key("TransferJob", "team", "photographs")
SETTINGS = Settings(image="registry.example/train:1")


@pytest.fixture
def standin():
    with Standin().running() as standin:
        yield standin


@contextlib.asynccontextmanager
async def watching(standin, notify=lambda key: None):
    """A cluster whose watches have listed, and which knows the TransferJobs and schedules that there are."""
    metrics = Metrics()
    async with Api(Access(server=standin.url), metrics) as api:
        cluster = Cluster(api, namespace="", notify=notify)
        tasks = [asyncio.create_task(watch.run()) for watch in cluster.watches]
        try:
            for watch in cluster.watches:
                await watch.ready.wait()
            for plural in ("transferjobs", "transferschedules"):
                for found in standin.of(plural):
                    cluster.take(None, found)
            cluster.metrics = metrics
            yield cluster
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, timeout=30))


async def until(found):
    while not (result := found()):
        await asyncio.sleep(0.005)
    return result


def made_of(job, standin):
    """Put the JobSet and the ConfigMap of a job."""
    standin.put("configmaps", render_config_map(job))
    return standin.put("jobsets", render_jobset(job, SETTINGS))


def pod_of(job, role="train", index=0, phase="Running", **status):
    name = jobset_name(job)
    return {
        "metadata": {
            "name": f"{name}-{role}-0-{index}",
            "namespace": "team",
            "labels": {
                JOB_LABEL: "photographs",
                "jobset.sigs.k8s.io/jobset-name": name,
                "jobset.sigs.k8s.io/replicatedjob-name": role,
            },
            "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
            "managedFields": [{"manager": "somebody"}],
        },
        "spec": {
            "nodeName": "n",
            "volumes": [{"name": "x"}],
            "containers": [{"name": "kubegraft", "env": []}],
        },
        "status": {"phase": phase, **status},
    }


def test_a_job_is_seen_with_all_that_was_made_for_it_and_nothing_of_others(standin):
    async def test():
        job = standin.put("transferjobs", transfer_job())
        made_of(job, standin)
        standin.put("pods", pod_of(job))
        standin.put("pods", {"metadata": {"name": "other", "namespace": "team"}, "spec": {}, "status": {}})
        standin.logs[f"{jobset_name(job)}-train-0-0"] = (
            'Epoch 1\n{"time": "x"}\n' + Report(stage="fine_tune", progress=40).to_json() + "\nmore\n"
        )
        async with watching(standin) as cluster:
            seen = await cluster.observe(KEY)
        assert seen.job["metadata"]["uid"] == job["metadata"]["uid"]
        assert seen.jobset["metadata"]["name"] == jobset_name(job)
        assert seen.config_map["data"].keys() == {"run.yaml"}
        (pod,) = seen.pods
        assert "managedFields" not in pod["metadata"]
        assert pod["spec"] == {"nodeName": "n", "containers": [{"name": "kubegraft"}]}
        assert seen.reports[pod["metadata"]["name"]].progress == 40

    run(test())


def test_changes_of_what_was_made_tell_of_the_job(standin):
    async def test():
        told = []
        job = standin.put("transferjobs", transfer_job())
        async with watching(standin, told.append) as cluster:
            told.clear()
            made_of(job, standin)
            await until(lambda: KEY in told)
            told.clear()
            standin.put("pods", pod_of(job))
            await until(lambda: KEY in told)
            told.clear()
            standin.remove("jobsets", "team", jobset_name(job))
            await until(lambda: KEY in told)
            assert (await cluster.observe(KEY)).jobset is None

    run(test())


def test_a_job_that_is_gone_is_not_observed_and_one_of_its_name_is_another(standin):
    async def test():
        job = standin.put("transferjobs", transfer_job())
        async with watching(standin) as cluster:
            cluster.take("DELETED", job)
            assert await cluster.observe(KEY) is None
            again = standin.put(
                "transferjobs", {**transfer_job(), "metadata": {**job["metadata"], "uid": "other"}}
            )
            cluster.take("ADDED", again)
            cluster.take("DELETED", job)  # late
            assert (await cluster.observe(KEY)).job["metadata"]["uid"] == "other"

    run(test())


def test_a_deletion_that_no_watch_told_of_is_found(standin):
    async def test():
        told = []
        standin.put("transferjobs", transfer_job())
        async with watching(standin, told.append) as cluster:
            standin.remove("transferjobs", "team", "photographs")
            assert await cluster.observe(KEY) is not None
            told.clear()
            await cluster.look_again()
            assert told == [KEY]
            assert await cluster.observe(KEY) is None

    run(test())


def test_what_was_written_is_seen_before_the_watch_tells(standin):
    async def test():
        job = standin.put("transferjobs", transfer_job())
        async with watching(standin) as cluster:
            seen = await cluster.observe(KEY)
            status = {"stage": "ingest", "conditions": []}
            seconds = await cluster.act(
                KEY,
                seen,
                (
                    Apply(render_config_map(job), create=True),
                    Apply(render_jobset(job, SETTINGS), create=True),
                    PatchStatus(status),
                    Event("Normal", "Created", "The JobSet is made."),
                    Requeue(7),
                ),
            )
            assert seconds == 7
            seen = await cluster.observe(KEY)
            assert seen.job["status"] == status
            assert seen.jobset
            assert seen.config_map

    run(test())
    (event,) = standin.of("events")
    assert event["involvedObject"]["name"] == "photographs"
    assert event["reason"] == "Created"


def test_an_event_is_not_made_twice_though_the_status_was_lost(standin):
    async def test():
        standin.put("transferjobs", transfer_job())
        async with watching(standin) as cluster:
            for _ in range(3):
                await cluster.act(KEY, await cluster.observe(KEY), (Event("Warning", "Failed", "Why."),))

    run(test())
    assert len(standin.of("events")) == 1


def test_fields_that_an_older_definition_lacks_are_left_out_of_the_status(standin):
    async def test():
        standin.put("transferjobs", transfer_job())
        standin.undeclared = {"exactProgress", "lastEnds"}
        async with watching(standin) as cluster:
            seen = await cluster.observe(KEY)
            status = {"stage": "export", "exactProgress": 93, "lastEnds": "train exit code 75."}
            await cluster.act(KEY, seen, (PatchStatus(status),))
            standin.refuse[("patch", "transferjobs/status")] = (500, "InternalError", "etcd is away")
            with pytest.raises(ApiError, match="etcd is away"):
                await cluster.act(KEY, await cluster.observe(KEY), (PatchStatus({"stage": "ingest"}),))

    run(test())
    assert standin.get("transferjobs", "team", "photographs")["status"] == {"stage": "export"}


def test_a_stale_read_does_not_overwrite_a_newer_status(standin):
    async def test():
        standin.put("transferjobs", transfer_job())
        async with watching(standin) as cluster:
            stale = await cluster.observe(KEY)
            newer = standin.put("transferjobs", {**transfer_job(), "status": {"stage": "export"}})
            with pytest.raises(ApiError) as refused:
                await cluster.act(KEY, stale, (PatchStatus({"stage": "ingest"}),))
            assert refused.value.conflict
            cluster.take("MODIFIED", newer)
            seen = await cluster.observe(KEY)
            await cluster.act(KEY, seen, (PatchStatus({"stage": "export", "progress": 100}),))

    run(test())
    assert standin.get("transferjobs", "team", "photographs")["status"] == {
        "stage": "export",
        "progress": 100,
    }


def test_a_name_that_somebody_else_has_is_seen_after_the_conflict(standin):
    async def test():
        job = standin.put("transferjobs", transfer_job())
        foreign = render_jobset(job, SETTINGS)
        foreign["metadata"]["labels"] = {}
        standin.put("jobsets", foreign)
        async with watching(standin) as cluster:
            seen = await cluster.observe(KEY)
            assert seen.jobset is None
            again = await cluster.act(KEY, seen, (Apply(render_jobset(job, SETTINGS), create=True),))
            assert again < 1
            for _ in range(2):
                assert (await cluster.observe(KEY)).jobset["metadata"]["labels"] == {}
                await cluster.act(KEY, seen, ())

    run(test())


def test_what_is_there_already_after_a_crash_is_kept_and_the_rest_made(standin):
    async def test():
        job = standin.put("transferjobs", transfer_job())
        before = standin.put("configmaps", render_config_map(job))
        made = (Apply(render_config_map(job), create=True), Apply(render_jobset(job, SETTINGS), create=True))
        async with watching(standin) as cluster:
            await cluster.act(KEY, await cluster.observe(KEY), made)
            seen = await cluster.observe(KEY)
            assert seen.jobset
            assert seen.config_map["metadata"]["uid"] == before["metadata"]["uid"]

    run(test())


def test_a_job_under_way_is_looked_at_again_and_again(standin):
    async def test():
        job = standin.put("transferjobs", transfer_job())
        async with watching(standin) as cluster:
            assert await cluster.act(KEY, await cluster.observe(KEY), ()) is None
            made_of(job, standin)
            await until(lambda: cluster._jobsets.get("team", jobset_name(job)))
            assert await cluster.act(KEY, await cluster.observe(KEY), (Requeue(120),)) < 10

    run(test())


def test_what_the_api_server_refuses_to_make_is_among_the_events(standin):
    async def test():
        job = standin.put("transferjobs", transfer_job())
        standin.refuse["create", "jobsets"] = (403, "Forbidden", "jobsets is forbidden: exceeded quota")
        async with watching(standin) as cluster:
            actions = (Apply(render_jobset(job, SETTINGS), create=True),)
            with pytest.raises(ApiError) as refused:
                await cluster.act(KEY, await cluster.observe(KEY), actions)
            assert refused.value.refused
            (event,) = (await cluster.observe(KEY)).events
            assert event["reason"] == "ApplyFailed"
            assert "exceeded quota" in event["message"]
            assert event["kind"] == "JobSet"
            standin.refuse.clear()
            await cluster.act(KEY, await cluster.observe(KEY), actions)
            assert (await cluster.observe(KEY)).events == ()

    run(test())


def test_a_pod_that_does_not_start_is_asked_for_why(standin):
    async def test():
        job = standin.put("transferjobs", transfer_job())
        made_of(job, standin)
        pod = standin.put("pods", pod_of(job, "prepare", phase="Pending"))  # made long ago
        standin.put("events", warning("Pod", pod["metadata"]["name"], "FailedMount", "no such volume"))
        standin.put("events", warning("Pod", "another", "FailedMount", "not this"))
        async with watching(standin) as cluster:
            (event,) = (await cluster.observe(KEY)).events
        assert event["reason"] == "FailedMount"
        assert event["message"] == "no such volume"

    run(test())


def test_a_jobset_without_pods_is_asked_for_why(standin):
    async def test():
        job = standin.put("transferjobs", transfer_job())
        made_of(job, standin)
        standin.put(
            "events", warning("Job", f"{jobset_name(job)}-prepare-0", "FailedCreate", "exceeded quota")
        )
        async with watching(standin) as cluster:
            (event,) = (await cluster.observe(KEY)).events
        assert event["message"] == "exceeded quota"

    run(test())


def warning(kind, name, reason, message):
    return {
        "metadata": {"name": f"{name}.{reason}", "namespace": "team"},
        "involvedObject": {"kind": kind, "name": name},
        "type": "Warning",
        "reason": reason,
        "message": message,
        "lastTimestamp": NOW,
    }


def test_a_schedule_is_seen_with_its_jobs_and_its_looks(standin):
    async def test():
        standin.put("transferschedules", transfer_schedule())
        labels = {SCHEDULE_LABEL: "nightly"}
        standin.put("transferjobs", transfer_job("nightly-1", labels=labels))
        standin.put("transferjobs", transfer_job("unrelated"))
        standin.put("jobs", {"metadata": {"name": "look", "namespace": "team", "labels": labels}, "spec": {}})
        pod = {"name": "look-x", "namespace": "team", "labels": labels}
        standin.put("pods", {"metadata": pod, "spec": {"containers": []}, "status": {"phase": "Running"}})
        async with watching(standin) as cluster:
            seen = await cluster.observe(Key("TransferSchedule", "team", "nightly"))
        assert [one["metadata"]["name"] for one in seen.jobs] == ["nightly-1"]
        assert [one["metadata"]["name"] for one in seen.looks] == ["look"]
        assert [one["metadata"]["name"] for one in seen.pods] == ["look-x"]

    run(test())


def test_a_job_that_a_schedule_made_is_looked_at(standin):
    """It is in the copies when the watch tells of it, which is no news then."""

    async def test():
        told = []
        standin.put("transferschedules", transfer_schedule())
        key = Key("TransferSchedule", "team", "nightly")
        async with watching(standin, told.append) as cluster:
            seen = await cluster.observe(key)
            child = {**transfer_job("nightly-1"), "metadata": {"name": "nightly-1", "namespace": "team"}}
            await cluster.act(key, seen, (Apply(child, create=True),))
            assert Key("TransferJob", "team", "nightly-1") in told

    run(test())


def test_a_change_of_a_schedules_job_tells_of_the_schedule(standin):
    async def test():
        told = []
        async with watching(standin, told.append) as cluster:
            cluster.take(
                "ADDED", standin.put("transferjobs", transfer_job(labels={SCHEDULE_LABEL: "nightly"}))
            )
            assert Key("TransferSchedule", "team", "nightly") in told

    run(test())


def test_a_watch_goes_on_after_the_server_refused_for_a_while(standin):
    async def test():
        told = []
        job = standin.put("transferjobs", transfer_job())
        standin.refuse["list", "pods"] = (500, "InternalError", "etcd is tired")
        metrics = Metrics()
        async with Api(Access(server=standin.url), metrics) as api:
            cluster = Cluster(api, namespace="", notify=told.append)
            watch = cluster.watches[1]
            task = asyncio.create_task(watch.run())
            await until(lambda: ("list", "", "pods", "") in standin.calls)
            standin.put("pods", pod_of(job))
            standin.refuse.clear()
            await until(lambda: KEY in told)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    run(test())


def test_the_role_allows_exactly_the_calls_that_are_made(standin):
    """Every kind of action, and every look; kopf's lists and watches of our own kinds are listed here."""

    async def test():
        job = standin.put("transferjobs", transfer_job())
        schedule = standin.put("transferschedules", transfer_schedule())
        standin.put("pods", pod_of(job))
        key = Key("TransferSchedule", "team", "nightly")
        look = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "look", "namespace": "team"}}
        async with watching(standin) as cluster:
            await cluster.look_again()
            seen = await cluster.observe(KEY)
            jobset = render_jobset(job, SETTINGS)
            await cluster.act(
                KEY,
                seen,
                (
                    Apply(render_config_map(job), create=True),
                    Apply(jobset, create=True),
                    Apply(jobset),
                    Event("Normal", "Created", "x"),
                    PatchStatus({}),
                ),
            )
            cluster._memory(KEY).stale = True
            await cluster.observe(KEY)
            child = {**transfer_job("nightly-1"), "metadata": {"name": "nightly-1", "namespace": "team"}}
            await cluster.act(
                key,
                await cluster.observe(key),
                (Apply(child, create=True), Apply(look, create=True), PatchStatus({"active": []})),
            )
            deletes = [("JobSet", jobset["metadata"]["name"]), ("TransferJob", "nightly-1"), ("Job", "look")]
            deletes.append(("ConfigMap", "look"))
            await cluster.act(KEY, await cluster.observe(KEY), [Delete(k, n, "team") for k, n in deletes])
            standin.put("jobsets", {**jobset, "metadata": {**jobset["metadata"], "creationTimestamp": NOW}})
            standin.remove("pods", "team", pod_of(job)["metadata"]["name"])
            await until(lambda: not cluster._pods.of("team/photographs"))
            await cluster.observe(KEY)
        assert schedule

    run(test())
    made = {call[:3] for call in standin.calls}
    made |= {("watch", "kubegraft.dev", "transferjobs"), ("watch", "kubegraft.dev", "transferschedules")}
    assert made == allowed(yaml.safe_load_all(ROLE_FILE.read_text()))
