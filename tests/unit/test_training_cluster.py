"""Several processes that train together: the same losses, the same bits after every kind of disturbance."""

import json
import time

import pytest

from kubegraft.errors import ConfigError
from kubegraft.training.cluster_spec import find_cluster
from tests import gang

FAST = {"KUBEGRAFT_HEARTBEAT_SECONDS": "3"}


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory):
    """Gangs one after the other in one directory; each goes on from what the one before left behind."""
    root = tmp_path_factory.mktemp("gangs")
    codes = {}
    for name, actions in {
        "killed": ("train:whole", "train:held", "train:worker:SIGKILL@1"),
        "chief_killed": ("train:worker", "train:chief:SIGKILL@0"),
        "stopped": ("train:chief", "train:stop:SIGTERM@1"),
        "frozen": ("train:stop", "train:frozen:SIGSTOP@1"),
    }.items():
        codes[name] = gang.finish(gang.start(root / name, *actions, num_workers=2, **FAST))
    return root, codes


def test_two_workers_see_the_losses_of_one_process(disturbed, tmp_path):
    """With an uneven last batch, clipping, dropout, batch norm, mixup and class weights; streamed and held."""
    from tests.unit.test_training_loop import run

    root, _ = disturbed
    history, _ = run(tmp_path / "one")
    one = [history.start, *history.epochs]
    for name in ("whole", "held"):
        two = gang.printed(root / "killed")[name]["history"]
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            for measure in a.keys() - {"seconds"}:
                assert a[measure] == pytest.approx(b[measure], abs=1e-5), (name, measure)


def test_workers_end_with_the_same_bits_and_know_how_long_they_waited(disturbed):
    root, _ = disturbed
    chief, other = (gang.printed(root / "killed", index) for index in (0, 1))
    assert chief == other
    last = chief["whole"]["history"][-1]
    assert last["num_steps"] == 3
    assert last["images_per_second"] > 0
    assert last["scaling_efficiency"] == pytest.approx(1 - last["waiting_fraction"], abs=1e-3)


@pytest.mark.parametrize(
    ("gang_name", "name", "codes"),
    [("killed", "worker", [75, -9]), ("chief_killed", "chief", [-9, 75]), ("stopped", "stop", [143, 143])],
    ids=["worker killed", "chief killed", "worker stopped"],
)
def test_a_gang_that_is_started_again_ends_with_the_same_bits(disturbed, gang_name, name, codes):
    root, found = disturbed
    assert found[gang_name] == codes
    after = {"worker": "chief_killed", "chief": "stopped", "stop": "frozen"}[name]
    whole = gang.printed(root / "killed")["whole"]
    for index in (0, 1):
        again = gang.printed(root / after, index)[name]
        assert again["digest"] == whole["digest"]
        assert [e["train_loss"] for e in again["history"][1:]] == [
            e["train_loss"] for e in whole["history"][1:]
        ]
    assert "continuing" in (root / after / "0.err").read_text()


def test_a_frozen_worker_ends_the_others_with_the_code_to_start_again(disturbed):
    root, codes = disturbed
    assert codes["frozen"] == [75, -9]  # the frozen one was killed by this test
    assert "Start all of them again" in (root / "frozen" / "0.out").read_text()


def test_a_peer_that_never_starts_ends_the_others_with_the_code_to_start_again(tmp_path):
    (tmp_path / "run.yaml").write_text(gang.CONFIG)
    _pretend_prepared(tmp_path / "job")
    started = time.monotonic()
    processes = gang.start(
        tmp_path / "g", "job:train", num_workers=2, num_started=1, KUBEGRAFT_START_SECONDS="1"
    )
    assert gang.finish(processes) == [75]
    assert time.monotonic() - started < 60
    report = json.loads((tmp_path / "g" / "0.termination").read_text())["kubegraft_report"]
    assert report["exit_code"] == 75
    assert "Not all workers came" in report["message"]


def _pretend_prepared(directory):
    dataset = directory / "ingest" / "dataset"
    dataset.mkdir(parents=True)
    result = {"stage": "ingest", "digest": "0" * 64, "metrics": {}, "provenance": {}}
    (dataset / "result.json").write_text(json.dumps(result))


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
