"""`kubegraft serve`: from a path or URI to a server that answers until it is asked to stop."""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Final

from kubegraft import storage
from kubegraft.reporting.events import log_event
from kubegraft.serving.model import ServedModel, check_export, find_saved_model
from kubegraft.serving.server import ModelServer, ServerOptions

GRACE_SECONDS: Final = 25.0  # Kubernetes kills 30 s after SIGTERM
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


def serve(model: str, options: ServerOptions) -> None:
    """Serve a model until SIGTERM or ctrl-c; then finish the requests that are being answered, and return.

    The socket listens at once and answers 503 until the model is loaded. A second signal ends the process.

    Args:
        model: Path, `gs://` or `s3://` URI of the output of a run or of `export`, or of a SavedModel directory.
        options: How to serve it.

    Raises:
        ConfigError: If the URI or the address can't be used.
        EnvironmentFault: If the port is taken.
        ModelError: If the model can't be loaded, or its export's proof or digests speak against it.
        StorageError: If it can't be fetched.
    """
    if not storage.is_remote(model):
        find_saved_model(storage.local_path(model))  # a wrong path is said before anything starts
    stopping = threading.Event()
    _catch_signals(stopping)
    server = ModelServer(options)
    threading.Thread(target=server.serve_forever, daemon=True, name="accept").start()
    log_event("serve", "listening", url=server.url, model=storage.public_uri(model))
    loading = _Loading(server, model, stopping)
    loading.start()
    stopping.wait()
    num_abandoned = server.stop(0 if loading.error else GRACE_SECONDS)
    if loading.error:
        raise loading.error
    log_event("serve", "stopped", abandoned=num_abandoned)


def load_served_model(model: str) -> ServedModel:
    """Fetch a model if it is elsewhere, check it and load it; what was fetched is removed.

    Raises:
        ModelError: See `serve`.
        StorageError: See `serve`.
        ConfigError: If the URI can't be used.
    """
    if not storage.is_remote(model):
        return _load_checked(storage.local_path(model))
    with tempfile.TemporaryDirectory(prefix="kubegraft-model-") as target:
        storage.fetch_tree(model, target)
        return _load_checked(Path(target))


def _load_checked(path: Path) -> ServedModel:
    directory = find_saved_model(path)
    log_event("serve", "checked", saved_model=str(directory), by=check_export(directory))
    return ServedModel.load(directory)


class _Loading(threading.Thread):
    """Loads the model beside the server, so that signals and probes are answered meanwhile.

    Attributes:
        error: Why it could not be loaded, or None.
    """

    def __init__(self, server: ModelServer, model: str, stopping: threading.Event) -> None:
        super().__init__(daemon=True, name="load")
        self._server, self._model, self._stopping = server, model, stopping
        self.error: Exception | None = None

    def run(self) -> None:
        """Load, and either let the server answer or make it stop."""
        started = time.monotonic()
        try:
            self._server.model = load_served_model(self._model)
        except Exception as error:  # raised again by the main thread
            self.error = error
            self._stopping.set()
            return
        seconds = round(time.monotonic() - started, 1)
        log_event(
            "serve", "ready", url=f"{self._server.url}/v1/models/{self._server.options.name}", seconds=seconds
        )


def _catch_signals(stopping: threading.Event) -> None:
    def stop(number: int, _: object) -> None:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)  # the next one ends the process
        log_event("serve", "stopping", signal=signal.Signals(number).name)
        stopping.set()

    for each in _SIGNALS:
        signal.signal(each, stop)
