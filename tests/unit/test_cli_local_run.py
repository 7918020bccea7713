"""The run around the pipeline, with a pipeline of one tiny component in place of the real one."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kfp import dsl

from kubegraft import local_run, run_results, stage_processes
from kubegraft.child_processes import descendants
from kubegraft.errors import ConfigError, DataError, Interrupted, KubegraftError
from kubegraft.run_config import RunConfig
from kubegraft.run_log import RunLog, without_executor_echo
from kubegraft.stage import Outcome, StageResult, run_stage
from tests.watched_processes import is_alive, wait_until_gone


@dsl.component(base_image="x:1", install_kfp_package=False)
def stage(mode: str, result: dsl.Output[dsl.Model]):
    import os
    import pathlib
    import time

    from kubegraft import processes
    from kubegraft.errors import DataError, Interrupted
    from kubegraft.reporting.events import log_event

    with processes.exit_on_error("stage"), processes.stopping_gracefully():
        processes.catch_stop_signals()
        processes.end_with_run()
        log_event("stage", "started", pid=os.getpid())
        print("noise")  # noqa: T201
        if mode == "error":
            raise DataError("`x` is bad.")
        if mode == "crash":
            raise ValueError("boom")
        while mode == "wait":
            time.sleep(0.05)
            if processes.stop_requested():
                log_event("stage", "saved")
                raise Interrupted("stopped")
        while mode == "stubborn":
            time.sleep(0.05)
        pathlib.Path(result.path).mkdir(parents=True)


@dsl.pipeline(name="toy")
def toy(mode: str = "finish"):
    stage(mode=mode)


def run(mode, output_dir):
    """What `run_locally` does once it has a pipeline."""
    output_dir.mkdir(exist_ok=True)
    stage_processes._MODULES = ("kfp.dsl.executor",)  # the toy needs no TensorFlow
    with local_run._ready_for_stages(RunConfig(), output_dir, fresh=False) as server:
        return local_run._run(lambda **_: toy(mode=mode), RunConfig(), output_dir, server)


def test_a_terminal_shows_stages_and_the_log_everything(tmp_path, capfd):
    run_dir = run("finish", tmp_path / "out")
    shown = capfd.readouterr()
    assert shown.out == ""
    assert [line.split(" ", 1)[1].split("  ")[0] for line in shown.err.splitlines()] == ["stage: started"]
    log = (tmp_path / "out" / "run.log").read_text()
    assert "noise" in log
    assert "Executing task" in log
    assert run_dir.parent == tmp_path / "out" / "kfp"
    assert (run_dir / "stage" / "result").is_dir()


def test_the_environment_is_as_before(tmp_path):
    before = dict(os.environ)
    run("finish", tmp_path / "out")
    assert dict(os.environ) == before


@pytest.mark.parametrize("given", [None, "", "glibc.malloc.check=1"])
def test_stages_have_huge_pages_unless_the_user_says_otherwise(tmp_path, monkeypatch, given):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if given is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", given)
    variables = local_run._for_stages(tmp_path, fresh=False)
    assert variables["GLIBC_TUNABLES"] == ("glibc.malloc.hugetlb=1" if given is None else given)


def test_a_stages_error_is_the_runs(tmp_path, capfd):
    with pytest.raises(DataError, match=r"^`x` is bad\.$"):
        run("error", tmp_path / "out")
    assert "Traceback" not in capfd.readouterr().err


def test_an_earlier_runs_error_is_not_taken_for_this_ones(tmp_path):
    with pytest.raises(DataError):
        run("error", tmp_path / "out")
    with pytest.raises(KubegraftError, match="ended unexpectedly") as error:
        run("crash", tmp_path / "out")
    assert type(error.value) is KubegraftError


def test_a_crash_shows_what_the_stage_printed(tmp_path, capfd):
    with pytest.raises(KubegraftError, match=r"run\.log"):
        run("crash", tmp_path / "out")
    shown = capfd.readouterr().err
    assert "ValueError: boom" in shown
    assert "noise" in shown
    assert "executor_input" not in shown


@pytest.fixture
def start(tmp_path):
    """Return a function that starts a run in a process of its own, and waits for its stage."""
    processes = []

    def start_run(mode):
        program = (
            "import importlib.util, pathlib, sys\n"
            f"spec = importlib.util.spec_from_file_location('toy_run', {__file__!r})\n"
            "module = importlib.util.module_from_spec(spec); sys.modules['toy_run'] = module\n"
            "spec.loader.exec_module(module)\n"
            "from kubegraft.errors import Interrupted\n"
            "try:\n"
            f"    module.run({mode!r}, pathlib.Path({str(tmp_path / 'out')!r}))\n"
            "except Interrupted as error: sys.exit(error.exit_code)\n"
            "except KeyboardInterrupt: sys.exit(130)\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", program], stderr=subprocess.PIPE, text=True
        )
        processes.append(process)
        line = process.stderr.readline()
        assert "stage: started" in line, line + process.stderr.read()
        return process, int(line.rpartition("pid=")[2])

    yield start_run
    for process in processes:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_lets_the_stage_save_and_end(start, number, exit_code):
    process, stage_pid = start("wait")
    process.send_signal(number)
    assert process.wait(10) == exit_code
    assert "stage: saved" in process.stderr.read()
    wait_until_gone(stage_pid)


def test_a_second_signal_ends_a_stage_that_does_not_listen(start):
    process, stage_pid = start("stubborn")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert is_alive(stage_pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143
    wait_until_gone(stage_pid)


def test_a_run_whose_stages_have_not_begun_ends_at_once_when_asked(tmp_path):
    """As the first process of a pod it would otherwise ignore the signal; here it waits for a server's answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        weights = f"http://127.0.0.1:{server.getsockname()[1]}/resnet50.weights.h5"
        command = [sys.executable, "-m", "kubegraft", "run", "--backbone", "resnet50", "--weights", weights]
        with subprocess.Popen(
            [*command, "--output", str(tmp_path / "out")], stderr=subprocess.PIPE
        ) as process:
            server.settimeout(60)
            connection, _ = server.accept()
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 143
            connection.close()


def test_a_killed_run_leaves_no_stage_behind(start):
    process, stage_pid = start("stubborn")
    process.kill()
    wait_until_gone(stage_pid)


def test_descendants_are_found_through_shells():
    with subprocess.Popen(["sh", "-c", "sleep 30 & wait"]) as shell:
        deadline = time.monotonic() + 5
        while len(descendants(shell.pid)) < 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        below = descendants(shell.pid)
        assert below | {shell.pid} <= descendants(os.getpid())
        # And no others: servers that other tests use are below this process too.
        for pid in below | {shell.pid}:
            os.kill(pid, signal.SIGKILL)


def test_an_output_in_use_is_refused(tmp_path):
    message = f"process {os.getpid()} is running"
    with (
        local_run._locked(tmp_path),
        pytest.raises(ConfigError, match=message),
        local_run._locked(tmp_path),
    ):
        pass
    with local_run._locked(tmp_path):  # given back
        pass


def test_the_lock_is_not_inherited_by_stages(tmp_path):
    with local_run._locked(tmp_path):
        sleeper = subprocess.Popen(["sleep", "30"])
    try:
        with (tmp_path / ".kubegraft-run").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        sleeper.kill()
        sleeper.wait()


@pytest.mark.parametrize(
    ("source", "output", "message"),
    [
        ("missing", "out", "`source` must exist"),
        ("file:///missing", "out", "`source` must exist"),
        (".", "out", "outside of the images"),
        ("images", "images", "outside of the images"),
        ("images", "images/deeper/out", "outside of the images"),
        ("images", "file", "must be a directory"),
        ("images", "other", "holds other files"),
    ],
)
def test_what_can_be_known_before_is_said_before(tmp_path, monkeypatch, source, output, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").touch()
    config = RunConfig().with_values({("ingest", "source"): source})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=message):
        local_run.run_locally(config, output)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_checkouts_pipeline_is_the_one_that_is_compiled():
    from pipelines._registry import PIPELINES

    checkout = local_run.find_checkout()
    assert checkout == Path(__file__).resolve().parents[2]
    before = list(sys.path)
    assert local_run.load_pipeline() is PIPELINES["transfer_learning"]
    assert sys.path == before


def test_tasks_are_tried_once_here_and_as_often_as_before_elsewhere():
    def retries(pipeline):
        tasks = pipeline.component_spec.implementation.graph.root.dag.tasks.values()
        return [task.retry_policy.max_retry_count for task in tasks]

    pipeline = local_run.load_pipeline()
    before = retries(pipeline)
    assert all(before)
    assert not any(retries(local_run.without_retries(pipeline)))
    assert retries(pipeline) == before


def test_the_images_are_read_once_here():
    def tasks(pipeline):
        return dict(pipeline.component_spec.implementation.graph.root.dag.tasks)

    pipeline = local_run.load_pipeline()
    here = tasks(local_run.without_check(pipeline))
    assert tasks(pipeline).keys() - here.keys() == {"check-images"}
    named = {name for task in here.values() for name in task.dependent_tasks}
    assert named < here.keys()
    assert here["ingest"].inputs.parameters["images_digest"].runtime_value.constant.string_value == ""


def write_stage(name, directory, files):
    def body(workspace):
        for path, text in files.items():
            target = workspace.staging / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        return Outcome(digest=f"digest of {name}")

    return run_stage(
        name, directory, inputs={"run": directory.parts[-3]}, config=RunConfig().ingest, body=body
    )


@pytest.fixture
def finished_run(tmp_path, monkeypatch):
    """Return a function that writes what the stages of a run leave."""
    output_dir = tmp_path / "out"
    monkeypatch.setenv("KUBEGRAFT_WORK_DIR", str(output_dir / "work"))

    def write(name):
        run_dir = output_dir / "kfp" / name
        files = {
            "ingest": {"report.html": f"dataset {name}"},
            "train_head": {},
            "fine_tune": {},
            "evaluate": {"report.html": f"report {name}", "metrics.json": "{}"},
            "export": {"model.keras": f"model {name}", "saved_model/x": "1"},
        }
        for stage_name, path in run_results.ARTIFACTS.items():
            write_stage(stage_name, run_dir / path, files[stage_name])
        return run_dir, output_dir

    return write


def test_results_are_published_at_stable_paths_and_replaced_as_a_whole(finished_run):
    for name in ("first", "second"):
        run_dir, output_dir = finished_run(name)
        run_results.publish(run_dir, output_dir)
        assert (output_dir / "report.html").read_text() == f"report {name}"
        assert (output_dir / "dataset_report.html").read_text() == f"dataset {name}"
        assert (output_dir / "model" / "model.keras").read_text() == f"model {name}"
        assert (output_dir / "metrics.json").exists()
        names = {path.name for path in output_dir.iterdir()}
        assert names == {"kfp", "work", "report.html", "dataset_report.html", "metrics.json", "model"}


def test_editing_a_published_model_leaves_the_work_alone(finished_run):
    run_dir, output_dir = finished_run("first")
    run_results.publish(run_dir, output_dir)
    with (output_dir / "model" / "model.keras").open("a") as file:
        file.write("changed")
    assert (run_dir / "export" / "export_model" / "model.keras").read_text() == "model first"


def test_tidying_keeps_the_newest_run_and_recent_work(finished_run):
    for number in range(7):
        run_dir, output_dir = finished_run(f"run{number}")
        run_results.tidy(run_dir, output_dir, run_results.read_results(run_dir))
        assert [path.name for path in (output_dir / "kfp").iterdir()] == [f"run{number}"]
    kept = [path.name.rpartition("-")[0] for path in (output_dir / "work").iterdir()]
    assert {name: kept.count(name) for name in kept} == dict.fromkeys(run_results.ARTIFACTS, 5)
    used = json.loads((run_dir / "export" / "export_model" / "result.json").read_text())["key"]
    assert (output_dir / "work" / f"export-{used[:20]}").is_dir()


def test_the_summary_has_no_credentials_and_paths_as_given():
    metrics = {"start_validation_accuracy": 0.5, "validation_accuracy": 0.75}
    results = {
        name: StageResult(stage=name, output_dir=Path(), digest=name, metrics=metrics, provenance={})
        for name in run_results.ARTIFACTS
    }
    secret_uri = "https://me:secret@example.org/a.zip?token=secret"
    config = {"ingest": {"source": secret_uri}, "head": {"weights": secret_uri}}
    summary = run_results.summarise("./out", results, config, 12.34)
    assert "secret" not in json.dumps(summary)
    assert summary["model"] == "./out/model"
    assert summary["validation_accuracy"] == {"head": 0.5, "fine_tuned": 0.75}


def test_log_takes_text_in_any_pieces(tmp_path, capsys):
    with RunLog(tmp_path / "log") as log:
        for piece in (
            "    ",
            "10:00:00 ing",
            "est: started  a=1\n10:00:00.123 - INFO - x\n",
            '{"time": 1}',
            "\n",
        ):
            log.write(piece)
    assert capsys.readouterr().err == '10:00:00 ingest: started  a=1\n{"time": 1}\n'
    assert "INFO" in (tmp_path / "log").read_text()


def test_executors_echo_is_left_out():
    text = '    [KFP Executor x]: Got executor_input:\n    {\n        "a": {}\n    }\n    mine\n    }\n'
    assert without_executor_echo(text) == "mine\n}"


def test_interrupted_is_retryable():
    assert Interrupted.retryable


def test_the_log_shows_no_credentials(tmp_path):
    with RunLog(tmp_path / "run.log") as log:
        print("source: 'https://user:hunter2@host/x.zip?sig=SECRET', gs://bucket/plain", file=log)
    text = (tmp_path / "run.log").read_text()
    assert "hunter2" not in text
    assert "SECRET" not in text
    assert "https://***@host/x.zip?***" in text
    assert "gs://bucket/plain" in text
