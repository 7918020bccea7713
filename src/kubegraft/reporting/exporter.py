"""Boards in Prometheus' text format, on a port and in a file; the only module that imports its client."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kubegraft import __version__
from kubegraft.reporting.events import log_event, run_name
from kubegraft.reporting.measures import MEASURES, Board, Labels, from_json, merged

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_WRITE_SECONDS: Final = 5.0
_MOST_PORT: Final = 65535


def start(board: Board, port: str, file: str, directory: Path | None) -> Callable[[], None]:
    """Serve and write `board`, and the boards in `directory`; return what ends it.

    What can't be done is a warning in the log.

    Args:
        board: Of this process.
        port: Number of a TCP port, on all addresses; "" for none.
        file: Path of a file to write every few seconds and at the end, all or nothing; "" for none.
        directory: Where other processes leave their boards; None for nowhere.
    """
    try:
        from prometheus_client import CollectorRegistry
    except ModuleNotFoundError:
        _warn("there are no metrics: `pip install 'kubegraft[train]'` brings prometheus-client")
        return lambda: None
    registry = CollectorRegistry()
    registry.register(_Boards(board, directory))
    endings = [_serve(registry, port) if port else None, _write_often(registry, file) if file else None]

    def close() -> None:
        for end in filter(None, endings):
            end()

    return close


def _warn(text: str) -> None:
    log_event("metrics", "warning", text=text)


class _Boards:
    """What `prometheus_client` calls a collector: it reads the values when they are asked for."""

    def __init__(self, board: Board, directory: Path | None) -> None:
        self.board, self.directory = board, directory

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        build = GaugeMetricFamily(
            "kubegraft_build_info", "Always 1; the label says which kubegraft.", labels=["version"]
        )
        build.add_metric([__version__], 1)
        yield build
        values = merged([*self._left(), self.board.values()])
        run = run_name()
        for name, measure in MEASURES.items():
            family = CounterMetricFamily if measure.kind == "counter" else GaugeMetricFamily
            found = family(f"kubegraft_{name}", measure.text, labels=["run", "stage", *measure.labels])
            for (of, labels), value in sorted(values.items()):
                if of == name:
                    found.add_metric([run, *labels], value)
            if found.samples:
                yield found

    def _left(self) -> Iterator[dict[tuple[str, Labels], float]]:
        """Yield the boards of other processes, the last written last."""
        paths = list(self.directory.glob("*.json")) if self.directory else []
        for path in sorted(paths, key=_modified):
            with contextlib.suppress(OSError, ValueError):  # it went, or somebody else's file
                yield from_json(path.read_text(encoding="utf-8"))


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _serve(registry: CollectorRegistry, port: str) -> Callable[[], None] | None:
    from prometheus_client import start_http_server

    if not port.isdecimal() or not 0 < int(port) <= _MOST_PORT:
        _warn(f"there is no metrics port: KUBEGRAFT_METRICS_PORT must be 1 to {_MOST_PORT}, and is {port!r}")
        return None
    try:
        server, thread = start_http_server(int(port), registry=registry)
    except OSError as error:
        _warn(f"there is no metrics port: {port} can't be opened ({error.strerror}); set another one")
        return None

    def end() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return end


def _write_often(registry: CollectorRegistry, file: str) -> Callable[[], None]:
    ended = threading.Event()

    def write_until_ended() -> None:
        while _write(registry, file) and not ended.wait(_WRITE_SECONDS):
            pass

    thread = threading.Thread(target=write_until_ended, daemon=True, name="metrics-file")
    thread.start()

    def end() -> None:
        ended.set()
        thread.join()
        _write(registry, file, quiet=True)

    return end


def _write(registry: CollectorRegistry, file: str, *, quiet: bool = False) -> bool:
    from prometheus_client import write_to_textfile

    try:
        write_to_textfile(file, registry)
    except OSError as error:
        if not quiet:
            _warn(f"there is no metrics file: {file!r} can't be written ({error.strerror}); name another one")
        return False
    return True
