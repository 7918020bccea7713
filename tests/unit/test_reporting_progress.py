from __future__ import annotations

import datetime
import json
import os
import pty
import subprocess
import sys

import pytest

from kubegraft.reporting import progress
from kubegraft.reporting.events import log_event
from kubegraft.reporting.progress import Progress

CODE = """
import time
from kubegraft.reporting.progress import Progress
with Progress("ingest", 4, "images") as bar:
    for number in range(4):
        time.sleep(0.12)
        bar.update(bad=number)
"""


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)


def test_a_log_gets_plain_lines(quick, capsys):
    with Progress("ingest", 2, "images") as bar:
        bar.update(bad=0)
        bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "ingest: progress  images=2 of=2" in lines[1]
    assert "bad=0" in lines[1]
    assert "\r" not in "".join(lines)


def test_lines_are_json_where_the_log_is(quick, capsys, monkeypatch):
    monkeypatch.setenv("KUBEGRAFT_LOG_FORMAT", "json")
    with Progress("train_head", 0, "batches") as bar:
        bar.update(3, loss=0.5)
    values = json.loads(capsys.readouterr().err)
    assert values["batches"] == 3
    assert values["loss"] == 0.5
    assert "of" not in values


def test_a_log_is_not_flooded(capsys):
    with Progress("ingest", 1000, "images") as bar:
        for _ in range(1000):
            bar.update()
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_that_leaves_a_clean_line():
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", CODE], stderr=theirs, check=True)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # how a pseudo-terminal says that its other end is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    text = shown.decode()
    assert "━" in text
    assert "/4 images" in text
    assert text.endswith("\r\x1b[K")


def test_an_event_is_one_line_that_can_be_read_whatever_a_file_is_called(capsys):
    log_event("ingest", "warning", text="größer", path="new\nline", name="a b")
    assert capsys.readouterr().err.rstrip("\n").endswith(r'text=größer path="new\nline" name="a b"')


def test_a_json_line_says_when_how_bad_and_whose_it_is(capsys, monkeypatch):
    monkeypatch.setenv("KUBEGRAFT_LOG_FORMAT", "json")
    monkeypatch.setenv("KUBEGRAFT_RUN_NAME", "nightly-1")
    log_event("ingest", "found", files=3)
    log_event("storage", "retrying", seconds=1)
    found, retrying = map(json.loads, capsys.readouterr().err.splitlines())
    assert list(found) == ["time", "level", "run", "stage", "event", "files"]
    assert found["run"] == "nightly-1"
    assert (found["level"], retrying["level"]) == ("info", "warning")
    now = datetime.datetime.now(datetime.UTC)
    assert abs(now - datetime.datetime.fromisoformat(found["time"])) < datetime.timedelta(minutes=1)
    assert found["time"].endswith("Z")


def test_a_line_of_text_names_a_clusters_run_and_not_a_local_one(capsys, monkeypatch):
    log_event("ingest", "found", files=3)
    monkeypatch.setenv("KUBEGRAFT_RUN_NAME", "nightly-1")
    log_event("ingest", "found", files=3)
    monkeypatch.setenv("KUBEGRAFT_RUN_PID", "1")
    log_event("ingest", "found", files=3)
    ends = [line.partition("files=3")[2] for line in capsys.readouterr().err.splitlines()]
    assert ends == ["", " run=nightly-1", ""]
