"""Start a contestant, and see what it takes: time, memory of the whole process tree, processors, disk."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = 0.25
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(slots=True)
class Seen:
    """What one contestant did.

    Attributes:
        seconds: From the start of its first process to the end of its last.
        exit_code: 0 if all went well.
        events: JSON lines of its stderr, each with `seconds` since the start, as they arrived.
        stdout: What it printed.
        tail: The end of its stderr.
        peak_memory_bytes: Largest sum of the resident memory of its processes; what they share counts for each.
        cpu_seconds: Processor time of its processes.
        other_cores: Processors that others kept busy meanwhile, on average.
        load_average: Of the minute before it started.
    """

    seconds: float = 0.0
    exit_code: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)
    stdout: str = ""
    tail: str = ""
    peak_memory_bytes: int = 0
    cpu_seconds: float = 0.0
    other_cores: float = 0.0
    load_average: float = 0.0


def watch(commands: Sequence[Sequence[str]], variables: Mapping[str, str]) -> Seen:
    """Run commands one after the other, until one fails, and return what was seen."""
    seen = Seen(load_average=round(os.getloadavg()[0], 2))
    busy, own, started = _busy_seconds(), _own_seconds(), time.monotonic()
    for command in commands:
        _run(command, variables, seen, started)
        if seen.exit_code:
            break
    seen.seconds = time.monotonic() - started
    seen.cpu_seconds = _own_seconds() - own
    others = _busy_seconds() - busy - seen.cpu_seconds
    seen.other_cores = round(max(0.0, others / max(seen.seconds, 1e-9)), 2)
    return seen


def _run(command: Sequence[str], variables: Mapping[str, str], seen: Seen, started: float) -> None:
    lines: list[str] = []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, **variables},
    ) as process:
        assert process.stdout is not None
        threads = [
            threading.Thread(target=_read_events, args=(process.stderr, seen, lines, started)),
            threading.Thread(target=_sample_memory, args=(process, seen)),
        ]
        for thread in threads:
            thread.start()
        try:
            seen.stdout += process.stdout.read()
            seen.exit_code = process.wait()
        except BaseException:
            process.terminate()  # kubegraft ends its stages with it
            raise
        finally:
            for thread in threads:
                thread.join()
    seen.tail = "".join(lines[-30:])


def _read_events(stream: Iterable[str], seen: Seen, lines: list[str], started: float) -> None:
    for line in stream:
        lines.append(line)
        event = parse_event(line)
        if event is not None:
            seen.events.append({**event, "seconds": round(time.monotonic() - started, 3)})


def parse_event(line: str) -> dict[str, Any] | None:
    """Return an event of kubegraft's JSON log, or None; its own `seconds` becomes `phase_seconds`."""
    if not line.lstrip().startswith('{"'):
        return None
    try:
        event = json.loads(line)
    except ValueError:
        return None
    if not isinstance(event, dict) or "event" not in event:
        return None
    if "seconds" in event:
        event["phase_seconds"] = event.pop("seconds")
    return event


def _sample_memory(process: subprocess.Popen[str], seen: Seen) -> None:
    while process.poll() is None:
        seen.peak_memory_bytes = max(seen.peak_memory_bytes, tree_memory_bytes(process.pid))
        time.sleep(SAMPLE_SECONDS)


def tree_memory_bytes(root: int) -> int:
    """Return the resident memory of a process and of all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and (parent := _parent(entry.name)) is not None:
            children.setdefault(parent, []).append(int(entry.name))
    waiting, total = [root], 0
    while waiting:
        current = waiting.pop()
        total += _resident_bytes(current)
        waiting.extend(children.get(current, ()))
    return total


def _parent(process: str) -> int | None:
    try:
        # The name of the program stands in brackets, and may hold brackets and spaces itself.
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):  # it has ended
        return None


def _resident_bytes(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError, ValueError):
        return 0


def _own_seconds() -> float:
    return sum(
        used.ru_utime + used.ru_stime
        for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def _busy_seconds() -> float:
    """Return the processor time that this machine has spent, all but idle and waiting for disks."""
    user, nice, system, _idle, _waiting, interrupt, soft, stolen = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    )
    return (user + nice + system + interrupt + soft + stolen) / _TICKS


def busy_cores(seconds: float = 1.0) -> float:
    """Return how many processors are busy at the moment."""
    before = _busy_seconds()
    time.sleep(seconds)
    return round((_busy_seconds() - before) / seconds, 2)


def disk_bytes(*directories: Path) -> int:
    """Return what directories take on disk; a file with several names counts once."""
    blocks = {}
    for directory in directories:
        for path in (directory, *directory.rglob("*")) if directory.exists() else ():
            status = path.lstat()
            blocks[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(blocks.values())


def documents(text: str) -> list[Any]:
    """Return the JSON documents that stand one after the other in a text, whatever is between them."""
    decoder, found, position = json.JSONDecoder(), [], 0
    while (position := text.find("{", position)) >= 0:
        try:
            document, position = decoder.raw_decode(text, position)
            found.append(document)
        except ValueError:
            position += 1
    return found
