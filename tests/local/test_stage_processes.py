"""Tasks of a real local KFP run become children of the fork server, and fail as kfp's own processes do."""

import os
import sys

import pytest
from kfp import dsl, local

from kubegraft import stage_processes
from kubegraft.fork_server import ForkServer
from kubegraft.stage_processes import stages_forked_by

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks on Linux only")


@dsl.component(base_image="python:3", install_kfp_package=False)
def parent_of(message: str) -> int:
    import os
    import sys

    print(f"{message} from a task")  # noqa: T201
    if message == "fail":
        sys.exit(5)
    return os.getppid()


@dsl.pipeline
def one_task(message: str) -> int:
    return parent_of(message=message).output


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # kfp imports the package docker, which this checkout's folder would pass for
    local.init(
        local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "kfp"), raise_on_error=True
    )
    started = ForkServer(["kfp.dsl.executor"])
    yield started
    started.close()


def test_a_task_is_a_child_of_the_server(server, capsys):
    with stages_forked_by(server):
        assert one_task(message="forked").output == server._process.pid
    assert "forked from a task" in capsys.readouterr().out
    # And afterwards kfp's own again.
    assert one_task(message="started").output != server._process.pid


def test_a_task_that_fails_fails_the_run(server, capsys):
    with stages_forked_by(server), pytest.raises(RuntimeError, match="failed"):
        one_task(message="fail")
    assert "fail from a task" in capsys.readouterr().out


def test_what_is_forked_has_only_imported(tmp_path, monkeypatch):
    """A process with threads of TensorFlow's could not be forked; numpy's own know about forks."""
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("count.py").write_text(
        "import os; print(len(os.listdir(f'/proc/{os.getppid()}/task')))"
    )
    counts = []
    for server in (ForkServer(["numpy"]), stage_processes.start_server()):
        with server.call("count", (), os.environ) as call:
            counts.append(call.output.read())
        server.close()
    assert counts[0] == counts[1]


def test_what_installs_packages_first_is_left_to_kfp(server):
    installing = ["sh", "-c", 'python3 -m pip install x && "$0" "$@"', "sh", "-ec"]
    running = [
        "python3 -m kfp.dsl.executor_main --component_module_path $program_path/ephemeral_component.py",
        "source",
    ]
    assert stage_processes._component_of([*installing, *running, "--one", "1"]) is None
    assert stage_processes._component_of(["sh", "-ec", *running, "--one", "1"]) == ("source", ["--one", "1"])


def test_without_a_server_tasks_run_all_the_same(server, capsys):
    server._process.kill()
    server._process.wait()
    with stages_forked_by(server):
        assert one_task(message="alone").output != server._process.pid
    with stages_forked_by(None):
        assert one_task(message="alone").output != server._process.pid
