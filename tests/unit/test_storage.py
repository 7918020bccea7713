import contextlib
import functools
import hashlib
import http.server
import shutil
import threading

import numpy as np
import pytest
from PIL import Image

from kubegraft import storage
from kubegraft.config import IngestConfig
from kubegraft.data.sources import open_source
from kubegraft.errors import ConfigError, StorageError
from kubegraft.storage import fetch_file, fetch_tree, public_uri, sha256_of

CONTENT = np.random.default_rng(0).bytes(3_000_000)
NO_WAIT = (0.0, 0.0)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the test tells it to, then with the content."""

    def __init__(self, failures, requests, *arguments):
        self.failures, self.requests = failures, requests
        super().__init__(*arguments)

    def do_GET(self):
        self.requests.append(self.path)
        failure = self.failures.pop(0) if self.failures else None
        if isinstance(failure, int):
            self.send_error(failure)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:1000] if failure == "drop" else CONTENT)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    """Return a function that starts a server; it gives the server's URL and a list of its requests."""
    with contextlib.ExitStack() as stack:

        def start(*failures):
            requests = []
            handler = functools.partial(Handler, list(failures), requests)
            server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}", requests

        yield start


@pytest.mark.parametrize("failures", [(), (500,), (503, "drop"), (429,)], ids=str)
def test_a_passing_failure_is_tried_again(serve, tmp_path, failures):
    url, requests = serve(*failures)
    fetch_file(f"{url}/file", tmp_path / "deep" / "target", retry_waits_seconds=NO_WAIT)
    assert (tmp_path / "deep" / "target").read_bytes() == CONTENT
    assert len(requests) == len(failures) + 1
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["target"]


@pytest.mark.parametrize(
    ("failures", "num_requests", "message"),
    [((404,), 1, "404.*spelling"), ((403,), 1, "403.*permissions"), ((500,) * 3, 3, "500")],
    ids=["missing", "forbidden", "broken"],
)
def test_a_lasting_failure_leaves_no_file(serve, tmp_path, failures, num_requests, message):
    url, requests = serve(*failures)
    with pytest.raises(StorageError, match=message):
        fetch_file(f"{url}/file", tmp_path / "target", retry_waits_seconds=NO_WAIT)
    assert len(requests) == num_requests
    assert not list(tmp_path.iterdir())


def test_a_server_that_is_not_there_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="refused"):
        fetch_file("http://127.0.0.1:9/file", tmp_path / "target", retry_waits_seconds=())


def test_local_paths_and_file_uris(tmp_path):
    source = tmp_path / "with space"
    source.mkdir()
    (source / "a").write_bytes(CONTENT)
    fetch_file(str(source / "a"), tmp_path / "one")
    fetch_file((source / "a").as_uri(), tmp_path / "two")
    assert sha256_of(tmp_path / "one") == sha256_of(tmp_path / "two") == hashlib.sha256(CONTENT).hexdigest()
    fetch_tree(source.as_uri(), tmp_path / "tree")
    assert (tmp_path / "tree" / "a").read_bytes() == CONTENT
    for action in (fetch_file, fetch_tree):
        with pytest.raises(StorageError, match="could not be read"):
            action(str(tmp_path / "missing"), tmp_path / "three", retry_waits_seconds=NO_WAIT)
    with pytest.raises(StorageError, match="could not be read"):
        sha256_of(tmp_path / "missing")


def test_an_unknown_scheme_gets_a_suggestion(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'http'"):
        fetch_file("htp://host/file", tmp_path / "target")


@pytest.mark.parametrize("uri", ["gs:///path", "s3:///path"])
def test_a_bucket_must_be_named(tmp_path, uri):
    with pytest.raises(ConfigError, match="must name a bucket"):
        fetch_file(uri, tmp_path / "target")


def test_a_folder_can_not_be_fetched_by_http(tmp_path):
    with pytest.raises(ConfigError, match=r"archive"):
        fetch_tree("https://host/folder", tmp_path)


def test_credentials_are_not_shown():
    assert public_uri("https://me:secret@host:1/a/b.zip?token=secret#x") == "https://host:1/a/b.zip"
    assert public_uri("/a/b?c") == "/a/b?c"
    assert public_uri("gs://bucket/a b") == "gs://bucket/a b"


class Bucket:
    """A bucket in memory."""

    def __init__(self, objects):
        self.objects, self.downloads = objects, []

    def keys(self, prefix):
        return iter([(key, len(data)) for key, data in self.objects.items() if key.startswith(prefix)])

    def download(self, key, target):
        self.downloads.append(key)
        if self.downloads.count(key) == 1 and key.endswith("flaky"):
            raise ConnectionResetError
        target.write_bytes(self.objects[key])


def test_a_folder_of_a_bucket_is_fetched_and_continued(tmp_path, monkeypatch):
    bucket = Bucket({"images/": b"", "images/a/1": b"one", "images/b/flaky": b"two", "images2/x": b"no"})
    monkeypatch.setattr(storage, "_GoogleBucket", lambda name: bucket)
    fetch_tree("gs://bucket/images", tmp_path, retry_waits_seconds=NO_WAIT)
    found = {
        str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
    }
    assert found == {"a/1": b"one", "b/flaky": b"two"}
    bucket.downloads.clear()
    (tmp_path / "a" / "1").unlink()
    fetch_tree("gs://bucket/images/", tmp_path, retry_waits_seconds=NO_WAIT)
    assert bucket.downloads == ["images/a/1"]


def test_an_object_can_not_leave_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_S3Bucket", lambda name: Bucket({"images/../../x": b""}))
    with pytest.raises(StorageError, match="leads out"):
        fetch_tree("s3://bucket/images", tmp_path / "target")


def test_an_empty_prefix_is_a_storage_error(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_S3Bucket", lambda name: Bucket({"other/x": b""}))
    with pytest.raises(StorageError, match="no object under this prefix"):
        fetch_tree("s3://bucket/images", tmp_path)


def test_a_source_is_fetched_once_however_often_ingest_is_killed(tmp_path, serve, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / name / "1.png")
    archive = shutil.make_archive(str(tmp_path / "archive"), "zip", tmp_path / "images")
    with open(archive, "rb") as file:  # noqa: PTH123
        monkeypatch.setitem(globals(), "CONTENT", file.read())
    url, requests = serve()
    config = IngestConfig(source=f"{url}/download?id=3")
    roots = {open_source(config.source, tmp_path / "scratch").root for _ in range(3)}
    assert len(requests) == len(roots) == 1
    assert sorted(path.name for path in roots.pop().iterdir()) == ["a", "b"]
