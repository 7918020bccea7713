"""How the parts of a job report and end; what they do together is in `test_training_cluster`."""

import signal
import subprocess
import sys
import threading

import pytest

from kubegraft.job_report import latest_report, parse_report
from kubegraft.job_reporter import Reporter
from kubegraft.worker_job import run_part


@pytest.fixture
def termination(tmp_path, monkeypatch):
    path = tmp_path / "termination"
    monkeypatch.setenv("KUBEGRAFT_TERMINATION_FILE", str(path))
    return path


def call(part, tmp_path):
    return run_part(part, str(tmp_path / "run.yaml"), str(tmp_path / "job"))


def test_what_is_prepared_is_not_prepared_again(image_folder, tmp_path, termination, capfd):
    source = image_folder()
    (tmp_path / "run.yaml").write_text(f"ingest: {{source: {source}}}\nhead: {{weights: none}}\n")
    assert call("prepare", tmp_path) == 0
    first = parse_report(termination.read_text())
    assert first is not None
    assert first.done
    assert len(first.dataset_digest) == 64
    assert "ingest: finished" in capfd.readouterr().err
    (source / "class_0" / "0.png").unlink()
    assert call("prepare", tmp_path) == 0
    assert parse_report(termination.read_text()) == first
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "config",
    ["head: {backbone: resnet51}", "fine_tune: {num_blocks: 999}", "ingest: {source: /nowhere}", "heads: 3"],
)
def test_a_mistake_is_reported_with_its_exit_code(tmp_path, termination, capsys, config):
    (tmp_path / "run.yaml").write_text(config)
    assert call("prepare", tmp_path) == 2
    report = parse_report(termination.read_text())
    assert report is not None
    assert (report.exit_code, report.error, report.done) == (2, "ConfigError", False)
    assert latest_report(capsys.readouterr().out) == report


def test_what_nobody_foresaw_is_reported_too(tmp_path, termination, monkeypatch, capsys):
    from kubegraft import worker_job

    def fail(_):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(worker_job, "load_run_config", fail)
    assert call("finish", tmp_path) == 1
    report = parse_report(termination.read_text())
    assert report is not None
    assert (report.exit_code, report.error, report.message) == (1, "", "RuntimeError: out of luck")
    assert "Traceback" in capsys.readouterr().err


def test_reports_are_few(termination, capsys):
    reporter = Reporter()
    reporter.begin("train_head")
    for done in range(1001):
        reporter.observe("features", done, 1000)
    for done in range(1001):
        reporter.observe("train_head", done, 1000)
    reporter.finish({"validation_accuracy": 0.5, "num_epochs": 3})
    lines = [parse_report(line) for line in capsys.readouterr().out.splitlines()]
    assert [report.progress for report in lines] == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
    assert lines[-1].metrics == {"validation_accuracy": 0.5}
    assert not termination.exists()


STOPPED_IN_NATIVE_CODE = """
import ctypes, os
from kubegraft.job_reporter import Reporter
from kubegraft.processes import before_stopping, catch_stop_signals, watching_for_stop
catch_stop_signals()
before_stopping(lambda: Reporter().fail(143, "Interrupted", "asked to stop"))
with watching_for_stop():
    print("ready", flush=True)
    while True:
        ctypes.CDLL(None).pause()  # returns to Python only for a moment; the thread does not need that
"""


def test_a_stop_is_obeyed_and_reported_while_native_code_waits(termination):
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED_IN_NATIVE_CODE], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    process.stdout.close()
    report = parse_report(termination.read_text())
    assert report is not None
    assert (report.exit_code, report.error) == (143, "Interrupted")


def test_no_one_watches_for_a_stop_once_a_part_has_ended(tmp_path, termination, monkeypatch):
    from kubegraft import worker_job

    seen = []
    monkeypatch.setattr(worker_job, "load_run_config", lambda _: seen.extend(watchers()) or 1 / 0)
    assert call("prepare", tmp_path) == 1
    assert len(seen) == 1
    assert not watchers()
    assert signal.set_wakeup_fd(-1) == -1


def watchers():
    return [thread for thread in threading.enumerate() if thread.name == "watch-for-stop"]


WATCHED = """
import ctypes, sys
from kubegraft.training.watchdog import Watchdog
dog = Watchdog()
dog.last_words = lambda reason: print(reason, flush=True)
dog.arm(30, "never")
dog.disarm()
dog.arm(0.1, "too long")
if sys.argv[1] == "locked":
    ctypes.PyDLL(None).sleep(60)  # holds Python's lock, as TensorFlow does while it waits for peers
ctypes.CDLL(None).sleep(60)
"""


@pytest.mark.parametrize(("how", "words"), [("locked", ""), ("free", "too long\n")])
def test_the_watchdog_ends_a_process_that_hangs(how, words):
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, how], capture_output=True, text=True, check=False, timeout=50
    )
    assert (done.returncode, done.stdout) == (75, words)
