"""`kubegraft submit` and `schedule` against `tests.kfp_standin`, which stands in for a KFP API server.

No Kubernetes and no Kubeflow run here: the stand-in keeps what a real `kfp.Client` sends it over loopback. What a real
backend does with it is tested in tests/e2e where `KUBEGRAFT_KFP_ENDPOINT` is set.
"""

import json
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from kfp import compiler, dsl, kubernetes

from kubegraft import submit as submitting
from kubegraft.cli import main
from kubegraft.errors import ClusterError, ConfigError, KubegraftError
from kubegraft.kfp_client import connection as connecting
from kubegraft.kfp_client.connection import Connection
from kubegraft.kfp_client.package import PipelinePackage, load_package
from kubegraft.kfp_client.placement import Placement, parse_selector, parse_toleration, run_parameters
from kubegraft.kfp_client.schedules import check_cron, parse_interval
from kubegraft.run_config import from_parameters, pipeline_parameters
from kubegraft.submit import Submission
from pipelines.compile import main as compile_main
from tests.kfp_standin import StandIn

ROOT = Path(__file__).resolve().parents[2]
COMPILED = (ROOT / "pipelines" / "compiled" / "transfer_learning.yaml").read_text()
FOR_GPUS = (ROOT / "pipelines" / "compiled" / "transfer_learning_gpu.yaml").read_text()


@pytest.fixture
def kfp():
    with StandIn() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _outside_of_a_cluster(monkeypatch, tmp_path):
    names = ("KUBEGRAFT_KFP_ENDPOINT", "KUBEGRAFT_KFP_NAMESPACE", "KUBEGRAFT_KFP_TOKEN_FILE")
    for name in (*names, "KUBERNETES_SERVICE_HOST", "KF_PIPELINES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        "kfp.client.client.Client._LOCAL_KFP_CONTEXT", str(tmp_path / "none" / "context.json")
    )


@pytest.fixture
def call(kfp):
    def call_cli(*arguments, endpoint=True):
        command = [str(argument) for argument in arguments]
        command += ["--endpoint", kfp.url] if endpoint else []
        return CliRunner().invoke(main, command)

    return call_cli


def submit(call, *arguments):
    result = call("submit", "--json", "--poll-seconds", "0.01", *arguments)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def create(call, *arguments):
    result = call("schedule", "create", "--json", "--name", "nightly", *arguments)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_the_first_call_makes_what_is_missing_and_the_second_nothing(call, kfp):
    first = submit(call, "--seed", "3")
    assert first["started"]
    assert kfp.changes() == ["create pipeline", "create version", "create experiment", "create run"]
    second = submit(call, "--seed", "3")
    assert not second["started"]
    assert second["run_id"] == first["run_id"]
    assert len(kfp.changes()) == 4


def test_a_version_is_named_by_its_content(call, kfp):
    submit(call, "--no-wait")
    submit(call, "--no-wait", "--image", "registry.example/train:7")
    first, second = kfp.versions.values()
    assert first["pipeline_id"] == second["pipeline_id"]
    assert first["display_name"] == PipelinePackage(COMPILED).version_name
    assert first["display_name"] != second["display_name"]
    images = {
        e["container"]["image"] for e in second["pipeline_spec"]["deploymentSpec"]["executors"].values()
    }
    assert images == {"registry.example/train:7"}


def test_an_upload_that_broke_off_is_finished_by_the_next_call(call, kfp):
    kfp.failures.append(("upload_version", 500))
    assert call("submit").exit_code == ClusterError.exit_code
    assert kfp.changes() == ["create pipeline"]
    submit(call)
    assert len(kfp.pipelines) == len(kfp.versions) == 1


def test_other_parameters_are_another_run_and_again_is_the_same_once_more(call, kfp):
    names = [submit(call, *flags)["name"] for flags in ([], ["--seed", "1"], ["--again"])]
    assert names[0] != names[1]
    assert names[0] == names[2]
    assert len(kfp.runs) == 3


@pytest.mark.parametrize("state", ["FAILED", "CANCELED"])
def test_a_run_that_failed_is_tried_anew_by_the_same_call(call, kfp, state):
    kfp.run_states = [(state, {})]
    assert call("submit", "--poll-seconds", "0.01").exit_code == 1
    kfp.run_states = [("SUCCEEDED", {})]
    assert submit(call)["started"]


def test_a_run_gets_the_config_of_a_local_run(call, kfp, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed: 5\ningest:\n  source: gs://bucket/photos\nhead:\n  hidden_units: [64, 32]\n")
    submit(call, "--config", path, "--num-blocks", "2")
    (run,) = kfp.runs.values()
    parameters = run["runtime_config"]["parameters"]
    cluster = {name: parameters.pop(name) for name in Placement().parameters()}
    config = from_parameters(parameters)
    assert (config.seed, config.ingest.source) == (5, "gs://bucket/photos")
    assert (config.head.hidden_units, config.fine_tune.num_blocks) == ((64, 32), 2)
    assert cluster == Placement().parameters()
    assert pipeline_parameters(config) == parameters


def test_placement_reaches_the_run(call, kfp):
    flags = ["--accelerator-count", "2", "--node-selector", "pool=gpu", "--toleration", "gpu=yes:NoSchedule"]
    submit(call, *flags, "--pod-service-account", "trainer", "--pipeline-root", "s3://bucket/root")
    (run,) = kfp.runs.values()
    parameters = run["runtime_config"]["parameters"]
    assert parameters["accelerator_count"] == 2
    assert parameters["node_selector"] == {"pool": "gpu"}
    assert parameters["tolerations"] == [
        {"key": "gpu", "operator": "Equal", "value": "yes", "effect": "NoSchedule"}
    ]
    assert run["service_account"] == "trainer"
    assert run["runtime_config"]["pipeline_root"] == "s3://bucket/root"


def test_each_task_is_reported_once_a_state_and_helpers_are_not(call, kfp):
    kfp.run_states = [
        ("RUNNING", {"root-driver": "SUCCEEDED", "ingest": "RUNNING"}),
        ("RUNNING", {"ingest": "RUNNING"}),
        ("RUNNING", {"ingest": "SUCCEEDED", "train-head": "RUNNING"}),
        ("SUCCEEDED", {"ingest": "SUCCEEDED", "train-head": "SUCCEEDED"}),
    ]
    result = call("submit", "--poll-seconds", "0.01")
    events = [line.split(" ", 2)[2] for line in result.stderr.splitlines() if "task=" in line]
    assert events == [
        "running  task=run",
        "running  task=ingest",
        "succeeded  task=ingest",
        "running  task=train-head",
        "succeeded  task=run",
        "succeeded  task=train-head",
    ]
    assert f"{kfp.url}/#/runs/details/" in result.stdout


def test_a_failed_run_ends_with_the_task_and_where_to_look(call, kfp):
    kfp.run_states = [("FAILED", {"ingest": "FAILED", "train-head": "SKIPPED"})]
    result = call("submit", "--poll-seconds", "0.01")
    assert result.exit_code == KubegraftError.exit_code
    assert "FAILED in ingest." in result.stderr
    assert "/#/runs/details/run-" in result.stderr


def test_a_network_that_comes_back_does_not_end_the_watch(call, kfp):
    kfp.failures += [("runs/run-", 503)] * 3
    assert submit(call)["state"] == "SUCCEEDED"
    kfp.failures += [("runs/run-", 503)] * 9
    result = call("submit", "--poll-seconds", "0.01")
    assert result.exit_code == ClusterError.exit_code
    assert "injected 503" in result.stderr


def test_links_lead_to_the_ui(call):
    assert submit(call, "--ui-url", "https://ui.example/pipeline")["link"].startswith(
        "https://ui.example/pipeline/#/runs/details/"
    )


def test_a_token_file_is_read_before_each_call(call, kfp, tmp_path):
    path = tmp_path / "token"
    path.write_text("old")
    kfp.token = path.read_text
    kfp.run_states = [("RUNNING", {})] * 2 + [("SUCCEEDED", {})]
    submit(call, "--token-file", path)
    path.write_text("renewed\n")
    kfp.token = lambda: "renewed"
    submit(call, "--token-file", path)


def test_a_refused_call_says_what_to_give_and_no_token(call, kfp, tmp_path):
    path = tmp_path / "token"
    path.write_text("secret-token")
    kfp.token = lambda: "another"
    for flags in ([], ["--token-file", path]):
        result = call("submit", *flags)
        assert result.exit_code == ClusterError.exit_code
        assert "401" in result.stderr
        assert "--token-file" in result.stderr
        assert "secret-token" not in result.stderr + result.stdout


def test_a_pods_service_account_is_used(kfp, tmp_path, monkeypatch):
    token = tmp_path / "token"
    token.write_text("pod")
    kfp.token = lambda: "pod"
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(token))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setattr(connecting, "IN_CLUSTER_ENDPOINT", kfp.url)
    outcome = submitting.submit(Submission(), Connection(service_account=True), wait=False)
    assert outcome["started"]
    token.unlink()
    with pytest.raises(ConfigError, match="service_account"):
        submitting.submit(Submission(), Connection(service_account=True), wait=False)


def test_the_iap_client_asks_for_an_identity_token(kfp, monkeypatch):
    asked = []

    def identity_token(client_id, *_):
        asked.append(client_id)
        return "iap", False

    monkeypatch.setattr("kfp.client.auth.get_auth_token", identity_token)  # Google's servers are not here
    kfp.token = lambda: "iap"
    submitting.submit(Submission(), Connection(endpoint=kfp.url, iap_client_id="id"), wait=False)
    assert asked == ["id"]


def test_a_multi_user_kubeflow_gets_the_namespace(call, kfp):
    kfp.multi_user = True
    submit(call, "--namespace", "team")
    submit(call, "--namespace", "team")
    assert [e["namespace"] for e in kfp.experiments.values()] == ["team"]
    assert [p["namespace"] for p in kfp.pipelines.values()] == ["team"]
    assert len(kfp.runs) == 1


def test_who_calls_may_be_said_by_variables(call, kfp, tmp_path, monkeypatch):
    token = tmp_path / "token"
    token.write_text("mine")
    kfp.multi_user, kfp.token = True, lambda: "mine"
    monkeypatch.setenv("KUBEGRAFT_KFP_NAMESPACE", "team")
    monkeypatch.setenv("KUBEGRAFT_KFP_TOKEN_FILE", str(token))
    submit(call, "--no-wait")
    assert [one["namespace"] for one in kfp.experiments.values()] == ["team"]


def test_nothing_listening_is_told_at_once(call):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    result = call("submit", "--endpoint", f"http://127.0.0.1:{port}", endpoint=False)
    assert result.exit_code == ClusterError.exit_code
    assert "port-forward" in result.stderr


def test_without_an_endpoint_outside_of_a_cluster_it_says_how_to_make_one(call):
    result = call("submit", endpoint=False)
    assert result.exit_code == 2
    assert "kubectl port-forward" in result.stderr


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"endpoint": "localhost:8080"}, "http:// or https://"),
        ({"endpoint": "http://user:secret@host"}, "must not hold a password"),
        ({"token_file": "/nowhere/token"}, "must name a file"),
        ({"token_file": __file__, "iap_client_id": "x"}, "only one may be given"),
    ],
)
def test_a_connection_is_checked_before_any_call(fields, message):
    with pytest.raises(ConfigError, match=message) as error:
        Connection(**fields)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["photos"], "a path on this machine"),
        (["/data/photos"], "a path on this machine"),
        (["--weights", "resnet.weights.h5"], "`weights` must be a URI"),
        (["ftp://host/photos"], "must begin with one of"),
        (["https://user:word@host/photos.zip"], "no user name, password or signature"),
        (["--weights", "https://host/own.h5?token=word"], "no user name, password or signature"),
        (["--backbone", "resnet5"], "Did you mean"),
        (["--image", "registry.example/train"], "a tag or digest"),
        (["--image", "registry.example:5000/train:latest"], "a tag or digest"),
        (["--image", "a:1", "--registry", "b"], "one of the two"),
        (["--node-selector", "gpu"], "label=value"),
        (["--toleration", "gpu:NoSchedul"], "Did you mean 'NoSchedule'"),
        (["--accelerator-count", "-1"], "0 or more"),
        (["--secret", "AWS_SECRET=word"], "name of a Secret"),
    ],
)
def test_what_cant_run_in_a_cluster_is_refused_before_any_call(call, kfp, flags, message):
    result = call("submit", *flags)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not kfp.calls


@pytest.mark.parametrize(
    ("text", "toleration"),
    [
        ("gpu", {"key": "gpu", "operator": "Exists"}),
        ("gpu:NoExecute", {"key": "gpu", "operator": "Exists", "effect": "NoExecute"}),
        ("a/b=c", {"key": "a/b", "operator": "Equal", "value": "c"}),
    ],
)
def test_tolerations_have_the_form_of_kubectl(text, toleration):
    assert parse_toleration(text) == toleration


def test_a_selector_value_may_hold_anything_a_label_may():
    assert parse_selector("cloud.example/pool=gpu-a.1") == ("cloud.example/pool", "gpu-a.1")


def test_a_path_in_the_image_can_be_said():
    config = from_parameters({"source": "file:///data/photos"})
    assert run_parameters(config, Placement())["source"] == "file:///data/photos"


# Schedules


def test_a_schedule_is_made_once(call, kfp):
    first = create(call, "--cron", "0 0 3 * * *")
    changes = kfp.changes()
    second = create(call, "--cron", "0 0 3 * * *")
    assert (first["change"], second["change"]) == ("created", "unchanged")
    assert kfp.changes() == changes
    assert first["recurring_run_id"] == second["recurring_run_id"]


def test_a_schedule_follows_the_newest_version_unless_it_is_pinned(call, kfp):
    create(call, "--interval", "12h", "--seed", "4")
    (recurring,) = kfp.recurring_runs.values()
    assert set(recurring["pipeline_version_reference"]) == {"pipeline_id"}
    assert recurring["runtime_config"]["parameters"] == {"seed": 4}
    assert recurring["trigger"] == {"periodic_schedule": {"interval_second": "43200"}}
    create(call, "--interval", "12h", "--seed", "4", "--pin")
    (pinned,) = kfp.recurring_runs.values()
    assert pinned["pipeline_version_reference"]["pipeline_version_id"] in kfp.versions
    assert len(pinned["runtime_config"]["parameters"]) > 40


def test_a_new_version_leaves_a_following_schedule_alone(call, kfp):
    create(call, "--cron", "0 0 3 * * *")
    assert create(call, "--cron", "0 0 3 * * *", "--image", "a/b:2")["change"] == "unchanged"
    assert len(kfp.versions) == 2


def test_other_content_replaces_a_schedule_which_stays_paused(call, kfp):
    create(call, "--cron", "0 0 3 * * *")
    call("schedule", "pause", "nightly")
    assert create(call, "--cron", "0 0 4 * * *")["change"] == "replaced"
    (recurring,) = kfp.recurring_runs.values()
    assert recurring["trigger"] == {"cron_schedule": {"cron": "0 0 4 * * *"}}
    assert recurring["status"] == "DISABLED"
    assert recurring["no_catchup"] is True


def test_pausing_resuming_and_deleting_twice_is_as_once(call, kfp):
    create(call, "--cron", "0 0 3 * * *")
    for change in ("pause", "resume", "delete"):
        results = [call("schedule", change, "nightly") for _ in range(2)]
        assert [result.exit_code for result in results] == [0, 0]
        assert "nothing to" in results[1].stdout
    assert kfp.changes()[-3:] == ["disable recurring", "enable recurring", "delete recurring"]


def test_the_list_has_every_schedule(call, kfp):
    for number in range(130):
        kfp.recurring_runs[f"r{number}"] = {
            "recurring_run_id": f"r{number}",
            "display_name": f"n{number}",
            "status": "ENABLED",
        }
    create(call, "--cron", "0 0 3 * * *")
    call("schedule", "pause", "nightly")
    rows = json.loads(call("schedule", "list", "--json").stdout)
    assert len(rows) == 131
    assert rows[-1] == {
        "name": "nightly",
        "state": "paused",
        "when": "0 0 3 * * *",
        "version": "latest",
        "recurring_run_id": next(reversed(kfp.recurring_runs)),
    }
    assert "nightly" in call("schedule", "list").stdout


def test_an_unknown_schedule_gets_a_suggestion(call):
    create(call, "--cron", "0 0 3 * * *")
    result = call("schedule", "pause", "nihtly")
    assert result.exit_code == 2
    assert "Did you mean 'nightly'" in result.stderr


@pytest.mark.parametrize("cron", ["0 0 3 * * *", "*/10 0-30/5 1,2 ? JAN-MAR MON-FRI", "0 0 0 1 1 *"])
def test_crons_that_kfp_reads(cron):
    check_cron(cron)


@pytest.mark.parametrize(
    ("cron", "message"),
    [
        ("0 3 * * *", "'0 0 3 \\* \\* \\*'"),
        ("0 0 24 * * *", "hour in 0-23"),
        ("0 0 3 * * 7", "day of week in 0-6"),
        ("0 0 3 * * FRI-MON", "day of week"),
        ("0 */0 3 * * *", "minute"),
        ("x 0 3 * * *", "second"),
    ],
)
def test_crons_that_kfp_misreads_are_refused(cron, message):
    with pytest.raises(ConfigError, match=message):
        check_cron(cron)


def test_when_to_run_is_said_once(call, kfp):
    for flags in ([], ["--cron", "0 0 3 * * *", "--interval", "1h"], ["--interval", "1 hour"]):
        assert call("schedule", "create", "--name", "nightly", *flags).exit_code == 2
    assert not kfp.calls
    assert [parse_interval(text) for text in ("90s", "30m", "12h", "7d")] == [90, 1800, 43200, 604800]


# The package


def test_a_checkouts_package_is_the_committed_file():
    assert load_package().text == COMPILED
    assert load_package("gpu").text == FOR_GPUS


@pytest.mark.parametrize(
    ("names", "images"),
    [
        ({"registry": "r.example/x"}, ("r.example/x/kubegraft-train:", "r.example/x/kubegraft-train-gpu:")),
        ({"image": "r:5000/kubegraft-train:7"}, ("r:5000/kubegraft-train:7", "r:5000/kubegraft-train-gpu:7")),
        ({"image": "a:1", "gpu_image": "b:2"}, ("a:1", "b:2")),
        ({"gpu_image": "b:2"}, ("ghcr.io/kubegraft/kubegraft-train:", "b:2")),
    ],
)
def test_the_image_for_gpus_follows_the_other(names, images):
    found = PipelinePackage(FOR_GPUS).with_image(**names).images
    assert all(name.startswith(start) for name, start in zip(found, images, strict=True)), found


def test_an_image_for_gpus_beside_one_of_another_name_reaches_the_training_tasks_only():
    in_one = PipelinePackage(FOR_GPUS).with_image(image="own:1", gpu_image="own:1")
    executors = next(iter(yaml.safe_load_all(in_one.with_image(gpu_image="b:2").text)))["deploymentSpec"][
        "executors"
    ]
    images = {name: executor["container"]["image"] for name, executor in executors.items()}
    assert {name for name, image in images.items() if image == "b:2"} == {"exec-train-head", "exec-fine-tune"}
    assert set(images.values()) == {"own:1", "b:2"}


@pytest.mark.parametrize(
    ("variables", "images"),
    [
        (
            {"KUBEGRAFT_REGISTRY": "r.example"},
            ("r.example/kubegraft-train:", "r.example/kubegraft-train-gpu:"),
        ),
        (
            {"KUBEGRAFT_TRAIN_IMAGE": "r/kubegraft-train:7"},
            ("r/kubegraft-train:7", "r/kubegraft-train-gpu:7"),
        ),
        ({"KUBEGRAFT_TRAIN_IMAGE": "own:1"}, ("own:1", "own:1")),
        ({"KUBEGRAFT_TRAIN_IMAGE": "own:1", "KUBEGRAFT_TRAIN_GPU_IMAGE": "b:2"}, ("own:1", "b:2")),
    ],
)
def test_an_installed_kubegraft_takes_images_from_the_environment_as_a_checkout_does(
    variables, images, monkeypatch
):
    monkeypatch.setattr("kubegraft.local_run._COMPILED_DIR", ROOT / "pipelines" / "compiled")
    monkeypatch.setattr("kubegraft.kfp_client.package.find_checkout", lambda: None)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = load_package("gpu").images
    assert all(name.startswith(start) for name, start in zip(found, images, strict=True)), found
    assert load_package("cpu").images[1].startswith(images[0])


def test_an_image_for_gpus_is_not_guessed():
    with pytest.raises(ConfigError, match="--gpu-image"):
        PipelinePackage(FOR_GPUS).with_image(image="own:1")


@pytest.mark.parametrize("flags", [[], ["--work-claim", "results", "--node-selector", "pool=gpu"]])
def test_an_installed_kubegraft_writes_what_a_checkout_compiles(flags, tmp_path, monkeypatch):
    monkeypatch.setattr("kubegraft.local_run._COMPILED_DIR", ROOT / "pipelines" / "compiled")
    for place, checkout in (("compiled", ROOT), ("installed", None)):
        monkeypatch.setattr("kubegraft.local_run.find_checkout", lambda found=checkout: found)
        monkeypatch.setattr("kubegraft.kfp_client.package.find_checkout", lambda found=checkout: found)
        result = CliRunner().invoke(main, ["compile", "--output-dir", str(tmp_path / place), *flags])
        assert result.exit_code == 0, result.output
    for name in ("transfer_learning.yaml", "transfer_learning_gpu.yaml"):
        ours, theirs = (
            list(yaml.safe_load_all((tmp_path / p / name).read_text())) for p in ("compiled", "installed")
        )
        assert ours == theirs


def test_an_image_can_be_chosen_after_compiling_or_when_compiling(tmp_path, capfd):
    for flag, value in (("--image", "registry.example:5000/x/y:1"), ("--registry", "registry.example/team/")):
        assert compile_main([flag, value, "--output-dir", str(tmp_path)]) == 0
        compiled = (tmp_path / "transfer_learning.yaml").read_text()
        replaced = PipelinePackage(COMPILED).with_image(**{flag.removeprefix("--"): value})
        assert compiled == replaced.text
        assert compile_main([flag, value, "--output-dir", str(tmp_path), "--check"]) == 0
    assert compile_main(["--output-dir", str(tmp_path), "--check"]) == 1
    capfd.readouterr()


def test_compiling_refuses_an_image_that_moves(tmp_path):
    script = str(ROOT / "pipelines" / "compile.py")
    command = [sys.executable, script, "--image", "x:latest", "--output-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "never moves" in done.stderr


def test_credentials_come_from_a_secret_by_the_names_that_clients_of_stores_know(call, kfp, tmp_path):
    submit(call, "s3://bucket/photos", "--secret", "kubegraft-s3", "--work-claim", "results")
    assert "kubegraft-s3" not in json.dumps(list(kfp.runs.values()))
    text = PipelinePackage(COMPILED).with_secret("kubegraft-s3").text
    assert "&id" not in text
    _, platform = yaml.safe_load_all(text)
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert len(executors) == len(PipelinePackage(COMPILED).tasks)
    for executor in executors.values():
        (secret,) = executor["secretAsEnv"]
        assert secret == _as_kfp_writes_it(
            tmp_path / "kfp.yaml", [key["secretKey"] for key in secret["keyToEnv"]]
        )
        assert {"envVar": "AWS_SECRET_ACCESS_KEY", "secretKey": "AWS_SECRET_ACCESS_KEY"} in secret["keyToEnv"]


@dsl.component(base_image="x:1", install_kfp_package=False)
def _nothing():
    pass


def _as_kfp_writes_it(path, keys):
    @dsl.pipeline
    def with_secret():
        kubernetes.use_secret_as_env(_nothing(), "kubegraft-s3", {key: key for key in keys}, optional=True)

    compiler.Compiler().compile(with_secret, str(path))
    _, platform = yaml.safe_load_all(path.read_text())
    (executor,) = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values()
    return executor["secretAsEnv"][0]


def test_without_caching_no_task_is_answered_from_the_cache():
    spec = next(iter(yaml.safe_load_all(PipelinePackage(COMPILED).without_caching().text)))
    assert [task["cachingOptions"] for task in spec["root"]["dag"]["tasks"].values()] == [{}] * 6
