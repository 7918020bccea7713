import json
import os
import subprocess
import sys
import textwrap
import time

import pytest

from kubegraft.config import EvaluateConfig
from kubegraft.errors import ConfigError, DataError, ModelError
from kubegraft.processes import exit_on_error
from kubegraft.stage import Outcome, read_result, require_digest, run_stage


class Body:
    """A stage's body that counts its calls and can fail once."""

    def __init__(self, content="content", fails=False):
        self.content, self.fails, self.calls = content, fails, 0
        self.found_in_scratch = []

    def __call__(self, workspace):
        self.calls += 1
        self.found_in_scratch.append(sorted(path.name for path in workspace.scratch.iterdir()))
        (workspace.scratch / "checkpoint").write_text("half way")
        (workspace.staging / "file").write_text(self.content)
        if self.fails:
            raise RuntimeError("killed")
        return Outcome(digest=self.content, metrics={"accuracy": 0.5}, provenance={"seed": 1})


def run(output, body, *, inputs=None, config=None, **options):
    return run_stage(
        "evaluate",
        output,
        inputs=inputs or {"dataset": "d"},
        config=config or EvaluateConfig(),
        body=body,
        **options,
    )


@pytest.fixture(params=["beside", "shared"])
def work_dir(request, tmp_path, monkeypatch):
    """Both places of the work directory."""
    if request.param == "shared":
        monkeypatch.setenv("KUBEGRAFT_WORK_DIR", str(tmp_path / "work"))
    return request.param


def test_the_output_is_published_with_its_result(tmp_path, work_dir):
    result = run(tmp_path / "out", Body())
    assert (tmp_path / "out" / "file").read_text() == "content"
    assert (result.digest, result.metrics, result.reused) == ("content", {"accuracy": 0.5}, False)
    assert read_result(tmp_path / "out").provenance == {"seed": 1}


def test_the_same_call_is_not_run_again(tmp_path, work_dir):
    body = Body()
    run(tmp_path / "out", body)
    assert run(tmp_path / "out", body).reused
    assert body.calls == 1


@pytest.mark.parametrize(
    "change",
    [{"inputs": {"dataset": "other"}}, {"config": EvaluateConfig(seed=1)}],
    ids=["inputs", "config"],
)
def test_another_call_does_not_overwrite_an_output(tmp_path, work_dir, change):
    run(tmp_path / "out", Body())
    with pytest.raises(ConfigError, match=r"`output` must not exist.*Choose another"):
        run(tmp_path / "out", Body("other"), **change)
    assert (tmp_path / "out" / "file").read_text() == "content"


def test_a_failed_call_publishes_nothing_and_keeps_its_checkpoints(tmp_path, work_dir):
    with pytest.raises(RuntimeError):
        run(tmp_path / "out", Body(fails=True))
    assert not (tmp_path / "out").exists()
    body = Body()
    run(tmp_path / "out", body)
    assert body.found_in_scratch == [["checkpoint"]]


def test_checkpoints_of_another_call_are_never_found(tmp_path, work_dir):
    with pytest.raises(RuntimeError):
        run(tmp_path / "out", Body(fails=True), inputs={"dataset": "other"})
    body = Body()
    run(tmp_path / "out", body)
    assert body.found_in_scratch == [[]]


def test_finished_work_serves_another_output(tmp_path, monkeypatch):
    monkeypatch.setenv("KUBEGRAFT_WORK_DIR", str(tmp_path / "work"))
    body = Body()
    run(tmp_path / "one", body)
    assert run(tmp_path / "two", body).reused
    assert body.calls == 1
    assert (tmp_path / "two" / "file").read_text() == "content"


def test_fresh_work_is_done_again(tmp_path, work_dir, monkeypatch):
    body = Body()
    run(tmp_path / "out", body)
    monkeypatch.setenv("KUBEGRAFT_FRESH", "1")
    assert not run(tmp_path / "out", body).reused
    assert body.calls == 2


def test_a_stage_whose_inputs_may_change_replaces_its_own_output(tmp_path, work_dir):
    run(tmp_path / "out", Body("old"), reusable=False)
    run(tmp_path / "out", Body("new"), reusable=False)
    assert (tmp_path / "out" / "file").read_text() == "new"


def test_no_work_directory_is_left_beside_the_output(tmp_path):
    run(tmp_path / "out", Body())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_may_be_an_empty_directory_but_not_a_full_one(tmp_path):
    (tmp_path / "empty").mkdir()
    run(tmp_path / "empty", Body())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    with pytest.raises(ConfigError):
        run(tmp_path / "full", Body())
    assert (tmp_path / "full" / "precious").exists()


def test_a_digest_that_belongs_to_other_content_is_refused(tmp_path):
    run(tmp_path / "out", Body())
    require_digest(tmp_path / "out", "content")
    with pytest.raises(DataError, match="same ingest task"):
        require_digest(tmp_path / "out", "other")


@pytest.mark.parametrize(
    "content", [None, "{", json.dumps({"stage": "x"})], ids=["missing", "cut short", "incomplete"]
)
def test_a_directory_that_is_no_output_is_a_clear_error(tmp_path, content):
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    with pytest.raises(ModelError, match=r"output directory of a kubegraft stage"):
        read_result(tmp_path)


SLOW = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from kubegraft.config import EvaluateConfig
    from kubegraft.stage import Outcome, run_stage

    def body(workspace):
        print("working", flush=True)
        time.sleep(float(sys.argv[2]))
        (workspace.staging / "file").write_text("content")
        return Outcome(digest="content")

    result = run_stage("evaluate", sys.argv[1], inputs={"dataset": "d"}, config=EvaluateConfig(), body=body)
    print("reused" if result.reused else "done", flush=True)
""")


def start(output, seconds, **environment):
    command = [sys.executable, "-c", SLOW, str(output), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})


def test_two_processes_with_the_same_call_do_the_work_once(tmp_path):
    first, second = start(tmp_path / "out", 1.5), start(tmp_path / "out", 1.5)
    outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert sum("working" in output for output in outputs) == 1
    assert (first.returncode, second.returncode) == (0, 0)


def test_a_killed_process_holds_no_lock(tmp_path):
    killed = start(tmp_path / "out", 60)
    assert killed.stdout.readline() == "working\n"
    killed.kill()
    killed.communicate()
    assert "done" in start(tmp_path / "out", 0).communicate(timeout=60)[0]


def test_a_stage_ends_with_the_run_that_started_it(tmp_path):
    run_process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    stage = start(tmp_path / "out", 60, KUBEGRAFT_RUN_PID=str(run_process.pid))
    assert stage.stdout.readline() == "working\n"
    run_process.kill()
    run_process.wait()
    started = time.monotonic()
    stage.communicate(timeout=30)
    assert stage.returncode == 75
    assert time.monotonic() - started < 20


def test_what_a_user_keeps_beside_the_output_stays(tmp_path):
    for name in ("out.work", "out.old", "out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").touch()
    run(tmp_path / "out", Body(), reusable=False)
    run(tmp_path / "out", Body(), reusable=False)
    assert all((tmp_path / name / "precious").exists() for name in ("out.work", "out.old", "out.partial"))


def test_the_current_directory_may_be_the_output(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(RuntimeError):
        run(".", Body(fails=True))
    run(tmp_path / "out", Body())
    assert (tmp_path / "out" / "file").exists()


@pytest.mark.parametrize("content", ["[1]", "{", '{"key": 3}'])
def test_a_result_file_of_somebody_else_is_not_overwritten(tmp_path, content):
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(ConfigError, match="Choose another directory"):
        run(tmp_path, Body())
    assert (tmp_path / "result.json").read_text() == content


@pytest.mark.parametrize(
    ("error", "exit_code", "shown"),
    [
        (DataError("`x` is bad."), 3, "Error: `x` is bad."),
        (OSError(28, "No space left on device"), 8, "No space left on device"),
    ],
    ids=["ours", "of the system"],
)
def test_a_process_ends_with_the_code_and_the_words_of_its_error(
    tmp_path, monkeypatch, capsys, error, exit_code, shown
):
    monkeypatch.setenv("KUBEGRAFT_WORK_DIR", str(tmp_path / "work"))
    with pytest.raises(SystemExit) as ended, exit_on_error("evaluate"):
        raise error
    assert ended.value.code == exit_code
    assert shown in capsys.readouterr().err.strip().splitlines()[-1]
    assert json.loads((tmp_path / "work" / "error.json").read_text())["exit_code"] == exit_code
