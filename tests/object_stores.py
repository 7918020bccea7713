"""Real object stores on loopback, and a proxy before them that breaks what the test tells it to."""

import contextlib
import http.client
import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

BUCKET = "bucket"
SECRET = "wJalrXUtnFEMI-not-to-be-seen"
S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_START_SECONDS = 60


@dataclass(frozen=True)
class ObjectServer:
    """A running store; `scheme` is that of its URIs."""

    scheme: str
    port: int

    def environment(self, port: int) -> dict[str, str]:
        """Return what leads kubegraft to the store, through the proxy at `port`."""
        url = f"http://127.0.0.1:{port}"
        if self.scheme == "gs":
            return {"STORAGE_EMULATOR_HOST": url}
        return {"AWS_ENDPOINT_URL": url, **S3_ENVIRONMENT}


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def _running(command: list[str], log: Path, is_up: Callable[[], bool]) -> Iterator[None]:
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=output, cwd=log.parent) as process,
    ):
        try:
            deadline = time.monotonic() + _START_SECONDS
            while not is_up():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{command[0]} did not start:\n{log.read_text()[-2000:]}")
                time.sleep(0.1)
            yield
        finally:
            process.kill()


def _answers(port: int, method: str, path: str, body: str | None = None) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        return connection.getresponse().status < 300
    except OSError:
        return False
    finally:
        connection.close()


@contextlib.contextmanager
def google_server(directory: Path) -> Iterator[ObjectServer]:
    """A Google Cloud Storage emulator that keeps everything in memory, with one bucket."""
    (port,) = _free_ports(1)
    command = [
        sys.executable,
        "-m",
        "gcp_storage_emulator",
        "start",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    command += ["--in-memory", "--quiet", "--default-bucket", BUCKET]
    with _running(command, directory / "gcs.log", lambda: _answers(port, "GET", f"/storage/v1/b/{BUCKET}")):
        yield ObjectServer("gs", port)


@contextlib.contextmanager
def s3_server(directory: Path) -> Iterator[ObjectServer]:
    """SeaweedFS with its S3 gateway and one bucket, its files in `directory`."""
    weed = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    names = ("master", "volume", "filer", "s3")
    numbers = iter(_free_ports(2 * len(names)))
    ports = {f"{name}.port{suffix}": next(numbers) for name in names for suffix in ("", ".grpc")}
    command = [
        str(weed),
        "server",
        "-s3",
        f"-dir={directory}",
        "-ip=127.0.0.1",
        "-master.volumeSizeLimitMB=64",
    ]
    command += [f"-{name}={port}" for name, port in ports.items()]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false", "-volume.max=20"]
    port = ports["s3.port"]
    with _running(command, directory / "weed.log", lambda: _answers(port, "PUT", f"/{BUCKET}")):
        yield ObjectServer("s3", port)


@dataclass
class FaultyProxy:
    """Forwards requests to a store, and breaks those that a fault takes.

    Attributes:
        faults: Each is `(kind, takes)`; the first whose `takes(method, path)` is true is used up by a request.
            Kinds: a status, `drop` (no answer), `truncate` (half of the body), `corrupt` (one byte changed).
        broken: As a fault that is never used up, or None.
        requests: `METHOD path` of every request.
    """

    upstream: int
    faults: list[tuple[object, Callable[[str, str], bool]]] = field(default_factory=list)
    broken: Callable[[str, str], bool] | None = None
    requests: list[str] = field(default_factory=list)
    largest_parallel: int = 0
    num_running: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, method: str, path: str) -> object:
        """Return the kind of fault for a request, or None."""
        with self.lock:
            self.requests.append(f"{method} {path}")
            if self.broken is not None and self.broken(method, path):
                return 503
            for fault in self.faults:
                if fault[1](method, path):
                    self.faults.remove(fault)
                    return fault[0]
        return None

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count a request among those that run at once."""
        with self.lock:
            self.num_running += 1
            self.largest_parallel = max(self.largest_parallel, self.num_running)
        try:
            yield
        finally:
            with self.lock:
                self.num_running -= 1


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultyProxy

    def _forward(self) -> None:
        with self.proxy.counted():
            self._answer(self._body())

    def _answer(self, body: bytes) -> None:
        fault = self.proxy.take(self.command, self.path)
        if fault == "drop":
            self.close_connection = True
            return
        if isinstance(fault, int):
            self.close_connection = True
            self.send_response(fault)
            self.send_header("Content-Length", "0")
            self.send_header("Connection", "close")  # or the client's next request meets a closed connection
            self.end_headers()
            return
        status, headers, answer = self._upstream(body)
        self.send_response_only(status)
        for name, value in headers:
            if name.casefold() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = {name.casefold(): value for name, value in headers}.get("content-length", len(answer))
        self.send_header("Content-Length", str(length if self.command == "HEAD" else len(answer)))
        self.end_headers()
        if fault == "corrupt":
            answer = bytes([answer[0] ^ 1]) + answer[1:]
        if fault == "truncate":
            answer, self.close_connection = answer[: len(answer) // 2], True
        self.wfile.write(answer)

    def _body(self) -> bytes:
        if self.headers.get("Expect", "").casefold() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        if self.headers.get("Transfer-Encoding", "").casefold() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _upstream(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy.upstream, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.casefold() not in ("transfer-encoding", "connection", "content-length", "expect"):
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            connection.close()

    def log_message(self, *_: object) -> None:
        pass

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _forward


@contextlib.contextmanager
def faulty_proxy(upstream: int) -> Iterator[tuple[FaultyProxy, int]]:
    """Start a proxy before the server at port `upstream`; give it and its port."""
    proxy = FaultyProxy(upstream)
    handler = type("Handler", (_Handler,), {"proxy": proxy})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield proxy, server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
