"""The server around the connections: its socket and threads, what may run at once, and how it ends."""

from __future__ import annotations

import contextlib
import errno
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from typing import Any, Final

from kubegraft.errors import ConfigError, EnvironmentFault
from kubegraft.serving.connections import Connection
from kubegraft.serving.model import ServedModel
from kubegraft.serving.protocol import RequestError

_MOST_CONNECTIONS: Final = 128
_WAIT_SECONDS: Final = 10.0  # for a turn; a client that waits longer had better ask another replica
_BODIES: Final = 2  # bodies of the largest size that may lie in memory at once
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_BUSY: Final = b'{"error": "Too many connections. Try again"}\n'


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How a model is served.

    Attributes:
        name: Name of the model in URLs.
        host: Address to listen on, IPv4 or IPv6; `0.0.0.0` and `::` mean all.
        port: TCP port; 0 lets the system choose.
        max_body_bytes: Largest body of a request; 64 MiB holds some ten photographs in base64.
        max_instances: Most images of a request.
        concurrency: Requests that TensorFlow works on at once; each uses all cores already.
        log_requests: Whether each request is an event in the log.
    """

    name: str = "kubegraft"
    host: str = "0.0.0.0"
    port: int = 8501
    max_body_bytes: int = 64 * 2**20
    max_instances: int = 256
    concurrency: int = 2
    log_requests: bool = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: If one breaks its rule.
        """
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"`name` must be letters, digits, '.', '_' and '-'. Received: name={self.name!r}. It is a part of URLs."
            )
        for field, low, high in (
            ("port", 0, 65535),
            ("max_body_bytes", 1, 2**31 - 1),
            ("max_instances", 1, 100_000),
            ("concurrency", 1, 1024),
        ):
            if not low <= getattr(self, field) <= high:
                raise ConfigError(
                    f"`{field}` must be in [{low}, {high}]. Received: {field}={getattr(self, field)!r}."
                )


class Budget:
    """Bytes of requests that may lie in memory at once."""

    def __init__(self, num_bytes: int) -> None:
        self._left = num_bytes
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def share(self) -> Iterator[Share]:
        """Give a share to take from within the block; it grows as bytes arrive, so that who sends none holds none."""
        share = Share(self)
        try:
            yield share
        finally:
            self.move(-share.num_bytes)

    def move(self, num_bytes: int) -> None:
        """Take bytes, or give them back where the number is negative.

        Raises:
            RequestError: 503, if they don't become free in time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._left >= num_bytes, _WAIT_SECONDS):
                raise RequestError(503, "The server is busy with other requests. Try again")
            self._left -= num_bytes
            self._changed.notify_all()


class Share:
    """What one request has taken of a budget.

    Attributes:
        num_bytes: How much.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.num_bytes = 0

    def take(self, num_bytes: int) -> None:
        """Take more; see `Budget.move`."""
        self._budget.move(num_bytes)
        self.num_bytes += num_bytes


class ModelServer(ThreadingHTTPServer):
    """Serves one model; it listens once it is made, and answers 503 until `model` is set.

    Attributes:
        options: How it serves.
        model: The model, or None while it is loaded.
        is_stopping: Whether it takes no more requests.
        budget: Bytes of bodies that may lie in memory.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = _MOST_CONNECTIONS

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self.model: ServedModel | None = None
        self.is_stopping = False
        self.budget = Budget(_BODIES * options.max_body_bytes)
        self._turns = threading.BoundedSemaphore(options.concurrency)
        self._open = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        self._changed = threading.Condition()
        self._connections: dict[Any, bool] = {}  # -> whether a request is being answered
        try:
            family, _, _, _, address = socket.getaddrinfo(
                options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            self.address_family = family
            super().__init__(address[:2], Connection)  # type: ignore[arg-type]
        except OSError as error:
            raise _cannot_listen(options, error) from error

    def server_bind(self) -> None:
        """Bind without http.server's look-up of this machine's name, which takes long where there is no DNS."""
        if self.allow_reuse_address:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # `::` is IPv4's too
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.options.host, int(self.server_address[1])

    @property
    def url(self) -> str:
        """URL for a client on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.options.host, self.options.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}"

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a turn with the model, and have it within the block.

        Raises:
            RequestError: 503, if it does not come in time.
        """
        if not self._turns.acquire(timeout=_WAIT_SECONDS):
            raise RequestError(503, "The server is busy with other requests. Try again")
        try:
            yield
        finally:
            self._turns.release()

    @contextlib.contextmanager
    def working(self, connection: Any) -> Iterator[None]:
        """Within the block a request is being answered, which `stop` waits for."""
        with self._changed:
            if self.is_stopping:
                raise ConnectionAbortedError("the server is stopping")
            self._connections[connection] = True
        try:
            yield
        finally:
            with self._changed:
                self._connections[connection] = False
                self._changed.notify_all()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, or refuse it where there are too many."""
        if not self._open.acquire(blocking=False):
            with contextlib.suppress(OSError):
                request.setblocking(False)
                head = f"HTTP/1.1 503 Busy\r\nRetry-After: 1\r\nContent-Length: {len(_BUSY)}\r\n"
                request.send(
                    head.encode() + b"Content-Type: application/json\r\nConnection: close\r\n\r\n" + _BUSY
                )
            self.shutdown_request(request)
            return
        with self._changed:
            self._connections[request] = False
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._changed:
                self._connections.pop(request, None)
                self._changed.notify_all()
            self._open.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of connections that end badly; anything else is a defect, and shown."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def stop(self, grace_seconds: float) -> int:
        """Take no more requests, wait for those that are being answered, and return how many were given up.

        Args:
            grace_seconds: How long to wait.
        """
        self.shutdown()
        self.server_close()
        deadline = time.monotonic() + grace_seconds
        with self._changed:
            self.is_stopping = True
            for connection, is_busy in self._connections.items():
                if not is_busy:
                    with contextlib.suppress(OSError):  # its thread wakes up and ends
                        connection.shutdown(socket.SHUT_RDWR)
            self._changed.wait_for(lambda: not self._num_busy(), max(0.0, deadline - time.monotonic()))
            return self._num_busy()

    def _num_busy(self) -> int:
        return sum(self._connections.values())


def _cannot_listen(options: ServerOptions, error: OSError) -> ConfigError | EnvironmentFault:
    received = f"Received: host={options.host!r}, port={options.port!r}: {error.strerror or error}."
    if error.errno == errno.EADDRINUSE:
        return EnvironmentFault(
            f"`port` must be free. {received} Stop what listens there (`ss -ltnp` names it), or give another `--port`."
        )
    if error.errno == errno.EACCES:
        return EnvironmentFault(
            f"`port` must be one that this user may use. {received} Give one from 1024 up."
        )
    return ConfigError(f"`host` must be an address of this machine. {received} 0.0.0.0 means all of them.")
