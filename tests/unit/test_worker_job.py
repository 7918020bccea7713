"""The parts of a job as pods run them: prepare, train on one device, two replicas and two workers, finish."""

import json
import shutil

import pytest

from kubegraft.job_report import latest_report, parse_report
from tests import gang
from tests.conftest import draw_image


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """The same job on one device, on two replicas and on two workers, after one `prepare`."""
    root = tmp_path_factory.mktemp("jobs")
    for class_number in range(3):
        folder = root / "images" / f"class_{class_number}"
        folder.mkdir(parents=True)
        for number in range(14):
            draw_image(class_number, number, 24).save(folder / f"{number}.png")
    (root / "one").mkdir()
    (root / "one" / "run.yaml").write_text(gang.CONFIG + f"ingest: {{source: {root / 'images'}}}\n")
    codes = {"prepare": gang.finish(gang.start(root / "one" / "prepare", "job:prepare", "job:prepare"))}
    for name in ("replicas", "workers"):
        shutil.copytree(root / "one", root / name)
    actions = ("job:train", "tune:suffix")
    codes["one"] = gang.finish(gang.start(root / "one" / "gang", *actions, "job:train", "job:finish"))
    codes["replicas"] = gang.finish(gang.start(root / "replicas" / "gang", "replicas", *actions))
    codes["workers"] = gang.finish(
        gang.start(root / "workers" / "gang", *actions, "job:train", num_workers=2)
    )
    return root, codes


def test_every_part_ends_well(jobs):
    _, codes = jobs
    assert codes == {"prepare": [0], "one": [0], "replicas": [0], "workers": [0, 0]}


@pytest.mark.parametrize("where", ["replicas", "workers"])
@pytest.mark.parametrize("model", ["job/train-head/model", "job/fine-tune/model", "suffix"])
def test_losses_are_those_of_one_device(jobs, where, model):
    """Head on features, whole graph from varied images, and from boundary activations."""
    root, _ = jobs
    one, other = (json.loads((root / name / model / "history.json").read_text()) for name in ("one", where))
    assert len(one["epochs"]) == len(other["epochs"]) > 1
    for a, b in zip([one["start"], *one["epochs"]], [other["start"], *other["epochs"]], strict=True):
        for measure in a.keys() - {"seconds"}:
            assert a[measure] == pytest.approx(b[measure], abs=1e-5), measure


def test_the_frozen_blocks_are_computed_once_for_each_image_by_all_workers_together(jobs):
    root, _ = jobs
    results = {
        name: json.loads((root / name / "job/train-head/model/result.json").read_text())["metrics"]
        for name in ("one", "workers")
    }
    assert results["workers"]["features_computed"] == results["one"]["features_computed"] == 39
    assert results["workers"]["images_per_second"] > 0
    assert "images_per_second" not in results["one"]


def test_the_chief_alone_reports_and_all_leave_a_last_word(jobs):
    root, _ = jobs
    directory = root / "workers" / "gang"
    report = latest_report((directory / "0.out").read_text())
    assert report is not None
    assert (report.stage, report.progress, report.done, report.exit_code) == ("fine_tune", 100, True, 0)
    assert {"validation_accuracy", "images_per_second", "scaling_efficiency"} <= set(report.metrics)
    assert latest_report((directory / "1.out").read_text()) is None
    for index in (0, 1):
        last = parse_report((directory / f"{index}.termination").read_text())
        assert last is not None
        assert last.done


def test_a_job_ends_in_an_evaluated_export(jobs):
    root, _ = jobs
    report = latest_report((root / "one" / "gang" / "0.out").read_text())
    assert report is not None
    assert (report.stage, report.done) == ("export", True)
    assert {"validation_accuracy", "test_accuracy", "test_accuracy_low", "test_accuracy_high"} <= set(
        report.metrics
    )
    assert report.model_uri == str(root / "one" / "job" / "model")
    assert (root / "one" / "job" / "model" / "result.json").exists()
    assert (root / "one" / "job" / "report.html").exists()


def test_what_is_prepared_is_not_prepared_again(jobs):
    root, _ = jobs
    events = (root / "one" / "prepare" / "0.err").read_text()
    assert events.count('"finished"') == 1
    report = latest_report((root / "one" / "prepare" / "0.out").read_text())
    assert report is not None
    assert report.done
    assert len(report.dataset_digest) == 64


@pytest.mark.parametrize(
    ("config", "code", "error"),
    [("head: {backbone: resnet51}", 2, "ConfigError"), ("ingest: {source: /nowhere}", 2, "ConfigError")],
)
def test_a_mistake_is_reported_with_its_exit_code(tmp_path, monkeypatch, capsys, config, code, error):
    from kubegraft.worker_job import run_part

    (tmp_path / "run.yaml").write_text(config)
    monkeypatch.setenv("KUBEGRAFT_TERMINATION_FILE", str(tmp_path / "termination"))
    assert run_part("prepare", str(tmp_path / "run.yaml"), str(tmp_path / "job")) == code
    report = parse_report((tmp_path / "termination").read_text())
    assert report is not None
    assert (report.exit_code, report.error, report.done) == (code, error, False)
    assert "Received" in report.message
    assert latest_report(capsys.readouterr().out) == report
