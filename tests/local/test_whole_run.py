"""The pipeline as a user runs it: real processes through `kfp.local`, on tiny images, killed and continued."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kubegraft.child_processes import descendants
from kubegraft.stage import WORK_METRICS
from tests.watched_processes import wait_until_gone

CONFIG = """
seed: 7
head: {backbone: mobilenet_v2, weights: none, input_size: 32, num_epochs: 4, batch_size: 8}
fine_tune: {num_blocks: 2, num_epochs: 3, batch_size: 8, augmentation: crop, checkpoint_interval_seconds: 0}
evaluate: {num_bootstrap_samples: 50, num_worst_images: 4}
export: {num_verification_images: 2}
"""


def kubegraft(*arguments: object, check: bool = True, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "kubegraft", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, **options)
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "kubegraft.yaml"
    path.write_text(CONFIG)
    return path


def test_a_folder_becomes_a_classifier_that_answers(image_folder, config, tmp_path):
    images, output = image_folder(per_class=12, size=40), tmp_path / "out"
    images.joinpath("class_1", "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut short")
    summary = json.loads(kubegraft("run", images, "--config", config, "--output", output, "--json").stdout)
    for name in ("report", "dataset_report", "model", "metrics"):
        assert Path(summary[name]).exists(), name
    assert summary["validation_accuracy"]["fine_tuned"] >= summary["validation_accuracy"]["head"]
    assert "broken.jpg" in Path(summary["report"]).read_text()
    photograph = images / "class_0" / "0.png"
    answer = json.loads(kubegraft("predict", summary["model"], photograph, "--json").stdout)
    assert "class_" in json.dumps(answer)

    published = tmp_path / "published"
    again = kubegraft("run", images, "--config", config, "--output", output, "--json", "--publish", published)
    assert json.loads(again.stdout)["digests"] == summary["digests"]
    assert again.stderr.count("reused") >= 4, again.stderr
    assert json.loads((published / "run.json").read_text())["published"] == str(published)
    assert {"report.html", "dataset_report.html", "metrics.json", "model"} < {
        p.name for p in published.iterdir()
    }
    assert json.loads(kubegraft("predict", published / "model", photograph, "--json").stdout) == answer


def test_a_failing_stage_says_why_last_and_exits_with_its_code(image_folder, config, tmp_path):
    images = image_folder(classes=2, per_class=3)
    for path in (images / "class_1").iterdir():
        path.write_bytes(b"no image")
    failed = kubegraft(
        "run",
        images,
        "--config",
        config,
        "--max-bad-fraction",
        "1",
        "--output",
        tmp_path / "out",
        check=False,
    )
    assert failed.returncode == 3
    assert "class_1" in failed.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def stage_inputs(tmp_path_factory, config) -> tuple[Path, Path]:
    """A dataset and a head trained on it."""
    root = tmp_path_factory.mktemp("stages")
    kubegraft("sample-data", "digits", root / "digits")
    for path in (root / "digits").glob("*/*"):
        if int(path.stem) % 6:
            path.unlink()
    kubegraft("ingest", root / "digits", "--output", root / "dataset")
    kubegraft("train-head", root / "dataset", "--config", config, "--output", root / "head")
    return root / "dataset", root / "head"


STAGES = {
    "train-head": lambda dataset, head: ["train-head", dataset],
    "fine-tune": lambda dataset, head: ["fine-tune", dataset, head],
    "evaluate": lambda dataset, head: ["evaluate", dataset, head],
    "export": lambda dataset, head: ["export", dataset, head],
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_is_killed_again_and_again_ends_as_an_undisturbed_one(
    stage_inputs, config, tmp_path, stage
):
    arguments = [*STAGES[stage](*stage_inputs), "--config", config, "--seed", 3, "--output"]
    kubegraft(*arguments, tmp_path / "undisturbed")
    for seconds in (4, 6):
        kill_after(seconds, [*arguments, tmp_path / "killed"])
    kubegraft(*arguments, tmp_path / "killed")
    expected, found = (
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("undisturbed", "killed")
    )
    assert found["digest"] == expected["digest"]
    work = set(WORK_METRICS)  # less where there was less to do
    assert found["metrics"].keys() == expected["metrics"].keys()
    assert all(
        found["metrics"][name] == expected["metrics"][name] for name in expected["metrics"].keys() - work
    )
    assert not list(tmp_path.glob(".*.kubegraft-*")), "work directories are left behind"


def kill_after(seconds: float, arguments: list) -> None:
    command = [sys.executable, "-m", "kubegraft", *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_stage_outlives_its_run_by_a_moment_only(image_folder, config, tmp_path):
    """A killed run must not leave a stage behind that goes on training."""
    images, output = image_folder(per_class=20), tmp_path / "out"
    command = [sys.executable, "-m", "kubegraft", "run", images, "--config", config, "--output", output]
    run = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(output.glob("work/ingest-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    below = descendants(run.pid)
    assert below
    run.kill()
    run.wait()
    for pid in below:
        wait_until_gone(pid)
