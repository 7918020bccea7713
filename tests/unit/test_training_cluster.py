"""Several processes that train together: the same losses, the same bits after every kind of disturbance."""

import json
import shutil
import time

import pytest

from kubegraft.errors import ConfigError
from kubegraft.job_report import latest_report, parse_report
from kubegraft.training.cluster_spec import find_cluster
from kubegraft.worker_job import run_part
from tests import gang
from tests.conftest import draw_image

# One after the other in one directory: each goes on from what the one before left behind.
GANGS = {
    "killed": ("job:train", "tune:whole", "train:streamed", "train:worker:SIGKILL@1"),
    "chief_killed": ("train:worker", "train:chief:SIGKILL@0"),
    "stopped": ("train:chief", "train:stop:SIGTERM@1"),
    "frozen": ("job:train", "train:stop", "train:frozen:SIGSTOP@1"),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A directory in which this process alone has run a whole job, and fine-tuned by the whole graph."""
    root = tmp_path_factory.mktemp("alone")
    for class_number in range(3):
        folder = root / "images" / f"class_{class_number}"
        folder.mkdir(parents=True)
        for number in range(14):
            draw_image(class_number, number, 24).save(folder / f"{number}.png")
    (root / "run.yaml").write_text(gang.CONFIG + f"ingest: {{source: {root / 'images'}}}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBEGRAFT_ENGINE", "keras")  # nothing is timed
        patch.setenv("KUBEGRAFT_TERMINATION_FILE", str(root / "termination"))
        gang.register_tiny_backbone(patch.setattr, patch.setitem)
        assert run_part("prepare", str(root / "run.yaml"), str(root / "job")) == 0
        shutil.copytree(root / "job", root / "prepared")
        assert run_part("train", str(root / "run.yaml"), str(root / "job")) == 0
        gang.tune(root, "whole")
        assert run_part("finish", str(root / "run.yaml"), str(root / "job")) == 0
    return root


@pytest.fixture(scope="module")
def gangs(alone, tmp_path_factory):
    """The same job by two workers, and trainings that are disturbed; with the gangs' exit codes."""
    root = tmp_path_factory.mktemp("gangs")
    _prepare(alone, root)
    codes = {
        name: gang.finish(gang.start(root / name, *actions, num_workers=2)) for name, actions in GANGS.items()
    }
    return root, codes


@pytest.fixture(scope="module")
def replicas(alone, tmp_path_factory):
    """The same job on two devices of one process."""
    root = tmp_path_factory.mktemp("replicas")
    _prepare(alone, root)
    assert gang.finish(gang.start(root / "gang", "replicas", "job:train")) == [0]
    return root


def _prepare(alone, root):
    shutil.copytree(alone / "prepared", root / "job")
    shutil.copy(alone / "run.yaml", root)


def _same_losses(one, other):
    assert len(one) == len(other) > 2
    for a, b in zip(one, other, strict=True):
        for measure in a.keys() - {"seconds"}:
            assert a[measure] == pytest.approx(b[measure], abs=1e-5), measure


def _history(root, model):
    history = json.loads((root / model / "history.json").read_text())
    return [history["start"], *history["epochs"]]


def _losses_of_one(tmp_path):
    from tests.unit.test_training_loop import run

    history, _ = run(tmp_path / "one")
    return [history.start, *history.epochs]


def test_two_workers_see_the_losses_of_one_process(gangs, tmp_path):
    """With an uneven last batch, clipping, dropout, batch norm, mixup and class weights."""
    root, _ = gangs
    _same_losses(_losses_of_one(tmp_path), gang.printed(root / "killed")["streamed"]["history"])


def test_four_workers_see_them_too_and_end_with_the_same_bits(tmp_path):
    assert gang.finish(gang.start(tmp_path / "four", "train:streamed", num_workers=4)) == [0] * 4
    four = [gang.printed(tmp_path / "four", index)["streamed"] for index in range(4)]
    assert len({row["digest"] for row in four}) == 1
    _same_losses(_losses_of_one(tmp_path), four[0]["history"])


@pytest.mark.parametrize(
    "model", ["job/train-head/model", "job/fine-tune/model", "whole"], ids=["head", "suffix", "whole graph"]
)
def test_two_workers_see_the_losses_of_one_device_in_every_stage(alone, gangs, model):
    """A head on features, the last block from boundary activations of views, and the whole graph from images."""
    root, _ = gangs
    _same_losses(_history(alone, model), _history(root, model))


@pytest.mark.parametrize("model", ["job/train-head/model", "job/fine-tune/model"], ids=["head", "suffix"])
def test_two_replicas_see_the_losses_of_one_device_in_every_stage(alone, replicas, model):
    _same_losses(_history(alone, model), _history(replicas, model))


def test_workers_end_with_the_same_bits_and_know_how_long_they_waited(gangs):
    root, _ = gangs
    chief, other = (gang.printed(root / "killed", index) for index in (0, 1))
    assert chief == other
    last = chief["streamed"]["history"][-1]
    assert last["num_steps"] == 3
    assert last["images_per_second"] > 0
    assert last["scaling_efficiency"] == pytest.approx(1 - last["waiting_fraction"], abs=1e-3)


@pytest.mark.parametrize(
    ("before", "name", "codes", "after"),
    [
        ("killed", "worker", [75, -9], "chief_killed"),
        ("chief_killed", "chief", [-9, 75], "stopped"),
        ("stopped", "stop", [143, 143], "frozen"),
    ],
    ids=["worker killed", "chief killed", "worker stopped"],
)
def test_a_gang_that_is_started_again_ends_with_the_same_bits(gangs, before, name, codes, after):
    root, found = gangs
    assert found[before] == codes
    undisturbed = gang.printed(root / "killed")["streamed"]
    for index in (0, 1):
        again = gang.printed(root / after, index)[name]
        assert again["digest"] == undisturbed["digest"]
        losses = [[epoch["train_loss"] for epoch in row["history"][1:]] for row in (again, undisturbed)]
        assert losses[0] == losses[1]
    assert '"continuing"' in (root / after / "0.err").read_text()


def test_a_frozen_worker_ends_the_others_with_the_code_to_start_again(gangs):
    root, codes = gangs
    assert codes["frozen"] == [75, -9]  # the frozen one was killed by this test
    assert "Start all of them again" in (root / "frozen" / "0.out").read_text()


def test_workers_that_a_partition_separates_end_with_the_code_to_start_again(tmp_path):
    """Both live, and all that they send one another is lost."""
    with gang.Lines(tmp_path) as lines:
        processes = gang.start(tmp_path / "g", "train:parted:CUT@1", num_workers=2, lines=lines)
        assert lines.are_cut.wait(120)
        started = time.monotonic()
        assert gang.finish(processes) == [75, 75]
    assert time.monotonic() - started < 60
    assert not gang.printed(tmp_path / "g")


def test_a_peer_that_never_starts_ends_the_others_with_the_code_to_start_again(alone, tmp_path):
    _prepare(alone, tmp_path)
    started = time.monotonic()
    processes = gang.start(
        tmp_path / "g", "job:train", num_workers=2, num_started=1, KUBEGRAFT_START_SECONDS="1"
    )
    assert gang.finish(processes) == [75]
    assert time.monotonic() - started < 60
    report = parse_report((tmp_path / "g" / "0.termination").read_text())
    assert report is not None
    assert (report.exit_code, report.error) == (75, "PeerLost")
    assert "Not all workers came" in report.message


def test_workers_compute_the_frozen_blocks_once_for_each_image_together(alone, gangs):
    root, _ = gangs
    one, two = (
        json.loads((where / "job/train-head/model/result.json").read_text())["metrics"]
        for where in (alone, root)
    )
    assert two["features_computed"] == one["features_computed"] == 39
    assert two["images_per_second"] > 0
    assert "images_per_second" not in one


def test_the_chief_alone_reports(gangs):
    root, _ = gangs
    report = latest_report((root / "killed" / "0.out").read_text())
    assert report is not None
    assert (report.stage, report.progress, report.done, report.exit_code) == ("fine_tune", 100, True, 0)
    assert {"validation_accuracy", "images_per_second", "scaling_efficiency"} <= set(report.metrics)
    assert latest_report((root / "killed" / "1.out").read_text()) is None


def test_a_trained_job_is_not_trained_again(gangs):
    root, _ = gangs
    for index in (0, 1):
        events = (root / "frozen" / f"{index}.err").read_text()
        assert '"started"' not in events
        last = parse_report((root / "frozen" / f"{index}.termination").read_text())
        assert last is not None
        assert last.done


def test_a_job_ends_in_an_evaluated_export(alone):
    report = parse_report((alone / "termination").read_text())
    assert report is not None
    assert (report.stage, report.done) == ("export", True)
    wanted = {"validation_accuracy", "test_accuracy", "test_accuracy_low", "test_accuracy_high"}
    assert wanted <= set(report.metrics)
    assert report.model_uri == str(alone / "job" / "model")
    assert (alone / "job" / "model" / "result.json").exists()
    assert (alone / "job" / "report.html").exists()


def cluster(task="worker", index=0, **jobs):
    return json.dumps({"cluster": jobs, "task": {"type": task, "index": index}})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        (cluster(worker=["a:1"]), None),
        (cluster(worker=["a:1", "b:1"], index=1), (2, 1)),
        (cluster(chief=["c:1"], worker=["a:1", "b:1"], index=1), (3, 2)),
        (cluster("chief", chief=["c:1"], worker=["a:1", "b:1"]), (3, 0)),
    ],
    ids=["none", "one", "workers", "worker beside chief", "chief"],
)
def test_who_trains_together_is_read_from_tf_config(monkeypatch, text, expected):
    monkeypatch.setenv("TF_CONFIG", text)
    found = find_cluster()
    assert (found and (found.num_workers, found.index)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        cluster(worker=["a:1", "b:1"], index=2),
        cluster("ps", ps=["a:1"]),
        '{"cluster": {"worker": 3}}',
    ],
)
def test_a_senseless_tf_config_is_refused(monkeypatch, text):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ConfigError, match="TF_CONFIG"):
        find_cluster()
