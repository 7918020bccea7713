"""The benchmark's arithmetic and page, and that it runs; no test looks at how fast anything is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import __main__ as benchmark_command
from benchmarks import large
from benchmarks.arithmetic import comparisons, mean, noise, overview, seconds_to
from benchmarks.contest import (
    CONTESTANTS,
    MEANINGS,
    images_decoded,
    record_of,
    stage_seconds,
    with_needed,
)
from benchmarks.datasets import Image, assign, find_images, prepare, test_window
from benchmarks.measuring import Seen, disk_bytes, documents, parse_event, watch
from benchmarks.page import BEGIN, END, between_marks, render

test_window.__test__ = False  # pytest would take it for a test


def record(contestant, events, *, seed=0, head=None, fine_tuned=None, test=None, **others):
    return {
        "contestant": contestant,
        "seed": seed,
        "failed": "",
        "seconds": 300.0,
        "events": [
            {"stage": stage, "event": "epoch", "seconds": seconds, "validation_accuracy": accuracy}
            for stage, seconds, accuracy in events
        ],
        "validation_accuracy": {"head": head, "fine_tuned": fine_tuned},
        "test_accuracy": {"head": test, "fine_tuned": test},
        "peak_memory_bytes": 2**30,
        "disk_bytes": 2**20,
        "images_decoded": 1000,
        "cpu_seconds": 100.0,
        "other_cores": 0.0,
        "load_average": 0.1,
        "stage_seconds": {},
        "details": {},
        **others,
    }


def textbook(seed=0, name="textbook", factor=1):
    events = [
        ("train_head", 60 * factor, 0.9),
        ("train_head", 120 * factor, 0.95),
        ("fine_tune", 240 * factor, 0.98),
    ]
    return record(name, events, seed=seed, head=0.95, fine_tuned=0.98, test=0.9)


def ours(seed=0, last=0.98):
    events = [("train_head", 12.0, 0.95), ("fine_tune", 30.0, 0.94), ("fine_tune", 40.0, last)]
    return record("kubegraft-cold", events, seed=seed, head=0.95, fine_tuned=last, test=0.91)


MACHINE = {
    "processor": "A Processor",
    "instructions": ["avx2"],
    "cores": 2,
    "memory_bytes": 2**34,
    "gpus": [],
    "python": "3.12",
    "versions": {"keras": "3.15"},
    "date": "2026-01-01 00:00 UTC",
    "commit": "abc",
}


def results(records, **others):
    return {
        "machine": MACHINE,
        "busy_cores_before": 0.0,
        "load_average_before": 0.1,
        "seeds": [0],
        "plan": {
            "data": "images",
            "counts": {"train": 700, "validation": 200, "test": 300},
            "num_new": 7,
            "backbone": "b",
            "weights": "imagenet",
            "input_size": 224,
            "num_blocks": 5,
            "head_epochs": 6,
            "tune_epochs": 6,
            "all_epochs": 3,
        },
        "records": records,
        "bare": {},
        "large": [],
        "large_run": {},
        **others,
    }


def test_time_to_accuracy_is_that_of_the_first_event_that_reaches_it():
    events = [
        {"seconds": 3.0, "event": "started"},
        {"seconds": 10.0, "validation_accuracy": 0.9},
        {"seconds": 20.0, "validation_accuracy": 0.95},
        {"seconds": 30.0, "validation_accuracy": 0.96},
    ]
    assert seconds_to(events, 0.95) == 20
    assert seconds_to(events, 0.9500001) == 20, "logs round"
    assert seconds_to(events, 0.97) is None


def test_a_mean_of_some_seeds_is_no_mean():
    assert mean([1.0, 3.0]) == 2
    assert mean([1.0, None]) is None
    assert mean([]) is None


def test_ratios_are_of_mean_times_to_each_seeds_own_mark():
    rows = comparisons([textbook(0), ours(0), textbook(1, factor=2), ours(1)])
    head, tuned = rows
    assert (head["phase"], head["textbook_seconds"], head["seconds"], head["ratio"]) == ("head", 180, 12, 15)
    assert (tuned["phase"], tuned["textbook_seconds"], tuned["seconds"], tuned["ratio"]) == (
        "fine_tuned",
        360,
        40,
        9,
    )


def test_a_mark_that_one_seed_misses_gives_no_ratio():
    tuned = comparisons([textbook(0), ours(0), textbook(1), ours(1, last=0.97)])[1]
    assert tuned["ratio"] is None
    assert (tuned["reached"], tuned["num_seeds"]) == (1, 2)


def test_a_contestant_that_failed_counts_for_nothing():
    failed = {**ours(), "failed": "exit code 1: boom"}
    row = overview([textbook(), failed])[1]
    assert row["num_failed"] == 1
    assert row["seconds"] is None
    assert comparisons([textbook(), failed])[0]["ratio"] is None


def test_the_textbook_with_all_blocks_sets_a_mark_of_its_own():
    rows = comparisons([textbook(), textbook(name="textbook-all", factor=5), ours()])
    assert [(row["mark"], row["phase"], row["ratio"]) for row in rows if row["mark"] == "textbook-all"] == [
        ("textbook-all", "fine_tuned", 30)
    ]


def test_a_ratio_stands_beside_both_of_its_numbers():
    text = render(results([textbook(), ours()]))
    line = next(line for line in text.splitlines() if "`kubegraft-cold`" in line and "frozen" in line)
    assert "120.0 s" in line
    assert "12.0 s" in line
    assert line.endswith("| 10.0 |")
    assert "Not to be relied on" not in text


def test_the_page_says_that_the_machine_was_busy():
    busy = ours()
    busy["other_cores"] = 0.7
    text = render(results([textbook(), busy], busy_cores_before=1.5))
    assert "Not to be relied on" in text
    assert "kubegraft-cold, seed 0: 0.7 of 2 processors" in text
    assert "1.5 of 2 processors" in text
    assert noise([textbook()], 2) == []


def test_what_people_wrote_around_the_tables_stays():
    page = between_marks("# Title\n\nAbout.\n", "first")
    again = between_marks(page + "\nAfter.\n", "second")
    assert again.startswith("# Title\n\nAbout.\n")
    assert again.endswith("After.\n")
    assert "second" in again
    assert "first" not in again
    assert again.count(BEGIN) == again.count(END) == 1


def test_limits_and_throughput_are_shown():
    bare = {
        "images_per_second": {"litert": 100.0},
        "suffix_products": 9,
        "suffix_seconds_per_image": {"float32": 0.01},
    }
    row = {
        "backbone": "resnet50",
        "way": "fit",
        "num_images": 5000,
        "failed": "",
        "seconds": 600.0,
        "work_seconds": 500.0,
        "images_per_second": 10.0,
        "peak_memory_bytes": 2**30,
        "other_cores": 0.7,
    }
    cold = {**ours(), "stage_seconds": {"train_head": 7.0}}
    later = {**MACHINE, "date": "2026-02-02 00:00 UTC", "commit": "def with changes"}
    run = {"machine": later, "input_size": 96}
    text = render(results([textbook(), cold], bare=bare, large=[row], large_run=run))
    assert "| frozen pass, litert | 100.0 images/s | 9.0 s | 0.8 times as long |" in text
    assert "7.0 s" in text
    assert "10.0 images/s" in text
    assert (
        "96 pixels. A Processor, 2 cores; Python 3.12, keras 3.15; 2026-02-02 00:00 UTC, def with changes."
        in text
    )
    assert "the checkout that measured the many images had changes that are in no commit" in text
    assert "resnet50 fit: 0.7 of 2 processors were busy with something else" in text
    assert "of the contestants" not in text


def test_without_contestants_nothing_is_said_of_their_task():
    text = render(results([]))
    assert "| processor | A Processor, 2 cores (avx2) |" in text
    assert "blocks unfrozen" not in text
    assert "blocks unfrozen" in render(results([ours()]))


def test_every_contestant_is_explained_and_the_cold_run_comes_first():
    assert set(MEANINGS) == set(CONTESTANTS)
    assert with_needed(["kubegraft-1%", "textbook"]) == ["textbook", "kubegraft-cold", "kubegraft-1%"]


def test_the_test_part_is_a_stretch_of_numbers_and_cuts_no_session():
    images = [
        Image("train", str(number % 10), Path(f"IMG_{1000 + number}.jpg")) for number in range(200)
    ]  # each ten are one person's
    windows = [test_window(images, 0.3, seed) for seed in range(3)]
    assert windows == [(140, 200), (80, 140), (20, 80)]
    start, end = test_window(images, 0.27, 0)
    assert start % 10 == 0
    assert end == 200


def test_no_image_is_in_two_parts_and_new_ones_only_in_the_grown_folder(image_folder, tmp_path):
    source = image_folder(classes=2, per_class=60, splits=("train", "validation"))
    prepared = prepare(source, tmp_path / "out", test_fraction=0.25, seed=0)
    by_split = {
        split: {path.read_bytes() for path in (prepared.base / split).glob("*/*")}
        for split in ("train", "validation", "test")
    }
    assert not by_split["train"] & by_split["test"]
    assert not by_split["validation"] & by_split["test"]
    assert prepared.counts == {split: len(list((prepared.base / split).glob("*/*"))) for split in by_split}
    grown = {path.read_bytes() for path in (prepared.grown / "train").glob("*/*")}
    assert len(grown - by_split["train"]) == prepared.num_new == 1


def test_a_folder_of_classes_is_split_too(image_folder, tmp_path):
    source = image_folder(classes=3, per_class=30)
    assert {image.split for image in find_images(source)} == {""}
    counts = prepare(source, tmp_path / "out", test_fraction=0.3, seed=0).counts
    assert counts["test"] == 27
    assert counts["validation"] > 0
    assert counts["train"] > counts["validation"]


def test_where_the_test_part_takes_all_validation_images_others_are_chosen():
    images = [Image("train", "a", Path(f"a/{number}.jpg")) for number in range(100)]
    images += [Image("validation", "a", Path(f"b/{number}.jpg")) for number in range(100, 120)]
    chosen = [image.split for image in assign(images, 0.3, seed=0)]
    assert chosen.count("test") == 36
    assert 5 <= chosen.count("validation") <= 30
    assert len(chosen) == 120


def test_events_are_read_from_logs_whatever_is_between_them():
    line = '    {"time": "x", "stage": "fine_tune", "event": "epoch", "seconds": 3.5, "validation_accuracy": 0.5}\n'
    assert parse_event(line)["phase_seconds"] == 3.5
    for other in ("12:00:00 fine_tune: epoch", '{"broken', '{"no": "event"}', ""):
        assert parse_event(other) is None


def test_images_decoded_are_counted_or_unknown():
    filled = {"stage": "cache", "event": "filled", "kind": "pooled", "found": 0}
    assert images_decoded([{**filled, "computed": 70}, {**filled, "computed": 30}]) == 100
    counters = [
        {"stage": stage, "event": event, "images_decoded": 3}
        for stage in ("train_head", "fine_tune")
        for event in ("frozen passes", "finished")
    ]
    assert images_decoded([{**filled, "computed": 70}, *counters]) == 6
    assert images_decoded([{**filled, "computed": 70}, {**counters[0], "images_decoded": 0}]) == 0
    assert images_decoded([{"stage": "train_head", "event": "started"}]) is None


def test_stages_are_timed_from_start_to_end():
    events = [
        {"stage": "ingest", "event": "started", "seconds": 2.0},
        {"stage": "ingest", "event": "finished", "seconds": 5.5},
        {"stage": "export", "event": "started", "seconds": 6.0},
    ]
    assert stage_seconds(events) == {"ingest": 3.5}


def test_results_of_single_stages_make_one_record():
    stdout = "\n".join(
        json.dumps({"stage": stage, "metrics": metrics}, indent=2)
        for stage, metrics in (
            ("train_head", {"validation_accuracy": 0.9}),
            ("evaluate", {"test_accuracy": 0.8}),
        )
    )
    made = record_of("kubegraft-warm-head", 0, Seen(stdout=stdout, seconds=9.0), [])
    assert made["validation_accuracy"] == {"head": 0.9}
    assert made["test_accuracy"] == {"head": 0.8}
    assert documents("noise {not json} " + stdout)[1]["stage"] == "evaluate"


def test_memory_counts_children_and_a_failure_is_kept_with_its_reason(tmp_path):
    child = "import time; block = bytearray(200_000_000); time.sleep(2)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    seen = watch([[sys.executable, "-c", parent]], {})
    assert seen.exit_code == 0
    assert seen.peak_memory_bytes > 200_000_000

    failing = [sys.executable, "-c", "import sys; sys.exit('no luck')"]
    seen = watch([failing, [sys.executable, "-c", "print(1)"]], {})
    assert not seen.stdout, "what follows a failure is not run"
    assert "no luck" in record_of("textbook", 0, seen, [])["failed"]

    (tmp_path / "file").write_bytes(bytes(100_000))
    (tmp_path / "again").hardlink_to(tmp_path / "file")
    assert 100_000 <= disk_bytes(tmp_path) < 200_000


@pytest.fixture
def photographs(image_folder):
    return image_folder(classes=2, per_class=24)


def test_the_benchmark_runs_and_writes_its_page(photographs, tmp_path):
    command = [sys.executable, "-m", "benchmarks", photographs, "--contestants", "textbook,features-logreg"]
    command += ["--input-size", "32", "--head-epochs", "1", "--tune-epochs", "1", "--num-blocks", "1"]
    command += ["--no-bare", "--page", tmp_path / "page.md"]
    root = Path(__file__).parents[2]
    done = subprocess.run([str(part) for part in command], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    raw = json.loads((tmp_path / "page.json").read_text())
    assert [each["contestant"] for each in raw["records"]] == ["textbook", "features-logreg"]
    first = raw["records"][0]
    assert set(first["validation_accuracy"]) == set(first["test_accuracy"]) == {"head", "fine_tuned"}
    assert seconds_to(first["events"], first["validation_accuracy"]["head"]) is not None
    assert "`features-logreg`" in (tmp_path / "page.md").read_text()


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The benchmark of many images, without measuring anything."""
    row = {"backbone": "b", "way": "fit", "num_images": 9, "failed": "", "seconds": 6.0, "work_seconds": 5.0}
    row |= {"images_per_second": 1.8, "peak_memory_bytes": 2**30, "other_cores": 0.0}
    monkeypatch.setattr(benchmark_command.large, "compare", lambda *_: [row])
    monkeypatch.setattr(benchmark_command, "compete", lambda *_: textbook())

    def invoke(*options):
        arguments = [*map(str, options), "--no-bare", "--page", str(tmp_path / "page.md")]
        return CliRunner().invoke(benchmark_command.benchmark, arguments)

    return invoke


def test_many_images_alone_leave_the_other_tables_and_those_leave_them(tmp_path, command, photographs):
    kept = results([textbook(), {**ours(), "failed": "exit code 1"}])
    (tmp_path / "page.json").write_text(json.dumps(kept))
    done = command("--contestants", "", "--large")
    assert done.exit_code == 0, done.output
    raw = json.loads((tmp_path / "page.json").read_text())
    assert raw["records"] == kept["records"]
    assert raw["machine"] == MACHINE
    assert raw["large_run"]["machine"]["date"] != MACHINE["date"]
    text = (tmp_path / "page.md").read_text()
    assert "`textbook`" in text
    assert "| b | `fit` | 9 | 1.8 images/s |" in text

    done = command(photographs, "--contestants", "textbook")
    assert done.exit_code == 0, done.output
    again = json.loads((tmp_path / "page.json").read_text())
    assert again["machine"] != MACHINE
    assert (again["large"], again["large_run"]) == (raw["large"], raw["large_run"])


def test_many_images_need_no_earlier_results(tmp_path, command):
    assert command("--contestants", "", "--large").exit_code == 0
    text = (tmp_path / "page.md").read_text()
    assert "1.8 images/s" in text
    assert "### Contestants" not in text


@pytest.mark.parametrize("content", [None, "{half"])
def test_tables_whose_results_are_not_there_are_not_overwritten(tmp_path, command, content):
    (tmp_path / "page.md").write_text(f"# Page\n\n{BEGIN}\n\n| a table |\n\n{END}\n")
    if content:
        (tmp_path / "page.json").write_text(content)
    done = command("--contestants", "", "--large")
    assert done.exit_code == 2
    assert "`json-file` must hold" in done.output
    assert "| a table |" in (tmp_path / "page.md").read_text()


@pytest.mark.parametrize("options", [["--contestants", ""], ["--large"]])
def test_there_must_be_something_to_measure(tmp_path, command, options):
    done = command(*options)
    assert done.exit_code == 2
    assert "Received:" in done.output
    assert not list(tmp_path.iterdir())


def test_after_a_failure_nothing_is_called_warm(tmp_path, monkeypatch):
    def fails(commands, _):
        failed = "mobilenet_v2-cold" in str(commands)
        return Seen(stdout="", seconds=1.0, exit_code=int(failed))

    monkeypatch.setattr(large, "watch", fails)
    rows = large.compare(tmp_path, 6, 32, lambda _: None)
    ways = [(row["backbone"], row["way"]) for row in rows]
    assert ("mobilenet_v2", "kubegraft-cold") in ways
    assert ("mobilenet_v2", "kubegraft-warm") not in ways
    assert ("resnet50", "kubegraft-warm") in ways
