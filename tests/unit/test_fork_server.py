"""Children of a process that has imported already: processes like any other, which only start at once."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from kubegraft.child_processes import descendants
from kubegraft.fork_server import ForkServer
from tests.watched_processes import wait_until_gone

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks on Linux only")

# An odd module, so that nobody else imports it.
PRELOADED = "this"


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Return a function that writes a module where the server finds it, and returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(source: str, name: str = "child") -> str:
        tmp_path.joinpath(f"{name}.py").write_text(textwrap.dedent(source))
        return name

    return write


@pytest.fixture
def server(module):
    started = ForkServer([PRELOADED])
    yield started
    started.close()


def run(server, module, *arguments, **variables):
    with server.call(module, arguments, {**os.environ, **variables}) as call:
        if call is None:
            return None
        return call.output.read(), call.wait()


def test_a_child_is_a_process_of_its_own_that_has_imported_already(server, module):
    name = module(
        f"""
        import os, sys
        print(sys.argv[1:], os.environ["COLOUR"], os.getcwd(), __name__, {PRELOADED!r} in sys.modules, os.getppid())
        print("to stderr", file=sys.stderr)
        os.environ["LEFT"] = "behind"
        sys.exit(3)
        """
    )
    for _ in range(2):
        output, code = run(server, name, "one", "two words", COLOUR="blue")
        expected = f"['one', 'two words'] blue {Path.cwd()} __main__ True {server._process.pid}\nto stderr\n"
        assert (output, code) == (expected, 3)
    name = module("import os; print(os.environ.get('LEFT'), os.environ.get('COLOUR'))", "next")
    assert run(server, name) == ("None None\n", 0)


def test_an_error_is_told_as_python_tells_it(server, module):
    output, code = run(server, module("def fails():\n    raise ValueError('so')\nfails()"))
    assert code == 1
    assert output.rstrip().endswith("ValueError: so")


def test_a_child_that_is_killed_leaves_the_server_in_service(server, module):
    killed = module("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed")
    assert run(server, killed) == ("", -signal.SIGKILL)
    assert run(server, module("print('here')")) == ("here\n", 0)


def test_signals_to_stop_are_for_children_not_for_the_server(server, module):
    name = module("import time; print('up', flush=True); time.sleep(60)")
    with server.call(name, (), os.environ) as call:
        assert call.output.readline() == "up\n"
        for pid in (server._process.pid, *descendants(server._process.pid)):
            os.kill(pid, signal.SIGTERM)
        assert call.output.read() == ""
        assert call.wait() == -signal.SIGTERM
    assert run(server, module("print('here')", "after")) == ("here\n", 0)


def test_what_cannot_be_imported_is_no_error_but_no_server_either(module):
    server = ForkServer(["no_such_module_anywhere"])
    assert run(server, module("")) is None
    server.close()


def test_the_end_of_the_server_is_the_end_of_a_call(server, module):
    name = module("import time; print('up', flush=True); time.sleep(60)")
    with server.call(name, (), os.environ) as call:
        call.output.readline()
        (child,) = descendants(server._process.pid)
        server._process.kill()
        os.kill(child, signal.SIGKILL)
        assert call.output.read() == ""
        assert call.wait() != 0
    assert run(server, name) is None


def test_who_stops_reading_leaves_nothing_for_the_next(server, module):
    noisy = module(
        "import time\nwhile True:\n    print('on and on', flush=True)\n    time.sleep(0.01)", "noisy"
    )
    with pytest.raises(RuntimeError, match="enough"), server.call(noisy, (), os.environ) as call:
        call.output.readline()
        raise RuntimeError("enough")
    assert run(server, module("print('here')")) == ("here\n", 0)


def test_the_end_of_the_server_is_that_of_what_it_still_runs(module):
    server = ForkServer([PRELOADED])
    name = module(
        """
        import signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print('up', flush=True)
        time.sleep(60)
        """
    )
    with server.call(name, (), os.environ) as call:
        call.output.readline()
        (child,) = descendants(server._process.pid)
        server.close()
    wait_until_gone(child, seconds=30)
    assert run(server, name) is None


def test_one_call_at_a_time(server, module):
    name = module("print('here')")
    with server.call(name, (), os.environ) as call:
        assert run(server, name) is None
        assert (call.output.read(), call.wait()) == ("here\n", 0)
    assert run(server, name) == ("here\n", 0)


def test_what_runs_aside_hinders_nobody_and_ends_with_the_server(module, tmp_path):
    server = ForkServer([PRELOADED])
    aside = module("import os, time; print(os.getpid(), flush=True); time.sleep(60)", "aside")
    server.call_aside(aside, (), os.environ, tmp_path / "log")
    assert run(server, module("print('here')")) == ("here\n", 0)
    deadline = time.monotonic() + 30
    while not tmp_path.joinpath("log").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    server.close()
    wait_until_gone(int(tmp_path.joinpath("log").read_text()), seconds=30)


def test_what_runs_aside_ends_with_a_server_that_cannot_import(module, tmp_path):
    module("import time; time.sleep(3)", "slow")  # until the order has come
    server = ForkServer(["slow", "no_such_module_anywhere"])
    aside = module("import os, time; print(os.getpid(), flush=True); time.sleep(60)", "aside")
    server.call_aside(aside, (), os.environ, tmp_path / "log")
    assert run(server, module("print('here')")) is None
    server.close()
    written = tmp_path.joinpath("log").read_text()
    if written:
        wait_until_gone(int(written), seconds=30)


def test_nothing_runs_aside_of_a_call_or_without_a_log(server, module, tmp_path):
    name = module("print('here')")
    with server.call(name, (), os.environ) as call:
        server.call_aside(name, (), os.environ, tmp_path / "log")
        assert not tmp_path.joinpath("log").exists()
        assert call.output.read() == "here\n"
    with pytest.raises(OSError, match="directory"):
        server.call_aside(name, (), os.environ, tmp_path)
    assert run(server, name) == ("here\n", 0)


def test_a_reply_that_was_not_read_is_not_taken_for_the_next(server, module, monkeypatch):
    failing, read, replies = module("import sys; sys.exit(7)", "failing"), server._read, []

    def interrupted():
        replies.append(read())
        if len(replies) == 2:
            raise KeyboardInterrupt
        return replies[-1]

    monkeypatch.setattr(server, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt), server.call(failing, (), os.environ):
        pytest.fail("must not be reached")
    monkeypatch.undo()
    assert run(server, module("print('here')", "next")) is None


def test_a_server_does_not_outlive_whom_it_serves(module):
    name = module(
        f"""
        import os
        from kubegraft.fork_server import ForkServer
        server = ForkServer([{PRELOADED!r}])
        with server.call("inner", (), os.environ) as call:
            call.output.read()
            call.wait()
        print(server._process.pid, flush=True)
        os._exit(0)
        """
    )
    module("", "inner")
    done = subprocess.run(
        [sys.executable, "-m", name], capture_output=True, text=True, check=True, timeout=60
    )
    wait_until_gone(int(done.stdout.split()[-1]), seconds=30)
