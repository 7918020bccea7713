"""What a local run says: kfp's whole output goes to a file, the stages' own lines to the terminal."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from types import TracebackType
from typing import Final, Self

# What `log_event` prints, in either of its forms; kfp's own lines carry milliseconds and no stage.
_EVENT: Final = re.compile(r'\d\d:\d\d:\d\d [a-z_]+: |\{"time": ')
_USER: Final = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@\"']+@")
_QUERY: Final = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s\"'?]+)\?[^\s\"']+")
_TASK_STARTS: Final = "Executing task"
_TAIL_LINES: Final = 60


class RunLog(io.TextIOBase):
    """Text stream to put in the place of `sys.stdout` while kfp runs a pipeline.

    Attributes:
        path: File that receives every line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("w", encoding="utf-8", errors="replace")
        self._terminal = sys.stderr
        self._line = ""
        self._task_lines: list[str] = []

    def write(self, text: str) -> int:
        """Write text; whole lines that are a stage's events are also shown on stderr."""
        length, text = len(text), without_credentials(text)
        self._file.write(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._take(line.strip() if _EVENT.match(line.strip()) else line)
        return length

    def flush(self) -> None:
        """Write out what is buffered."""
        self._file.flush()

    def __enter__(self) -> Self:
        """Return the stream."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file; Python 3.13 reports a stream that can't be flushed when it is collected."""
        super().close()  # flushes
        self._file.close()

    def tail(self) -> str:
        """Return the end of what the last task printed, without kfp's echo of its arguments."""
        return "\n".join(self._task_lines[-_TAIL_LINES:]).strip("\n")

    def _take(self, line: str) -> None:
        if _EVENT.match(line):
            print(line, file=self._terminal, flush=True)
        elif _TASK_STARTS in line:
            self._task_lines.clear()
            self._file.flush()
        self._task_lines.append(line)


def without_credentials(text: str) -> str:
    """Return text whose URIs have lost their user names, passwords and queries; kfp repeats its arguments."""
    return _QUERY.sub(r"\1?***", _USER.sub(r"\1***@", text))


def without_executor_echo(tail: str) -> str:
    """Return a task's output without the lines in which kfp's executor repeats its input."""
    kept, in_echo = [], False
    for line in tail.splitlines():
        if "Got executor_input:" in line:
            in_echo = True
        elif in_echo:
            in_echo = line.strip() != "}" or line.startswith("     ")
        elif "[KFP Executor" not in line:
            kept.append(line.removeprefix("    "))
    return "\n".join(kept)
