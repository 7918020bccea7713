"""Running other programs: pip and container tools. What they say is read line by line and shown when they fail."""

from __future__ import annotations

import collections
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from kubegraft.errors import EnvironmentFault, StorageError
from kubegraft.storage.retries import redacted

_SHOWN_LINES: Final = 12


class CommandFailed(StorageError):
    """A program that kubegraft started ended with an error."""


def run_command(
    command: Sequence[str],
    purpose: str,
    *,
    advice: str = "",
    environment: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] = lambda line: None,
) -> str:
    """Run a program and return what it printed, on both outputs.

    Args:
        command: Program and arguments.
        purpose: What it was to do, as in "`pip` could not <purpose>".
        advice: Sentence for the message when it fails.
        environment: All its environment variables; None means ours.
        on_line: Called with every line as it comes.

    Raises:
        EnvironmentFault: If there is no such program.
        CommandFailed: If it ends with an error; its last lines are in the message.
    """
    last: collections.deque[str] = collections.deque(maxlen=_SHOWN_LINES)
    lines = []
    try:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise EnvironmentFault(
            f"`{command[0]}` must be there to {purpose}. Received: {error}. Install it, or name another."
        ) from error
    with process:
        try:
            for line in process.stdout or ():
                lines.append(line)
                last.append(line.strip())
                on_line(line.strip())
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        said = redacted(" | ".join(line for line in last if line)) or "nothing"
        raise CommandFailed(
            f"`{command[0]}` could not {purpose}: it ended with code {process.returncode}. Received: {said}. {advice}"
        )
    return "".join(lines)
