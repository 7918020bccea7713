"""Making a TransferJob and following it, as the KFP task does, against a small API server on the loopback."""

import os
import signal
import threading

import pytest

pytest.importorskip("kubernetes")
from kubernetes import client

from kubegraft import transfer_job_api, transfer_job_client
from kubegraft.controller import failures
from kubegraft.errors import ClusterError, ConfigError, Interrupted, ModelError, TrainingError
from kubegraft.transfer_job_client import TransferJobs, Wanted, job_spec, train, wanted_of
from tests.kubernetes_standin import Standin
from tests.operator_manifests import transfer_job

SPEC = transfer_job()["spec"]


@pytest.fixture
def standin():
    with Standin().running() as standin:
        yield standin


@pytest.fixture
def jobs(standin, monkeypatch):
    monkeypatch.setattr(transfer_job_client, "_POLL_SECONDS", 0.02)
    with client.ApiClient(client.Configuration(host=standin.url)) as api_client:
        yield TransferJobs("team", api_client)


def wanted(**changes) -> Wanted:
    return Wanted(**{"spec": SPEC, "run": "run-1", "namespace": "team", **changes})


def ended(kind, reason="Done", message="", **status):
    condition = {"type": kind, "status": "True", "reason": reason, "message": message}
    return {"conditions": [condition], **status}


def when_made(standin, name, then):
    """Call `then(job)` in a thread as soon as the job is there."""

    def work():
        standin.wait(lambda: standin.objects.get(("transferjobs", "team", name)))
        then(standin.get("transferjobs", "team", name))

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def with_status(standin, status):
    return lambda job: standin.put("transferjobs", {**job, "status": status})


def test_a_job_is_made_followed_and_its_numbers_returned(standin, jobs, capsys):
    status = ended(
        "Succeeded",
        modelUri="gs://bucket/model",
        datasetDigest="abc",
        metrics={"testAccuracy": "0.9375", "validationAccuracy": "0.95"},
    )

    def work(job):
        pod = {
            "name": "p",
            "namespace": "team",
            "labels": {"kubegraft.dev/transfer-job": job["metadata"]["name"]},
        }
        standin.put("pods", {"metadata": pod, "spec": {"containers": []}, "status": {"phase": "Running"}})
        standin.logs["p"] = "2026-11-28T12:00:00.1Z epoch 1\n2026-11-28T12:00:00.2Z epoch 2\n"
        shown = sum(call[0] == "get" and call[2] == "pods/log" for call in standin.calls)
        standin.wait(lambda: sum(c[0] == "get" and c[2] == "pods/log" for c in standin.calls) > shown + 1)
        standin.put("transferjobs", {**job, "status": status})

    thread = when_made(standin, wanted().name, work)
    outcome = train(wanted(), jobs)
    thread.join()
    assert outcome.model_uri == "gs://bucket/model"
    assert outcome.metrics == {"test_accuracy": 0.9375, "validation_accuracy": 0.95}
    assert capsys.readouterr().out == "epoch 1\nepoch 2\n"


def test_a_retry_finds_the_running_job_and_another_run_does_not(standin, jobs):
    made = jobs.ensure(wanted())
    assert jobs.ensure(wanted())["metadata"]["uid"] == made["metadata"]["uid"]
    assert wanted(run="run-2").name != wanted().name
    assert wanted(spec={**SPEC, "nodes": 3}).name != wanted().name
    assert len(standin.of("transferjobs")) == 1


def test_a_suspended_job_goes_on(standin, jobs):
    jobs.ensure(wanted())
    jobs.suspend(wanted().name, suspended=True)
    assert standin.get("transferjobs", "team", wanted().name)["spec"]["suspend"] is True
    assert jobs.ensure(wanted())["spec"]["suspend"] is False


@pytest.mark.parametrize("keep", [True, False])
def test_a_terminated_task_deletes_or_suspends_its_job(keep, standin, jobs):
    thread = when_made(standin, wanted().name, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as stopped:
        train(wanted(keep_on_stop=keep), jobs)
    thread.join()
    left = standin.get("transferjobs", "team", wanted().name)
    assert stopped.value.exit_code == 143
    assert left["spec"]["suspend"] is True if keep else left is None
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("reason", "error"),
    [("ConfigRejected", ConfigError), ("ModelRejected", ModelError), ("TooManyRestarts", TrainingError)],
)
def test_a_failed_job_ends_the_task_with_the_exit_code_of_its_reason(reason, error, standin, jobs):
    status = ended("Failed", reason, "`source` must have images.")
    thread = when_made(standin, wanted().name, with_status(standin, status))
    with pytest.raises(error, match="`source` must have images"):
        train(wanted(), jobs)
    thread.join()


def test_every_reason_that_comes_from_an_error_becomes_that_error_again():
    for name, reason in failures._BY_ERROR.items():
        assert transfer_job_client._ERRORS.get(reason, TrainingError).__name__ == name


@pytest.mark.parametrize(("reason", "made_anew"), [("ConfigRejected", False), ("DataRejected", True)])
def test_a_retry_makes_a_failed_job_anew_unless_its_own_config_failed(
    reason, made_anew, standin, jobs, monkeypatch
):
    monkeypatch.setattr(transfer_job_api, "_AGAIN_SECONDS", 0)
    before = jobs.ensure(wanted())
    with_status(standin, ended("Failed", reason, "No."))(before)
    again = jobs.ensure(wanted())
    assert (again["metadata"]["uid"] != before["metadata"]["uid"]) is made_anew


def test_a_job_that_somebody_deletes_ends_the_task(standin, jobs):
    thread = when_made(
        standin, wanted().name, lambda job: standin.remove("transferjobs", "team", wanted().name)
    )
    with pytest.raises(ClusterError, match="was deleted"):
        train(wanted(), jobs)
    thread.join()


def test_an_api_server_that_does_not_answer_for_a_while_is_waited_for(standin, jobs):
    def work(job):
        standin.refuse["get", "transferjobs"] = (503, "ServiceUnavailable", "a moment")
        before = len(standin.calls)
        standin.wait(lambda: len(standin.calls) > before + 2)
        standin.refuse.clear()
        standin.put("transferjobs", {**job, "status": ended("Succeeded", modelUri="/artifacts/x")})

    thread = when_made(standin, wanted().name, work)
    assert train(wanted(), jobs).model_uri == "/artifacts/x"
    thread.join()


def test_a_spec_that_the_api_server_refuses_is_a_config_error(standin, jobs):
    standin.refuse["create", "transferjobs"] = (422, "Invalid", "spec.nodes: must be at most 64")
    with pytest.raises(ConfigError, match="at most 64"):
        train(wanted(), jobs)


def test_a_forbidden_call_says_which_role_is_missing(standin, jobs):
    standin.refuse["create", "transferjobs"] = (403, "Forbidden", "may not create")
    with pytest.raises(ClusterError, match="kubegraft-submit"):
        train(wanted(), jobs)


def test_what_is_left_open_is_not_in_the_spec_and_further_fields_win():
    spec = job_spec(
        config={"seed": 0, "head": {"backbone": "resnet50", "weights": ""}, "ingest": {"source": ""}},
        cluster={"nodes": 2, "accelerators": None, "tolerations": [], "queueName": ""},
        further={"head": {"input_size": 96}, "maxRestarts": 5, "nodes": 4},
    )
    assert spec == {
        "seed": 0,
        "head": {"backbone": "resnet50", "input_size": 96},
        "nodes": 4,
        "maxRestarts": 5,
    }


def test_the_component_s_arguments_make_a_spec():
    given = {
        "job_namespace": "team", "source": "gs://b/photos", "backbone": "resnet50", "seed": 3, "nodes": 2,
        "accelerators_per_node": 1, "accelerator_resource": "nvidia.com/gpu", "node_selector": {"pool": "gpu"},
        "tolerations": [{"operator": "Exists"}], "training_image": "r/i:1", "claim": "c", "publish": "gs://b/out",
        "queue_name": "q", "further": {}, "keep_on_stop": True,
    }  # fmt: skip
    found = wanted_of(given)
    assert (found.namespace, found.keep_on_stop) == ("team", True)
    assert found.spec == {
        "seed": 3, "ingest": {"source": "gs://b/photos"}, "head": {"backbone": "resnet50"}, "nodes": 2,
        "accelerators": {"count": 1, "resource": "nvidia.com/gpu"}, "nodeSelector": {"pool": "gpu"},
        "tolerations": [{"operator": "Exists"}], "image": "r/i:1", "artifacts": {"claim": "c"},
        "model_store": {"uri": "gs://b/out"}, "queueName": "q",
    }  # fmt: skip
