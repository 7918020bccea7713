"""Looking whether images have changed, as a TransferSchedule's look does."""

import random

import pytest
from PIL import Image

from kubegraft import look as module
from kubegraft.errors import DataError
from kubegraft.job_report import latest_report, parse_report
from kubegraft.look import changed_fraction, main


@pytest.fixture
def photos(tmp_path):
    rng = random.Random(0)
    for name in ("cat", "dog"):
        for index in range(10):
            path = tmp_path / "photos" / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), tuple(rng.choices(range(256), k=3))).save(path)
    return tmp_path / "photos"


@pytest.fixture
def take_a_look(photos, tmp_path, monkeypatch, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(f"ingest:\n  source: {photos}\n")
    monkeypatch.setenv("KUBEGRAFT_TERMINATION_FILE", str(tmp_path / "last"))
    monkeypatch.setattr(module, "catch_stop_signals", lambda: None)

    def look(known=""):
        main(["--config", str(config), "--directory", str(tmp_path / "looks"), "--known", known])
        report = parse_report((tmp_path / "last").read_text())
        assert latest_report(capsys.readouterr().out) == report
        return report

    return look


def test_a_look_tells_digest_and_change(take_a_look, photos, tmp_path):
    first = take_a_look()
    assert (first.done, first.metrics["changed_fraction"]) == (True, 1.0)
    same = take_a_look(first.dataset_digest)
    assert (same.dataset_digest, same.metrics["changed_fraction"]) == (first.dataset_digest, 0.0)
    Image.new("RGB", (9, 9), (1, 2, 3)).save(photos / "cat" / "0.png")
    changed = take_a_look(first.dataset_digest)
    assert changed.dataset_digest != first.dataset_digest
    assert 0.04 < changed.metrics["changed_fraction"] < 0.5  # one of twenty, and those whose split it changed
    kept = {path.stem for path in (tmp_path / "looks").iterdir()}
    assert kept == {first.dataset_digest, changed.dataset_digest}
    assert take_a_look("another").metrics["changed_fraction"] == 1.0


def test_a_look_that_fails_says_why(take_a_look, photos, tmp_path):
    for path in photos.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(SystemExit) as ended:
        take_a_look()
    report = parse_report((tmp_path / "last").read_text())
    assert ended.value.code == DataError.exit_code == report.exit_code
    assert (report.error, report.done) == ("DataError", False)


def test_the_changed_fraction_counts_an_exchange_once():
    def images(*names):
        return [("train", "cat", name) for name in names]

    assert changed_fraction(images(*"abcd"), images(*"abcx")) == 0.25
    assert changed_fraction(images(*"abcd"), images(*"abcdefgh")) == 0.5
    assert changed_fraction(images(*"aabb"), images(*"abbb")) == 0.25
    assert changed_fraction([], []) == 0.0
    assert changed_fraction(images("a"), [("test", "cat", "a")]) == 1.0
