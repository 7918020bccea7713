"""One HTTP connection: what is read under which deadline and size, and what is answered where.

A thread serves each connection. Nothing a client does may hold that thread, or memory, for ever: the head of a
request, its body and the answer have deadlines as a whole, so that a byte now and then does not extend them.
"""

from __future__ import annotations

import io
import json
import socket
import time
import traceback
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, Final

from kubegraft import __version__
from kubegraft.reporting.events import log_event
from kubegraft.serving import protocol
from kubegraft.serving.protocol import Question, RequestError, Route

if TYPE_CHECKING:
    from kubegraft.serving.server import ModelServer, Share

IDLE_SECONDS: Final = 60.0  # between two requests
HEAD_SECONDS: Final = 10.0
ANSWER_SECONDS: Final = 30.0
_BODY_SECONDS: Final = 10.0  # and as long as the slowest allowed rate takes
_BODY_BYTES_PER_SECOND: Final = 64 * 1024
_LINGER_SECONDS: Final = 2.0
_CHUNK: Final = 64 * 1024


class Connection(BaseHTTPRequestHandler):
    """The requests of one connection, one after the other."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: ModelServer

    def setup(self) -> None:
        """Prepare to read under deadlines."""
        super().setup()
        self.rfile.close()
        self._socket = _TimedSocket(self.connection)
        self.rfile = self._reader = io.BufferedReader(self._socket, _CHUNK)
        self._unread = False

    def handle_one_request(self) -> None:
        """Wait for a request, and answer it."""
        self._status, self._num_images, self._started = 0, 0, time.monotonic()
        self._unread = False
        try:
            self._socket.expire_in(IDLE_SECONDS)
            if not self._reader.peek(1):
                self.close_connection = True
                return
            self._started = time.monotonic()
            self._socket.expire_in(HEAD_SECONDS)
            with self.server.working(self.connection):
                super().handle_one_request()
                if self.server.is_stopping:
                    self.close_connection = True
        except OSError:  # the client left, or took too long
            self.close_connection = True

    def finish(self) -> None:
        """Close the connection so that an answer that was sent is also received."""
        try:
            super().finish()
            if self._unread:
                self._linger()
        except OSError:
            self.rfile.close()

    def _linger(self) -> None:
        """Read on for a moment: closing with bytes unread would reset the connection, and the answer be lost."""
        self.connection.shutdown(socket.SHUT_WR)
        self._socket.expire_in(_LINGER_SECONDS)
        while self.connection.recv(_CHUNK):
            self._socket.set_timeout()

    def do_GET(self) -> None:
        """Answer what does not change anything."""
        self._respond()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_GET  # noqa: N815

    def handle_expect_100(self) -> bool:
        """Ask for a body only if it would be read."""
        try:
            self._checked_length(self._checked_route())
        except RequestError as error:
            self._unread = True
            self._send_error(error)
            return False
        self.send_response_only(HTTPStatus.CONTINUE)
        self.end_headers()
        return True

    def _respond(self) -> None:
        # Until a body is read, an answer must not leave it to be taken for the next request.
        lengths = self.headers.get_all("Content-Length") or ([] if self.command == "POST" else ["0"])
        self._unread = lengths != ["0"] or "Transfer-Encoding" in self.headers
        try:
            self._send_json(*self._answer(self._checked_route()))
        except RequestError as error:
            self._send_error(error)
        except OSError:  # the client's side of the connection
            raise
        except Exception as error:  # a defect, or out of memory: this request fails, the server goes on
            log_event("serve", "failed", path=self.path, error=f"{type(error).__name__}: {error}"[:300])
            if self.server.options.log_requests:
                traceback.print_exc()
            self._send_error(RequestError(500, "The server failed to answer; its log says why"))

    def _checked_route(self) -> Route:
        route = protocol.route(self.path, self.server.options.name)
        if self.command not in route.methods:
            raise RequestError(
                405, f"{self.path} takes {' or '.join(route.methods)}. Received: {self.command}"
            )
        return route

    def _answer(self, route: Route) -> tuple[int, Any]:
        name, model = self.server.options.name, self.server.model
        if route.kind == "live":
            return 200, {"status": "ok"}
        if route.kind == "models":
            return 200, {"models": [name]}
        if route.kind == "status":
            return 200 if model else 503, protocol.status_document(name, ready=model is not None)
        if model is None:
            raise RequestError(503, f"Model {name!r} is being loaded. Try again")
        if route.kind == "metadata":
            return 200, protocol.metadata_document(name, model.signatures)
        length = self._checked_length(route)
        with self.server.budget.share() as share:
            question = self._question(self._read_body(length, share))
            self._num_images = len(question.images)
            with self.server.turn():
                outputs = model.ask(question.images, question.signature)
            return 200, protocol.answer(outputs, by_row=question.by_row)

    def _checked_length(self, route: Route) -> int:
        if route.kind != "predict":
            return 0
        kind = self._content_type()
        if kind not in protocol.JSON_TYPES and not kind.startswith(protocol.RAW_TYPES):
            raise RequestError(
                415,
                f"`Content-Type` must be application/json, image/* or application/octet-stream. Received: {kind}",
            )
        if (encoding := self.headers.get("Content-Encoding", "identity")) != "identity":
            raise RequestError(415, f"`Content-Encoding` must be identity. Received: {encoding}")
        lengths = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers or not lengths:
            raise RequestError(411, "`Content-Length` must be given; chunked bodies are not read")
        if len(set(lengths)) > 1 or not (lengths[0].isascii() and lengths[0].isdecimal()):
            raise RequestError(
                400, f"`Content-Length` must be one number. Received: {', '.join(lengths)[:80]}"
            )
        most = self.server.options.max_body_bytes
        if len(lengths[0]) > 18 or int(lengths[0]) > most:
            raise RequestError(413, f"The body must have at most {most} bytes. Received: {lengths[0][:20]}")
        return int(lengths[0])

    def _content_type(self) -> str:
        return str(self.headers.get("Content-Type", "")).partition(";")[0].strip().casefold()

    def _read_body(self, length: int, share: Share) -> bytearray:
        self._socket.expire_in(_BODY_SECONDS + length / _BODY_BYTES_PER_SECOND)
        body, num_read = bytearray(length), 0  # takes memory as it is filled
        while num_read < length:
            with memoryview(body)[num_read : num_read + _CHUNK] as chunk:
                share.take(len(chunk))
                num_new = self._receive(chunk, length)
            if not num_new:
                raise RequestError(400, f"The body ended after {num_read} of {length} bytes")
            num_read += num_new
        self._unread = False
        return body

    def _receive(self, chunk: memoryview, length: int) -> int:
        try:
            return self.rfile.readinto1(chunk)
        except TimeoutError as error:
            raise RequestError(408, f"The body of {length} bytes did not come in time") from error

    def _question(self, body: bytearray) -> Question:
        if self._content_type().startswith(protocol.RAW_TYPES):
            return Question([bytes(body)])
        return protocol.parse_json(body, most_instances=self.server.options.max_instances)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what http.server itself refuses, such as a malformed head, as all errors are answered."""
        self._unread = True
        self.request_version = self.protocol_version  # without one that it knows, http.server sends no head
        self._send_error(RequestError(code, message or HTTPStatus(code).phrase))

    def _send_error(self, error: RequestError) -> None:
        extra = {"Retry-After": "1"} if error.status == 503 else {}
        if error.status == 405:
            extra["Allow"] = ", ".join(protocol.route(self.path, self.server.options.name).methods)
        self._send_json(error.status, {"error": str(error)}, extra)

    def _send_json(self, status: int, document: Any, extra: Mapping[str, str] | None = None) -> None:
        body = json.dumps(document, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        self._status = status
        if self._unread or self.server.is_stopping:
            self.close_connection = True
        self.connection.settimeout(ANSWER_SECONDS)
        self.send_response(status)
        fields = {
            "Content-Type": "application/json; charset=utf-8",
            "Content-Length": str(len(body)),
            **(extra or {}),
        }
        if self.close_connection:
            fields["Connection"] = "close"
        for name, value in fields.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self._log()

    def _log(self) -> None:
        if self.server.options.log_requests:
            log_event(
                "serve",
                "request",
                method=self.command,
                path=self.path.partition("?")[0] if self.command else "",
                status=self._status,
                images=self._num_images,
                seconds=round(time.monotonic() - self._started, 4),
            )

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: `_log` does."""

    def version_string(self) -> str:
        """Return the header `Server`."""
        return f"kubegraft/{__version__}"


class _TimedSocket(io.RawIOBase):
    """What a socket receives, until a moment that many small reads don't move."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._deadline = time.monotonic()

    def expire_in(self, seconds: float) -> None:
        """Set how long from now all that is read next may take."""
        self._deadline = time.monotonic() + seconds
        self.set_timeout()

    def set_timeout(self) -> None:
        """Give the socket what is left of the time.

        Raises:
            TimeoutError: If there is none.
        """
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the client took too long")
        self._connection.settimeout(left)

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Receive into a buffer."""
        self.set_timeout()
        return self._connection.recv_into(buffer)
