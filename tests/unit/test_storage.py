import base64
import contextlib
import functools
import hashlib
import http.server
import shutil
import threading
import traceback

import numpy as np
import pytest
from PIL import Image

from kubegraft.config import IngestConfig
from kubegraft.data.sources import open_source
from kubegraft.errors import ConfigError, StorageError
from kubegraft.storage import (
    check_target,
    exists,
    fetch_file,
    fetch_tree,
    fetch_whole_tree,
    list_files,
    public_uri,
    publish_tree,
    sha256_of,
)
from kubegraft.storage.retries import redacted
from kubegraft.storage.uris import inside

CONTENT = np.random.default_rng(0).bytes(3_000_000)
NO_WAIT = (0.0, 0.0)
AUTHORIZATIONS = []


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the test tells it to, then with the content."""

    def __init__(self, failures, requests, *arguments):
        self.failures, self.requests = failures, requests
        super().__init__(*arguments)

    def do_GET(self):
        self.requests.append(self.path)
        AUTHORIZATIONS.append(self.headers.get("Authorization"))
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


def test_a_local_folder_is_fetched_whole_or_in_part(tmp_path):
    publish_tree(written(tmp_path / "out", {"a/x": b"1", "b/y": b"2"}), str(tmp_path / "published"))
    for part, expected in (("", {"a/x", "b/y"}), ("a", {"a/x"}), ("b/y", {"b/y"})):
        fetch_whole_tree(str(tmp_path / "published"), tmp_path / "here", part=part, replace=True)
        found = {path.relative_to(tmp_path / "here").as_posix() for path in (tmp_path / "here").rglob("*")}
        assert {path for path in found if "/" in path} == expected


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


@pytest.mark.parametrize("relative", ["../x", "a/../../x", "/x", ""])
def test_an_object_can_not_leave_its_folder(tmp_path, relative):
    with pytest.raises(StorageError, match="leads out"):
        inside(tmp_path, relative, "s3://bucket/images")


def test_a_user_name_in_a_url_is_sent_as_credentials_and_shown_nowhere(serve, tmp_path, capsys):
    url, _ = serve(500, 401)
    with_secret = url.replace("://", "://me:hunter2@") + "/file?token=hunter3"
    with pytest.raises(StorageError, match="401") as caught:
        fetch_file(with_secret, tmp_path / "target", retry_waits_seconds=NO_WAIT)
    shown = "".join(capsys.readouterr()) + "".join(traceback.format_exception(caught.value))
    assert "retrying" in shown
    assert "hunter" not in shown
    assert AUTHORIZATIONS[-1] == f"Basic {base64.b64encode(b'me:hunter2').decode()}"


@pytest.mark.parametrize(
    "text",
    [
        "GET https://host/a?X-Amz-Signature=hunter2 failed",
        "bad URL http://me:hunter2@host/a",
        "sent {'Authorization': 'Bearer hunter2'}",
        "the key hunter2 is not known",
    ],
)
def test_messages_of_clients_are_shown_without_secrets(monkeypatch, text):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    assert "hunter2" not in redacted(text)
    assert redacted("404 Not Found: no such object") == "404 Not Found: no such object"


def written(directory, files):
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def test_a_local_publication_is_replaced_whole(tmp_path):
    source = written(tmp_path / "source", {"a/1": b"one", "2": b"two"})
    target = tmp_path / "deep" / "target"
    digest = publish_tree(source, str(target))
    assert publish_tree(source, target.as_uri()) == digest
    assert [file.path for file in list_files(str(target))] == ["2", "a/1"]
    (source / "a" / "1").unlink()
    assert publish_tree(source, str(target)) != digest
    fetch_tree(str(target), tmp_path / "back")
    assert [path.name for path in (tmp_path / "back").iterdir() if path.is_file()] == ["2"]
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    assert exists(str(target))
    assert not exists(str(target / "a" / "1"))


def test_only_some_names_are_published(tmp_path):
    source = written(tmp_path / "source", {"model/x": b"x", "run.json": b"{}", "work/big": b"no"})
    publish_tree(source, str(tmp_path / "target"), only=("model", "run.json"))
    assert [file.path for file in list_files(str(tmp_path / "target"))] == ["run.json", "model/x"]
    with pytest.raises(ConfigError, match="no missing"):
        publish_tree(source, str(tmp_path / "target"), only=("model", "missing"))


def test_what_is_not_a_publication_is_never_replaced(tmp_path):
    source = written(tmp_path / "source", {"a": b"one"})
    theirs = written(tmp_path / "theirs", {"b": b"precious"})
    for attempt in (lambda: check_target(source, str(theirs)), lambda: publish_tree(source, str(theirs))):
        with pytest.raises(ConfigError, match="holds 'b'"):
            attempt()
    with pytest.raises(ConfigError, match="a file"):
        publish_tree(source, str(theirs / "b"))
    assert (theirs / "b").read_bytes() == b"precious"


@pytest.mark.parametrize("place", ["source", "source/inner", "."])
def test_a_folder_is_not_published_into_itself(tmp_path, place):
    source = written(tmp_path / "source", {"a": b"one"})
    with pytest.raises(ConfigError, match="outside of itself"):
        publish_tree(source, str(tmp_path / place))
    assert (source / "a").read_bytes() == b"one"


def test_publishing_by_http_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="can only be read"):
        check_target(tmp_path, "https://host/folder")


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
