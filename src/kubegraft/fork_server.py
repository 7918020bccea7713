"""A process that has imported what others will need, and becomes any of them by forking.

TensorFlow takes two seconds to import, and a run has five stages. So the run starts one such process while it makes the
pipeline ready; each stage is a child of it, in which everything is imported already, and is otherwise a process like
any other: own memory, own output, own exit code.

A process may be forked as long as it has only imported: TensorFlow starts its threads with its first operation.
Whoever calls `ForkServer.call` needs no such process; where there is none it says so, and the caller starts Python.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, Self

from kubegraft.child_processes import descendants, send

_READY: Final = b"ready\n"
_RUNS: Final = b"runs\n"
_FAILED: Final = b"failed\n"
_GRACE_SECONDS: Final = 2.0
_ENDED_WITHOUT_CODE: Final = -signal.SIGKILL
_STOPS: Final = (signal.SIGTERM, signal.SIGINT)


class ForkServer:
    """The process, as the one sees it that started it. `close` ends it, and whatever it still runs."""

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Start it, and return at once.

        Args:
            modules: What it imports, in order; nothing that starts a thread or opens a device.
            environment: Variables while it imports, besides this process's own.

        Raises:
            OSError: If the system starts no process.
        """
        self._channel, theirs = socket.socketpair()
        self._replies: IO[bytes] = self._channel.makefile("rb")
        self._taken = threading.Lock()
        self._ready: bool | None = None
        command = [sys.executable, "-m", __name__, str(theirs.fileno()), *modules]
        with contextlib.ExitStack() as failing, theirs:
            failing.callback(self._hang_up)
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # else whoever reads ours waits for its end too
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **(environment or {})},
            )
            failing.pop_all()

    @classmethod
    def start(cls, modules: Sequence[str], environment: Mapping[str, str] | None = None) -> Self | None:
        """Return one, or None where none can be: outside of Linux a process with native libraries can't be forked."""
        if not sys.platform.startswith("linux"):
            return None
        with contextlib.suppress(OSError):
            return cls(modules, environment)
        return None

    @contextlib.contextmanager
    def call(
        self, module: str, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> Iterator[Call | None]:
        """Run `python -m module arguments...` in a child; within the block its output can be read.

        The end of the block waits for that of the child; one whose output nobody reads any more ends when it prints.

        Args:
            module: Name of the module that becomes `__main__`.
            arguments: What it finds in `sys.argv`.
            environment: All its variables.

        Returns:
            A context whose value is the call; None where the server has ended, could not import or fork, or runs
            another call.
        """
        if not self._taken.acquire(blocking=False):
            yield None
            return
        try:
            output = self._asked(module, arguments, environment)
            if output is None:
                yield None
                return
            call = Call(output, self._read)
            try:
                with output:
                    yield call
            finally:
                call.wait()  # else the next one would take its reply
        finally:
            self._taken.release()

    def call_aside(
        self, module: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        """Run `python -m module arguments...` in a child, and don't wait; it ends with the server.

        Nothing is done while a call runs.

        Args:
            module: See `call`.
            arguments: See `call`.
            environment: See `call`.
            log: File for what it prints.

        Raises:
            OSError: If that can't be written.
        """
        if not self._taken.acquire(blocking=False):
            return
        try:
            with log.open("wb") as file:
                self._ask(module, arguments, environment, file.fileno(), wait=False)
        finally:
            self._taken.release()

    def close(self) -> None:
        """End it, and what it runs."""
        below = descendants(self._process.pid)
        self._hang_up()
        for pid in below:
            send(pid, signal.SIGTERM)
        try:
            self._process.wait(timeout=_GRACE_SECONDS)
        except subprocess.TimeoutExpired:  # it still imports, or waits for a child that does not stop
            for pid in (*descendants(self._process.pid), self._process.pid):
                send(pid, signal.SIGKILL)
            self._process.wait()

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)
        self._replies.close()
        self._channel.close()

    def _asked(self, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> IO[str] | None:
        """Return the output of a child that runs, or None where there is none."""
        if self._ready is None:
            self._ready = self._read() == _READY
        reader, writer = os.pipe()
        output = os.fdopen(reader, encoding="utf-8", errors="replace")
        try:
            runs = (
                self._ready
                and self._ask(module, arguments, environment, writer, wait=True)
                and self._read() == _RUNS
            )
        except BaseException:  # a reply that nobody has read would be taken for the next one's
            output.close()
            self._hang_up()
            raise
        finally:
            os.close(writer)
        if not runs:
            output.close()
            return None
        return output

    def _ask(
        self,
        module: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        output: int,
        *,
        wait: bool,
    ) -> bool:
        order = {
            "module": module,
            "arguments": list(arguments),
            "environment": dict(environment),
            "directory": os.getcwd(),  # noqa: PTH109
            "wait": wait,
        }
        text = json.dumps(order).encode()
        try:
            socket.send_fds(self._channel, [len(text).to_bytes(8, "big")], [output])
            self._channel.sendall(text)
        except OSError:
            return False
        return True

    def _read(self) -> bytes:
        try:
            return self._replies.readline()
        except (OSError, ValueError):  # lost, or closed here
            return b""


class Call:
    """A child that runs.

    Attributes:
        output: What it prints, standard output and errors together.
    """

    def __init__(self, output: IO[str], read: Callable[[], bytes]) -> None:
        self.output, self._read = output, read
        self._code: int | None = None

    def wait(self) -> int:
        """Return its exit code, negative for a signal, once it has ended; call it when `output` has."""
        if self._code is None:
            self._code = int(self._read() or _ENDED_WITHOUT_CODE)
        return self._code


def main() -> None:
    """Serve, as the process: import, then fork for each order until the one who started it closes its end."""
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)  # they are for the children; this one ends with whom it serves
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        module = _Server(channel).module_of_child(sys.argv[2:])
    os._exit(_run(module) if module else 0)


def _run(module: str) -> int:
    """Be `python -m module`, and return the exit code.

    It ends as the children of `multiprocessing` do: without taking 3,000 modules apart, which takes half a second.
    """
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ending:
        code = _code_of(ending)
    except BaseException:  # whatever ends a main module: told as Python tells it, and in the exit code
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more, or it was closed
            stream.flush()
    return code


def _code_of(ending: SystemExit) -> int:
    if ending.code is None or isinstance(ending.code, int):
        return int(ending.code or 0) & 0xFF
    print(ending.code, file=sys.stderr)  # noqa: T201 - as Python does
    return 1


class _Server:
    """The side that forks."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._aside: set[int] = set()
        self._pid = os.getpid()

    def module_of_child(self, modules: Sequence[str]) -> str:
        """Return what to become, in the child that was forked for an order; "" in the server, at its end."""
        try:
            for module in modules:
                importlib.import_module(module)
                # What runs aside has somebody waiting for it, and imports what it lacks itself.
                if select.select([self._channel], [], [], 0)[0] and (child := self._serve()) is not None:
                    return child
            self._channel.sendall(_READY)
            while True:
                if (child := self._serve()) is not None:
                    return child
        except (BrokenPipeError, ConnectionResetError):  # the one who started it is gone
            return ""
        finally:
            if os.getpid() == self._pid:
                self._end_what_runs_aside()

    def _end_what_runs_aside(self) -> None:
        for pid in self._aside:
            send(pid, signal.SIGKILL)

    def _serve(self) -> str | None:
        """Carry out one order; return a module in its child, and "" at the end of orders."""
        received = _received(self._channel)
        if received is None:
            return ""
        order, output = received
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)  # until the child no longer ignores them
        try:
            pid = os.fork()
        except OSError:  # no room for one more process
            pid = -1
        if not pid:
            _become(order, output)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
        os.close(output)
        if not pid:
            return str(order["module"])
        if not order["wait"]:
            self._aside |= {pid} if pid > 0 else set()
        elif pid < 0:
            self._channel.sendall(_FAILED)
        else:
            self._channel.sendall(_RUNS)
            _, status = os.waitpid(pid, 0)
            self._channel.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
        return None


def _received(channel: socket.socket) -> tuple[dict[str, Any], int] | None:
    head, files, _, _ = socket.recv_fds(channel, 8, 1)
    if len(head) < 8:
        return None
    left, parts = int.from_bytes(head, "big"), []
    while left and (part := channel.recv(min(left, 2**16))):
        parts.append(part)
        left -= len(part)
    if left:
        return None
    return json.loads(b"".join(parts)), files[0]


def _become(order: dict[str, Any], output: int) -> None:
    for number in (1, 2):
        os.dup2(output, number)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["directory"])
    sys.argv = ["", *order["arguments"]]  # runpy fills in the module's path


if __name__ == "__main__":
    main()
