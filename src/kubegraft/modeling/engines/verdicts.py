"""What was found out about engines on this machine, kept so that the next process need not.

`$XDG_CACHE_HOME/kubegraft/engines` (`~/.cache` without the variable) holds flatbuffers by the digest of what
they compute, and a verdict for each on each kind of processor. With it a second run takes the same engine as
the first, however busy the machine is, and its rows are equal bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from kubegraft.cache.location import cache_home
from kubegraft.processors import processor_name, usable_processors
from kubegraft.reporting.events import log_event
from kubegraft.stage import write_atomically

_BUDGET_BYTES: Final = 2**30
_LONGEST_WAIT_SECONDS: Final = 120.0
_SILENT_SECONDS: Final = 5.0
_POLL_SECONDS: Final = 0.02


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which engine runs a graph here.

    Attributes:
        engine: `litert` or `keras`.
        reason: Why, for people.
        flatbuffer_sha256: Digest of the flatbuffer that was proved; "" for `keras`.
    """

    engine: str
    reason: str
    flatbuffer_sha256: str = ""


class Verdicts:
    """The verdicts and flatbuffers in one directory. A directory that can't be written to keeps nothing."""

    def __init__(self, directory: Path | None = None) -> None:
        """Take a directory, by default this user's."""
        self._directory = directory or cache_home() / "engines"

    def engine(self, key: str) -> str:
        """Return the engine that was found best for a graph, or "" where nothing is known."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Verdict(**json.loads(self._verdict_path(key).read_text())).engine
        return ""

    def find(self, key: str) -> tuple[Verdict, bytes] | None:
        """Return what was found for a graph, with its flatbuffer (b"" for `keras`), or None."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            verdict = Verdict(**json.loads(self._verdict_path(key).read_text()))
            if verdict.engine == "keras":
                return verdict, b""
            flatbuffer = self._flatbuffer_path(key).read_bytes()
            if hashlib.sha256(flatbuffer).hexdigest() == verdict.flatbuffer_sha256:
                self._flatbuffer_path(key).touch()
                return verdict, flatbuffer
        return None

    @contextlib.contextmanager
    def deciding(self, key: str) -> Iterator[None]:
        """Within the block nobody else who uses this directory makes the same graph's engine; who comes later waits.

        To make an engine takes seconds in which all of them would do the same. The lock ends with its process. Who has
        waited for two minutes goes on without it, and so does everyone where there are no locks.
        """
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # read-only, or a file system without locks: each for itself
                self._directory.mkdir(parents=True, exist_ok=True)
                path = self._verdict_path(key).with_suffix(".lock")
                _wait_for(stack.enter_context(path.open("w")), path)
            yield

    def keep(self, key: str, verdict: Verdict, flatbuffer: bytes = b"") -> None:
        """Keep what was found, and let go of the flatbuffers that were not used for longest beyond 1 GiB."""
        with contextlib.suppress(OSError):
            self._directory.mkdir(parents=True, exist_ok=True)
            if flatbuffer:
                write_atomically(self._flatbuffer_path(key), flatbuffer)
                verdict = dataclasses.replace(
                    verdict, flatbuffer_sha256=hashlib.sha256(flatbuffer).hexdigest()
                )
            write_atomically(self._verdict_path(key), json.dumps(dataclasses.asdict(verdict)))
            self._shrink()

    def _shrink(self) -> None:
        newest_first = sorted(self._directory.glob("*.tflite"), key=lambda path: -path.stat().st_mtime)
        total = 0
        for path in newest_first:
            total += path.stat().st_size
            if total > _BUDGET_BYTES:
                path.unlink(missing_ok=True)

    def _flatbuffer_path(self, key: str) -> Path:
        return self._directory / f"{key}.tflite"

    def _verdict_path(self, key: str) -> Path:
        machine = hashlib.sha256(f"{processor_name()} {usable_processors()}".encode()).hexdigest()
        return self._directory / f"{key}-{machine[:12]}.json"


def _wait_for(lock: IO[str], path: Path) -> None:
    started, said = time.monotonic(), False
    while (waited := time.monotonic() - started) < _LONGEST_WAIT_SECONDS:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if waited > _SILENT_SECONDS and not said:
                log_event(
                    "engine", "waiting", reason="another process makes this very engine", lock=str(path)
                )
                said = True
            time.sleep(_POLL_SECONDS)
