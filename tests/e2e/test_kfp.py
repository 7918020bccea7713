"""Kubeflow Pipelines for real: upload, run, artifacts, cache, changed and bad images, a schedule that fires.

They run where KUBEGRAFT_KFP_ENDPOINT names the UI of a KFP 2.17 (CONTRIBUTING.md). A pod in the namespace `kubegraft`
serves the photographs, which pods of every namespace can read without credentials. For another place set
KUBEGRAFT_E2E_KFP_DATA to a folder (gs://, s3://) that this machine can write and the tasks' pods can read.
"""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
import zipfile

import pytest
import yaml

from tests.e2e.conftest import ROOT, is_image, is_one_of_few
from tests.e2e.kube import restricted_pod

pytestmark = pytest.mark.skipif(
    not os.environ.get("KUBEGRAFT_KFP_ENDPOINT"),
    reason="KUBEGRAFT_KFP_ENDPOINT is not set: there is no Kubeflow Pipelines to test with",
)

STARTED = int(time.time())
NAME = (
    f"kubegraft-e2e-{STARTED}"  # of pipeline, experiment and schedule: nothing is there before the first call
)
RUN_SECONDS = 2400
FIRE_SECONDS = 240
SPEC = next(
    iter(yaml.safe_load_all((ROOT / "pipelines" / "compiled" / "transfer_learning.yaml").read_text()))
)
TASKS = tuple(SPEC["root"]["dag"]["tasks"])
LOOK = "check-images"  # the one task that the cache must never answer
CONFIG = {
    "seed": STARTED,  # so that no earlier session's tasks are in the cache
    "head": {"input_size": 96, "num_epochs": 5},
    "fine_tune": {"num_epochs": 1, "num_blocks": 1},
    "evaluate": {"num_bootstrap_samples": 100},
}


def artifacts_of(task):
    component = SPEC["components"][SPEC["root"]["dag"]["tasks"][task]["componentRef"]["name"]]
    return set(component["outputDefinitions"].get("artifacts", {}))


def kubegraft(*arguments, seconds=300, code=0):
    """Call the command line as a user does."""
    command = [sys.executable, "-m", "kubegraft", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"not over after {seconds} s: {shlex.join(command)}\n{(error.stderr or b'').decode()}")
    assert done.returncode == code, f"{shlex.join(command)} ended with {done.returncode}:\n{done.stderr}"
    return done


def answer(*arguments, **options):
    return json.loads(kubegraft(*arguments, "--json", **options).stdout)


# Images that change under one URI


class Served:
    """Files that a pod in the namespace `kubegraft` serves."""

    uri = "http://photographs.kubegraft.svc"
    folder = "import os, sys; os.makedirs('/tmp/served', exist_ok=True)"
    serve = "os.execv(sys.executable, ['python3', '-m', 'http.server', '8080', '--directory', '/tmp/served'])"
    write = (
        "import os, sys; open('/tmp/partial', 'wb').write(sys.stdin.buffer.read()); "
        "os.replace('/tmp/partial', '/tmp/served/' + sys.argv[1])"
    )

    def __init__(self, cluster, image):
        self.cluster = cluster
        command = ["python3", "-c", f"{self.folder}; {self.serve}"]
        pod = restricted_pod(
            "photographs",
            image,
            command,
            ports=[{"containerPort": 8080}],
            readinessProbe={"tcpSocket": {"port": 8080}, "periodSeconds": 1},
        )
        service = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "photographs"},
            "spec": {"selector": {"app": "photographs"}, "ports": [{"port": 80, "targetPort": 8080}]},
        }
        policy = {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": "photographs"},
            "spec": {
                "podSelector": {"matchLabels": {"app": "photographs"}},
                "policyTypes": ["Ingress"],
                "ingress": [
                    {"from": [{"namespaceSelector": {}}], "ports": [{"protocol": "TCP", "port": 8080}]}
                ],
            },
        }
        self.remove()
        cluster.apply(pod, service, policy)
        cluster.kubectl("wait", "--for=condition=Ready", "pod/photographs", "--timeout=180s", seconds=200)

    def put(self, name, content):
        self.cluster.execute("photographs", "python3", "-c", self.write, name, content=content)

    def remove(self):
        what = ("pod/photographs", "service/photographs", "networkpolicy/photographs")
        self.cluster.kubectl("delete", *what, "--ignore-not-found", "--wait=true")


class Published:
    """Files in a folder of a bucket."""

    def __init__(self, uri, folder):
        self.uri, self.folder = f"{uri.rstrip('/')}/{NAME}", folder

    def put(self, name, content):
        from kubegraft.storage import publish_tree

        (self.folder / name).write_bytes(content)
        publish_tree(self.folder, self.uri)

    def remove(self):
        """Leave it: who lends a bucket for tests has a rule that empties it."""


def zipped(photographs, keep):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for path in sorted(photographs.rglob("*")):
            name = path.relative_to(photographs)
            if path.is_file() and keep(name):
                file.writestr(zipfile.ZipInfo(name.as_posix()), path.read_bytes())
    return buffer.getvalue()


def one_more_than_few(photographs):
    names = sorted(path.relative_to(photographs) for path in (photographs / "train" / "0").iterdir())
    extra = next(name for name in names if is_image(name) and not is_one_of_few(name))
    return lambda name: is_one_of_few(name) or name == extra


@pytest.fixture(scope="module")
def source(request, tmp_path_factory):
    if uri := os.environ.get("KUBEGRAFT_E2E_KFP_DATA"):
        source = Published(uri, tmp_path_factory.mktemp("published"))
    else:
        source = Served(request.getfixturevalue("cluster"), request.getfixturevalue("image"))
    source.put("few.zip", zipped(request.getfixturevalue("photographs"), is_one_of_few))
    yield source
    source.remove()


# Runs, each made once for the module, in this order


@pytest.fixture(scope="module")
def kfp():
    from tests.e2e.kfp_installation import Installation

    kfp = Installation()
    yield kfp
    clean_up(kfp)


def clean_up(kfp):
    """Stop and put away what the tests made; its runs can still be looked at in the archive."""
    kubegraft("schedule", "delete", NAME)
    try:
        experiment = kfp.client.get_experiment(experiment_name=NAME, namespace=kfp.namespace or None)
    except ValueError:  # the first call came to nothing
        return
    runs = kfp.runs(experiment.experiment_id)
    for run in runs:
        if run.state in ("PENDING", "RUNNING"):
            kfp.client.terminate_run(run.run_id)
    kfp.client.archive_experiment(experiment.experiment_id)
    for pipeline_id in {run.pipeline_version_reference.pipeline_id for run in runs}:
        for version in kfp.versions(pipeline_id):
            kfp.client.delete_pipeline_version(pipeline_id, version.pipeline_version_id)
        kfp.client.delete_pipeline(pipeline_id)


@pytest.fixture(scope="module")
def arguments(kfp, image, tmp_path_factory):
    """What every call is given."""
    config = tmp_path_factory.mktemp("kfp") / "run.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    return ("--config", str(config), "--image", image, "--pipeline", NAME, "--experiment", NAME)


@pytest.fixture(scope="module")
def ended(kfp, source, arguments):
    """Return a function that submits, waits, and returns what the command line said and the run."""

    def submit(*flags, state="SUCCEEDED"):
        outcome = answer("submit", f"{source.uri}/few.zip", *arguments, *flags, "--no-wait")
        run = kfp.wait(outcome["run_id"], seconds=RUN_SECONDS)
        assert run.state == state, kfp.story(outcome["run_id"])
        return outcome, run

    return submit


@pytest.fixture(scope="module")
def first(ended):
    return ended()


@pytest.fixture(scope="module")
def again(ended, first):
    return ended("--again")


@pytest.fixture(scope="module")
def changed(ended, again, source, photographs):
    source.put("few.zip", zipped(photographs, one_more_than_few(photographs)))
    return ended("--again")


def test_the_first_call_uploads_and_starts_a_run_that_succeeds(kfp, first):
    outcome, run = first
    assert outcome["started"]
    assert outcome["experiment"] == NAME
    states = kfp.task_states(run.run_id)
    assert {name: states.get(name) for name in TASKS} == dict.fromkeys(TASKS, "SUCCEEDED")
    versions = kfp.versions(run.pipeline_version_reference.pipeline_id)
    assert [version.display_name for version in versions] == [outcome["version"]]


def test_no_task_of_it_was_answered_from_the_cache(kfp, first):
    """Or the tests below would show nothing."""
    tasks = kfp.tasks(first[1].run_id)
    assert {name: tasks[name].state for name in TASKS} == dict.fromkeys(TASKS, "COMPLETE")


@pytest.mark.parametrize("task", TASKS)
def test_every_task_left_its_artifacts(kfp, first, task):
    artifacts = kfp.tasks(first[1].run_id)[task].artifacts
    assert artifacts_of(task) <= artifacts.keys()
    for name in artifacts_of(task):
        assert first[1].run_id in artifacts[name].uri


def test_its_metrics_are_there(kfp, first):
    tasks = kfp.tasks(first[1].run_id)
    evaluated = tasks["evaluate"].artifacts
    assert 0 <= evaluated["metrics"].metadata["test_accuracy"] <= 1
    assert evaluated["classification_metrics"].metadata["confusionMatrix"]
    ingested = tasks["ingest"].artifacts["metrics"].metadata
    assert ingested["num_accepted"] == tasks[LOOK].artifacts["metrics"].metadata["num_accepted"] > 0


def test_its_report_can_be_opened(kfp, first):
    report = kfp.content(kfp.tasks(first[1].run_id)["evaluate"].artifacts["report"])
    assert report.lstrip().lower().startswith("<!doctype html")


def test_the_same_call_changes_nothing_and_finds_the_run(kfp, first, source, arguments):
    _, run = first
    before = [one.run_id for one in kfp.runs(run.experiment_id)]
    found = answer("submit", f"{source.uri}/few.zip", *arguments)
    assert not found["started"]
    assert (found["run_id"], found["state"]) == (run.run_id, "SUCCEEDED")
    assert [one.run_id for one in kfp.runs(run.experiment_id)] == before
    assert len(kfp.versions(run.pipeline_version_reference.pipeline_id)) == 1


def test_another_run_on_the_same_images_is_answered_from_the_cache(kfp, again):
    outcome, run = again
    assert outcome["started"]
    tasks = kfp.tasks(run.run_id)
    assert {name: tasks[name].state for name in TASKS} == {**dict.fromkeys(TASKS, "CACHED"), LOOK: "COMPLETE"}


def test_one_more_photograph_is_trained_on(kfp, first, changed):
    tasks = kfp.tasks(changed[1].run_id)
    assert {name: tasks[name].state for name in TASKS} == dict.fromkeys(TASKS, "COMPLETE")
    counts = [
        kfp.tasks(run.run_id)["ingest"].artifacts["metrics"].metadata["num_accepted"]
        for _, run in (first, changed)
    ]
    assert counts[1] == counts[0] + 1


# A run on images that are none


@pytest.fixture(scope="module")
def failed(kfp, source, arguments):
    """A run on an archive without images: what the command line said, and the run."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("cat/notes.txt", "no photograph here")
        file.writestr("dog/notes.txt", "nor here")
    source.put("none.zip", buffer.getvalue())
    done = kubegraft("submit", f"{source.uri}/none.zip", *arguments, "--json", seconds=RUN_SECONDS, code=1)
    (*_, run_id) = re.findall(r"runs/details/([\w-]+)", done.stderr)
    return done, kfp.look(run_id)


def test_a_run_on_bad_images_ends_failed_and_says_where(kfp, failed):
    done, run = failed
    assert run.state == "FAILED"
    assert f"FAILED in {LOOK}" in done.stderr
    assert run.run_id in done.stderr
    tasks = kfp.tasks(run.run_id)
    assert tasks[LOOK].state == "FAILED"
    assert "train-head" not in tasks


def test_the_reason_is_the_last_line_of_the_artifact_with_the_steps_log(kfp, failed):
    artifacts = kfp.tasks(failed[1].run_id)[LOOK].artifacts
    assert "executor-logs" in artifacts, (
        "the API server must run with PUBLISH_LOGS=true, as upstream's manifests do"
    )
    lines = kfp.content(artifacts["executor-logs"]).strip().splitlines()
    assert lines[-1].startswith("Error: ")
    assert "image" in lines[-1]
    assert "exit_code=3" in lines[-2]


def test_the_reason_is_the_last_that_the_step_says_in_its_log(kfp, failed):
    """KFP's launcher and Argo say a word after it, each in a form of its own."""
    lines = kfp.log(kfp.tasks(failed[1].run_id)[LOOK]).splitlines()
    reasons = [number for number, line in enumerate(lines) if line.startswith("Error: ") and "image" in line]
    assert reasons, "\n".join(lines[-20:])
    assert not [line for line in lines[reasons[-1] + 1 :] if " ingest: " in line]


# A schedule


def scheduled():
    return {row["name"]: row for row in answer("schedule", "list")}


@pytest.fixture(scope="module")
def schedule(kfp, first, source, arguments):
    """Return a function that makes the schedule."""

    def create(*when):
        return answer("schedule", "create", f"{source.uri}/few.zip", *arguments, "--name", NAME, *when)

    yield create
    kubegraft("schedule", "delete", NAME)


def test_a_schedule_is_made_once_paused_and_resumed(schedule):
    made = schedule("--cron", "0 0 3 1 1 *")
    assert made["change"] == "created"
    again = schedule("--cron", "0 0 3 1 1 *")
    assert (again["change"], again["recurring_run_id"]) == ("unchanged", made["recurring_run_id"])
    assert {"state": "active", "when": "0 0 3 1 1 *", "version": "latest"}.items() <= scheduled()[
        NAME
    ].items()
    for change, state in (("pause", "paused"), ("resume", "active")):
        for changed in ([made["recurring_run_id"]], []):
            assert answer("schedule", change, NAME)["changed"] == changed
            assert scheduled()[NAME]["state"] == state


def test_a_schedule_fires(kfp, first, schedule):
    """It follows the newest version, with only what differs from the defaults."""
    made = schedule("--interval", "30s")
    assert scheduled()[NAME]["recurring_run_id"] == made["recurring_run_id"]

    def fired():
        runs = kfp.runs(first[1].experiment_id)
        return [run for run in runs if run.recurring_run_id == made["recurring_run_id"]]

    deadline = time.monotonic() + FIRE_SECONDS
    while not (runs := fired()):
        assert time.monotonic() < deadline, f"no run within {FIRE_SECONDS} s: {scheduled()}"
        time.sleep(5)
    kubegraft("schedule", "pause", NAME)
    run = kfp.wait(runs[-1].run_id, seconds=RUN_SECONDS)
    assert run.state == "SUCCEEDED", kfp.story(run.run_id)
    assert answer("schedule", "delete", NAME)["changed"] == [made["recurring_run_id"]]
    assert NAME not in scheduled()
