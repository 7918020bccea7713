"""Metrics as Prometheus would read them, over HTTP and from a file, of a stage and of a run with its processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kubegraft.reporting.measures import MEASURES

STAGE = """
import sys, time, urllib.request
from kubegraft.reporting import metrics
from kubegraft.reporting.events import log_event
from kubegraft.reporting.progress import Progress

log_event("train_head", "started")
log_event("train_head", "continuing", epoch=1, step=0)
with Progress("train_head", 40, "step", images_per_unit=8) as progress:
    progress.resume(10)
    progress.update(20)
epoch = {"epoch": 2, "train_loss": 0.5, "train_accuracy": 0.75, "validation_loss": 0.25,
         "validation_accuracy": 0.875, "learning_rate": 0.001}
metrics.observe_epoch("train_head", 5, epoch, best=0.9)
metrics.observe_counts("bad_images", "ingest", {"not an image": 3, 'a "quoted"\\\\reason': 1})
log_event("train_head", sys.argv[1], type="DataError")
port = __import__("os").environ.get("KUBEGRAFT_METRICS_PORT")
if port and port.isdecimal() and len(sys.argv) > 2:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        print(answer.read().decode())
"""
RUN = """
import os, subprocess, sys, urllib.request
from kubegraft.reporting import metrics
with metrics.serving_run():
    subprocess.run([sys.executable, "-c", sys.argv[1], sys.argv[2]], check=True)
    port = os.environ["KUBEGRAFT_METRICS_PORT"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        print(answer.read().decode())
    if sys.argv[2] == "failed":
        raise RuntimeError("the stage failed")
"""


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def run(program, *arguments, check=True, **variables):
    environment = {**os.environ, "KUBEGRAFT_RUN_NAME": "run-1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment | {name: str(value) for name, value in variables.items()},
        capture_output=True,
        text=True,
        timeout=120,
        check=check,
    )


def samples(text):
    """(name, labels besides the run) -> value, as Prometheus' own parser reads it."""
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("run", "run-1") == "run-1"
            found[sample.name.removeprefix("kubegraft_"), tuple(sorted(labels.items()))] = sample.value
    return found


def value(found, name, stage="train_head", **labels):
    return found[name, tuple(sorted({"stage": stage, **labels}.items()))]


def expect_a_stage(found):
    assert value(found, "stage_state", state="done") == 1
    assert value(found, "stage_state", state="running") == 0
    assert value(found, "stage_resumes_total") == 1
    assert value(found, "stage_duration_seconds") >= 0
    assert value(found, "last_success_timestamp_seconds") > 1.7e9
    assert value(found, "progress_items", unit="step") == 30
    assert value(found, "progress_items_target", unit="step") == 40
    assert value(found, "images_per_second") > value(found, "progress_items_per_second", unit="step") > 0
    assert (value(found, "epoch"), value(found, "epochs_target")) == (3, 5)
    assert (value(found, "train_loss"), value(found, "validation_accuracy")) == (0.5, 0.875)
    assert value(found, "best_validation_accuracy") == 0.9
    assert value(found, "bad_images", "ingest", reason="not an image") == 3
    assert value(found, "bad_images", "ingest", reason='a "quoted"\\reason') == 1


def test_a_stage_serves_its_metrics():
    done = run(STAGE, "finished", "ask", KUBEGRAFT_METRICS_PORT=free_port())
    expect_a_stage(samples(done.stdout))


def test_a_stage_leaves_its_metrics_in_a_file(tmp_path):
    run(STAGE, "finished", KUBEGRAFT_METRICS_FILE=tmp_path / "kubegraft.prom")
    expect_a_stage(samples((tmp_path / "kubegraft.prom").read_text()))
    assert [path.name for path in tmp_path.iterdir()] == ["kubegraft.prom"]


def test_a_run_serves_for_the_processes_of_its_stages(tmp_path):
    path = tmp_path / "kubegraft.prom"
    done = run(RUN, STAGE, "finished", KUBEGRAFT_METRICS_PORT=free_port(), KUBEGRAFT_METRICS_FILE=path)
    during, after = samples(done.stdout), samples(path.read_text())
    expect_a_stage(during)
    assert value(during, "stage_state", "run", state="running") == 1
    assert value(after, "stage_state", "run", state="done") == 1
    expect_a_stage(after)
    assert "warning" not in done.stderr


def test_a_failure_is_counted_once_by_its_class(tmp_path):
    path = tmp_path / "kubegraft.prom"
    done = run(
        RUN, STAGE, "failed", check=False, KUBEGRAFT_METRICS_PORT=free_port(), KUBEGRAFT_METRICS_FILE=path
    )
    assert done.returncode == 1
    found = samples(path.read_text())
    assert value(found, "stage_failures_total", error="DataError") == 1
    assert value(found, "stage_failures_total", "run", error="RuntimeError") == 1
    assert value(found, "stage_state", "run", state="failed") == 1
    assert ("last_success_timestamp_seconds", (("stage", "run"),)) not in found


@pytest.mark.parametrize("trouble", ["port in use", "no port", "no directory"])
def test_trouble_is_a_warning_and_the_run_goes_on(trouble, tmp_path):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        variables = {
            "port in use": {"KUBEGRAFT_METRICS_PORT": taken.getsockname()[1]},
            "no port": {"KUBEGRAFT_METRICS_PORT": "http"},
            "no directory": {"KUBEGRAFT_METRICS_FILE": tmp_path / "absent" / "kubegraft.prom"},
        }[trouble]
        done = run(STAGE, "finished", **variables)
    assert done.stderr.count("metrics: warning") == 1
    assert "Traceback" not in done.stderr


def test_nobody_who_asked_for_none_imports_anything():
    program = STAGE + "\nassert not [m for m in sys.modules if 'prometheus' in m or m.endswith('exporter')]"
    run(program, "finished")


def test_the_documents_list_every_metric():
    text = (Path(__file__).resolve().parents[2] / "docs" / "operations.md").read_text()
    for name, measure in MEASURES.items():
        labels = "".join(f", `{label}`" for label in measure.labels)
        assert f"| `kubegraft_{name}` | `run`, `stage`{labels} |" in text, name
        assert (measure.kind == "counter") == name.endswith("_total")
