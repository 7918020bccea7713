import json

import pytest

from kubegraft.job_report import Report, latest_report, parse_report


def full_report() -> Report:
    return Report(
        stage="fine_tune",
        progress=40,
        metrics={"validation_accuracy": 0.987, "images_per_second": 251.5},
        model_uri="s3://models/signs",
        dataset_digest="sha256:" + "a" * 64,
        done=True,
        error="TrainingError",
        message='`x` must be "y".\nReceived: ü.',
        exit_code=5,
    )


def test_a_report_comes_back_as_it_was_written():
    line = full_report().to_json()
    assert "\n" not in line
    assert parse_report(line) == full_report()
    assert parse_report(Report().to_json()) == Report()


@pytest.mark.parametrize("character", ["a", "ü", "\x01", "😀", '"'])
def test_a_report_stays_under_three_kibibytes(character):
    report = Report(
        message=character * 5000,
        error=character * 50,
        model_uri="u" * 5000,
        dataset_digest="d" * 999,
        metrics={f"{number:032d}": 0.123456789 for number in range(99)},
    )
    line = report.to_json()
    assert len(line.encode()) < 3 * 1024
    found = parse_report(line)
    assert found is not None
    assert len(found.message) <= 1024
    assert found.message == character * len(found.message)


def test_values_that_are_no_numbers_are_left_out():
    line = Report(metrics={"loss": float("nan"), "validation_accuracy": 0.5}).to_json()
    found = parse_report(line)
    assert found is not None
    assert found.metrics == {"validation_accuracy": 0.5}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{",
        "3",
        '{"kubegraft_report": 3}',
        '{"kubegraft_report": {"progress": "half"}}',
        '{"kubegraft_report": {"progress": true}}',
        '{"kubegraft_report": {"metrics": {"a": "b"}}}',
        '{"kubegraft_report": {"metrics": {"a": NaN}}}',
        '{"kubegraft_report": {"metrics": [1]}}',
        '{"kubegraft_report": {"stage": null}}',
        "[" * 100_000,
    ],
)
def test_anything_else_is_no_report(text):
    assert parse_report(text) is None


def test_unknown_keys_are_ignored_and_percents_are_kept_in_range():
    report = parse_report(json.dumps({"kubegraft_report": {"stage": "ingest", "progress": 700, "new": []}}))
    assert report == Report(stage="ingest", progress=100)


def test_the_last_report_of_a_log_is_found():
    lines = ["starting", Report(stage="ingest").to_json(), "noise", full_report().to_json(), "{broken", ""]
    assert latest_report("\n".join(lines)) == full_report()
    assert latest_report("nothing\nhere") is None
