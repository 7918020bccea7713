"""The model server, asked over loopback by real clients about a real export."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from kubegraft import storage
from kubegraft.config import ExportConfig
from kubegraft.errors import ConfigError, EnvironmentFault, ModelError
from kubegraft.export.export import export
from kubegraft.export.predict import predict
from kubegraft.serving import connections
from kubegraft.serving.model import check_export, find_saved_model
from kubegraft.serving.protocol import RequestError, answer, parse_json, route
from kubegraft.serving.serve import load_served_model
from kubegraft.serving.server import Budget, ModelServer, ServerOptions
from tests.classifier_stages import NAMES, write_dataset, write_model

JSON = {"Content-Type": "application/json"}
PREDICT = "/v1/models/owls:predict"
BODY_LIMIT = 2**20


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("serving")
    dataset = write_dataset(root, per_class=6)
    model = write_model(root / "trained", dataset, skill=8, features="levels")
    config = ExportConfig(formats=("saved_model",), num_verification_images=1)
    export(dataset, model, None, root / "model", config)
    return root / "model"


@pytest.fixture(scope="module")
def model(model_dir):
    return load_served_model(str(model_dir))


@contextlib.contextmanager
def serving(model, **options):
    server = ModelServer(ServerOptions(name="owls", host="127.0.0.1", port=0, **options))
    server.model = model
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.stop(10)
        thread.join()


@pytest.fixture(scope="module")
def server(model):
    with serving(model, max_body_bytes=BODY_LIMIT, max_instances=20) as server:
        yield server


def ask(server, body=None, headers=None, path=PREDICT, method=None):
    """Status and JSON of one request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method or ("GET" if body is None else "POST"), path, body, headers or {})
        response = connection.getresponse()
        return response.status, json.loads(response.read() or b"null")


def ask_json(server, document, **options):
    return ask(server, json.dumps(document), JSON, **options)


def encode(kind, pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def in_base64(encoded):
    return {"b64": base64.b64encode(encoded).decode()}


@pytest.fixture(scope="module")
def images():
    random = np.random.default_rng(3)
    pixels = random.integers(0, 256, (47, 31, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "jpeg": encode("JPEG", pixels),
        "png": encode("PNG", pixels[:20]),
        "gif": encode("GIF", pixels),
        "turned": encode("JPEG", pixels, exif=turned),
    }


@pytest.fixture(scope="module")
def expected(model_dir, images, tmp_path_factory):
    """What `kubegraft predict` says: name of an image -> class name -> probability."""
    folder = tmp_path_factory.mktemp("files")
    for name, encoded in images.items():
        (folder / name).write_bytes(encoded)
    answers = predict(model_dir, [folder / name for name in images])
    return {name: dict(each.top) for name, each in zip(images, answers, strict=True)}


def same(prediction, expected):
    """Whether one answer is what `kubegraft predict` said."""
    assert prediction["class_names"] == list(NAMES)
    assert prediction["predicted_class"] == max(expected, key=expected.get)
    shares = dict(zip(NAMES, prediction["probabilities"], strict=True))
    assert shares == pytest.approx(expected, abs=1e-5)
    return True


@pytest.mark.parametrize("kind", ["image/jpeg", "image/png; q=1", "application/octet-stream"])
@pytest.mark.parametrize("name", ["jpeg", "png", "gif", "turned"])
def test_the_bytes_of_an_image_are_answered_as_predict_does(server, images, expected, name, kind):
    status, document = ask(server, images[name], {"Content-Type": kind})
    assert status == 200
    assert list(document) == ["predictions"]
    assert same(document["predictions"][0], expected[name])


@pytest.mark.parametrize(
    "path", [PREDICT, "/v1/models/owls/versions/1:predict", "/V1/Models/owls:predict?x=1"]
)
@pytest.mark.parametrize("signature", [{}, {"signature_name": "serve"}, {"signature_name": ""}], ids=str)
@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
def test_rows_are_answered_in_rows(server, images, expected, path, signature, named):
    values = [in_base64(encoded) for encoded in images.values()]
    instances = [{"image_bytes": value} for value in values] if named else values
    status, document = ask_json(server, {**signature, "instances": instances}, path=path)
    assert status == 200
    for name, prediction in zip(images, document["predictions"], strict=True):
        assert same(prediction, expected[name])


@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
def test_columns_are_answered_in_columns(server, images, expected, named):
    values = [in_base64(encoded) for encoded in images.values()]
    status, document = ask_json(server, {"inputs": {"image_bytes": values} if named else values})
    assert status == 200
    columns = document["outputs"]
    assert set(columns) == {"class_names", "probabilities", "predicted_class"}
    for index, name in enumerate(images):
        assert same({key: column[index] for key, column in columns.items()}, expected[name])


def test_json_needs_no_content_type(server, images):
    body = json.dumps({"instances": [in_base64(images["png"])]})
    for headers in ({}, {"Content-Type": "application/x-www-form-urlencoded"}):  # the second is curl -d
        assert ask(server, body, headers)[0] == 200


def test_probabilities_are_the_shortest_numbers_of_their_precision(server, images):
    _, document = ask(server, images["jpeg"], {"Content-Type": "image/jpeg"})
    for share in document["predictions"][0]["probabilities"]:
        assert float(str(np.float32(share))) == share


def test_many_clients_at_once_get_their_own_answers(server, images, expected):
    names = list(images) * 6
    with ThreadPoolExecutor(12) as pool:
        answers = pool.map(lambda name: ask(server, images[name], {"Content-Type": "image/jpeg"}), names)
        for name, (status, document) in zip(names, answers, strict=True):
            assert status == 200
            assert same(document["predictions"][0], expected[name])


def test_a_connection_serves_one_request_after_another(server, images):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    with contextlib.closing(connection):
        connection.connect()
        own = connection.sock
        for body in (images["png"], b"no image", images["jpeg"]):
            connection.request("POST", PREDICT, body, {"Content-Type": "image/png"})
            response = connection.getresponse()
            assert response.status == (400 if body == b"no image" else 200)
            assert response.read()
            assert connection.sock is own


@pytest.mark.parametrize("together", [2, 40])
def test_a_bad_image_fails_its_request_and_is_named(model, images, together):
    truncated = images["jpeg"][: len(images["jpeg"]) // 2]
    many = [images["png"]] * (together - 1)
    with serving(model) as server:
        for bad in (truncated, b"no image", b""):
            instances = [in_base64(encoded) for encoded in [*many, bad, images["png"]]]
            status, document = ask_json(server, {"instances": instances})
            assert status == 400
            assert f"Image {together - 1} must be a whole JPEG, PNG or GIF file" in document["error"]
            assert "node" not in document["error"]
        assert ask_json(server, {"instances": instances[:2]})[0] == 200 if together > 2 else True


def test_what_the_graph_cannot_decode_is_refused_by_name(server, images):
    webp = encode("WEBP", np.zeros((8, 8, 3), np.uint8))
    status, document = ask(server, webp, {"Content-Type": "image/webp"})
    assert status == 400
    assert "a WEBP. Convert it to PNG" in document["error"]


def test_a_small_file_of_a_huge_picture_is_not_decoded(server):
    bomb = bytearray(encode("PNG", np.zeros((1, 1, 3), np.uint8)))
    bomb[16:24] = (20_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    status, document = ask(server, bytes(bomb), {"Content-Type": "image/png"})
    assert status == 400
    assert "400 million pixels" in document["error"] or "400000000 pixels" in document["error"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "JSON Parse error"),
        (b"{", "JSON Parse error"),
        (b"[" * 100_000, "JSON Parse error"),
        (b"\xff\xfe", "JSON Parse error"),
        (b"[]", "must be a JSON object"),
        (b"{}", "'instances' and 'inputs'"),
        (b'{"instances": [], "inputs": []}', "'instances' and 'inputs'"),
        (b'{"instances": []}', "at least one"),
        (b'{"instances": {"b64": ""}}', "must be a list"),
        (b'{"inputs": {"b64": ""}}', "must be a list"),
        (b'{"inputs": {"pixels": []}}', "'image_bytes'"),
        (b'{"instances": [{"pixels": 1}]}', "Image 0 must have the one key 'image_bytes'"),
        (b'{"instances": ["owl.jpg"]}', 'Image 0 must be {"b64"'),
        (b'{"instances": [{"b64": "!"}]}', "Image 0 must hold base64"),
        (b'{"instances": [{"b64": "\xc3\xbc"}]}', "Image 0 must hold base64"),
        (b'{"instances": [{"b64": ""}], "signature_name": 1}', "must be a string"),
        (b'{"instances": [{"b64": ""}], "signature_name": "x"}', '"x" not found in signature def'),
        (b"\xff\xd8\xff\xe0", "The body is an image"),
    ],
)
def test_a_malformed_request_is_told_why(server, body, message):
    status, document = ask(server, body, JSON)
    assert (status, message in document["error"]) == (400, True), document


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", "/v1/models/cats:predict", {}, 404),
        ("POST", "/v1/models/owls/versions/2:predict", {}, 404),
        ("POST", "/v1/models/owls/labels/stable:predict", {}, 404),
        ("POST", "/v1/models/owls:classify", {}, 404),
        ("GET", "/v2/models/owls", {}, 404),
        ("GET", PREDICT, {}, 405),
        ("POST", "/v1/models/owls", {}, 405),
        ("OPTIONS", PREDICT, {}, 405),
        ("BREW", PREDICT, {}, 501),
        ("POST", PREDICT, {"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ("POST", PREDICT, {"Content-Encoding": "gzip"}, 415),
        ("POST", PREDICT, {"Transfer-Encoding": "chunked"}, 411),
        ("POST", PREDICT, {"Content-Length": "-1"}, 400),
        ("POST", PREDICT, {"Content-Length": "9" * 30}, 413),
    ],
)
def test_what_is_not_offered_is_refused(server, method, path, headers, status):
    body = b"5\r\nhello\r\n0\r\n\r\n" if method == "POST" else None
    found, document = ask(server, body, headers, path=path, method=method)
    assert (found, list(document)) == (status, ["error"])


def test_a_body_over_the_limit_is_refused_with_an_answer(server):
    status, document = ask(server, bytes(20 * BODY_LIMIT), JSON)
    assert status == 413
    assert str(BODY_LIMIT) in document["error"]


def test_too_many_images_are_refused(server):
    status, document = ask_json(server, {"instances": [{"b64": ""}] * 21})
    assert status == 413
    assert "at most 20" in document["error"]


@contextlib.contextmanager
def raw_connection(server, head):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as connection:
        connection.sendall(head)
        yield connection


def received(connection):
    return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize(("length", "answered"), [(5, b"100 Continue"), (BODY_LIMIT + 1, b"413 ")])
def test_a_client_that_asks_first_sends_no_body_in_vain(server, length, answered):
    head = f"POST {PREDICT} HTTP/1.1\r\nContent-Length: {length}\r\nExpect: 100-continue\r\n\r\n"
    with raw_connection(server, head.encode()) as connection:
        assert answered in connection.recv(4096)


def test_a_body_that_ends_early_is_an_error(server):
    head = f"POST {PREDICT} HTTP/1.1\r\nContent-Length: 100\r\n\r\nabc"
    with raw_connection(server, head.encode()) as connection:
        connection.shutdown(socket.SHUT_WR)
        reply = received(connection)
    assert b" 400 " in reply
    assert b"ended after 3 of 100 bytes" in reply


@pytest.mark.parametrize(
    "fields",
    [
        "",
        "Content-Length: 0\r\nContent-Length: 30\r\n",
        "Content-Length: 30\r\nTransfer-Encoding: chunked\r\n",
    ],
)
@pytest.mark.parametrize("path", [PREDICT, "/nothing"])
def test_what_may_be_a_body_is_not_taken_for_a_request(server, fields, path):
    head = f"POST {path} HTTP/1.1\r\n{fields}\r\n"
    with raw_connection(server, head.encode() + b"GET /healthz HTTP/1.1\r\n\r\n") as connection:
        reply = received(connection)
    assert reply.count(b"HTTP/1.1 ") == 1
    assert b"Connection: close" in reply


@pytest.mark.parametrize("constant", ["IDLE_SECONDS", "HEAD_SECONDS", "_BODY_SECONDS"])
def test_a_client_that_sends_a_byte_now_and_then_is_let_go(server, monkeypatch, constant):
    monkeypatch.setattr(connections, constant, 0.3)
    start = {
        "IDLE_SECONDS": "",
        "HEAD_SECONDS": "GET / HTT",
        "_BODY_SECONDS": f"POST {PREDICT} HTTP/1.1\r\nContent-Length: 1000\r\n\r\n",
    }[constant]
    with raw_connection(server, start.encode()) as connection:
        connection.settimeout(0.05)
        reply = None
        while not reply and reply != b"":
            with contextlib.suppress(OSError):
                if start:
                    connection.sendall(b"x")
            try:
                reply = connection.recv(4096)
            except TimeoutError:
                reply = None
            except ConnectionError:
                reply = b""
    assert (b" 408 " in reply) is (constant == "_BODY_SECONDS")


def test_a_malformed_head_is_answered_as_all_errors_are(server):
    with raw_connection(server, b"GET / HTTP/9.9\r\n\r\n") as connection:
        head, _, body = received(connection).partition(b"\r\n\r\n")
    assert b"Content-Type: application/json" in head
    assert list(json.loads(body)) == ["error"]


def test_the_model_says_that_it_is_ready_as_tensorflow_serving_and_kserve_do(server):
    for path in ("/v1/models/owls", "/v1/models/owls/versions/1"):
        status, document = ask(server, path=path)
        assert status == 200
        assert document["model_version_status"] == [
            {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
        ]
        assert (document["name"], document["ready"]) == ("owls", True)
    assert ask(server, path="/v1/models") == (200, {"models": ["owls"]})
    assert ask(server, path="/healthz")[0] == ask(server, path="/")[0] == 200


def test_head_has_no_body(server):
    with raw_connection(server, b"HEAD /v1/models/owls HTTP/1.1\r\nConnection: close\r\n\r\n") as connection:
        head, _, body = received(connection).partition(b"\r\n\r\n")
    assert b" 200 " in head
    assert body == b""


def test_the_metadata_are_those_of_the_signatures(server):
    status, document = ask(server, path="/v1/models/owls/metadata")
    assert status == 200
    assert document["model_spec"] == {"name": "owls", "signature_name": "", "version": "1"}
    serve = document["metadata"]["signature_def"]["signature_def"]["serve"]
    assert serve["inputs"]["image_bytes"]["dtype"] == "DT_STRING"
    assert serve["inputs"]["image_bytes"]["tensor_shape"]["dim"][0]["size"] == "-1"
    assert set(serve["outputs"]) == {"class_names", "probabilities", "predicted_class"}


def test_a_model_that_is_being_loaded_is_not_ready(images):
    with serving(None) as server:
        assert ask(server, path="/healthz")[0] == 200
        status, document = ask(server, path="/v1/models/owls")
        assert (status, document["ready"]) == (503, False)
        assert document["model_version_status"][0]["state"] == "LOADING"
        assert ask(server, images["png"], {"Content-Type": "image/png"})[0] == 503
        assert ask(server, path="/v1/models/owls/metadata")[0] == 503


class BrokenModel:
    def ask(self, images, signature):
        raise ValueError("secret /path")


def test_a_defect_is_an_error_without_its_details_and_the_server_goes_on(images, capfd):
    with serving(BrokenModel()) as server:
        for _ in range(2):
            status, document = ask(server, images["png"], {"Content-Type": "image/png"})
            assert status == 500
            assert "secret" not in document["error"]
    assert "secret" in capfd.readouterr().err


class SlowModel:
    """Counts who asks at once, and answers when it is told to."""

    def __init__(self):
        self.num_now = self.num_most = 0
        self.lock, self.arrived, self.go_on = threading.Lock(), threading.Semaphore(0), threading.Event()

    def ask(self, images, signature):
        with self.lock:
            self.num_now += 1
            self.num_most = max(self.num_most, self.num_now)
        self.arrived.release()
        assert self.go_on.wait(60)
        with self.lock:
            self.num_now -= 1
        return {"x": [1.0]}


def test_no_more_requests_than_allowed_run_at_once(images):
    model = SlowModel()
    with serving(model, concurrency=2) as server, ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(ask, server, images["png"], {"Content-Type": "image/png"}) for _ in range(8)]
        for _ in range(2):
            assert model.arrived.acquire(timeout=60)
        model.go_on.set()
        assert [future.result() for future in futures] == [(200, {"predictions": [1.0]})] * 8
    assert model.num_most == 2


def test_who_waits_too_long_for_a_turn_is_told_to_try_again(images, monkeypatch):
    monkeypatch.setattr("kubegraft.serving.server._WAIT_SECONDS", 0.1)
    model = SlowModel()
    with serving(model, concurrency=1) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, server, images["png"], {"Content-Type": "image/png"})
        assert model.arrived.acquire(timeout=60)
        assert ask(server, images["png"], {"Content-Type": "image/png"})[0] == 503
        model.go_on.set()
        assert first.result()[0] == 200


def test_too_many_connections_are_refused(model, monkeypatch):
    monkeypatch.setattr("kubegraft.serving.server._MOST_CONNECTIONS", 2)
    with serving(model) as server, contextlib.ExitStack() as stack:
        for _ in range(2):
            held = stack.enter_context(raw_connection(server, b"GET / HTTP/1.1\r\n\r\n"))
            assert b" 200 " in held.recv(4096)
        refused = stack.enter_context(raw_connection(server, b""))
        assert received(refused).startswith(b"HTTP/1.1 503 ")


def test_memory_is_given_back(monkeypatch):
    monkeypatch.setattr("kubegraft.serving.server._WAIT_SECONDS", 0.05)
    budget = Budget(10)
    with budget.share() as share:
        share.take(6)
        with budget.share() as other, pytest.raises(RequestError, match="busy"):
            other.take(5)
    with budget.share() as share:
        share.take(10)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_it_listens_on_either_kind_of_address(host):
    try:
        server = ModelServer(ServerOptions(host=host, port=0))
    except ConfigError as error:
        pytest.skip(f"no IPv6 here: {error}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    address = re.fullmatch(r"http://\[?(.*?)\]?:(\d+)", server.url)
    connection = http.client.HTTPConnection(address[1], int(address[2]), timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", "/")
        assert connection.getresponse().read()
    server.stop(10)
    thread.join()


def test_a_taken_port_is_a_fault_of_the_machine(server):
    with pytest.raises(EnvironmentFault, match="give another `--port`"):
        ModelServer(ServerOptions(host="127.0.0.1", port=server.server_port))


@pytest.mark.parametrize(
    "options", [{"name": "a/b"}, {"name": ""}, {"port": 70_000}, {"host": "198.51.100.1"}, {"concurrency": 0}]
)
def test_options_that_cannot_be_used_are_refused(options):
    with pytest.raises(ConfigError):
        ModelServer(ServerOptions(**{"port": 0, **options}))


def test_a_model_is_found_in_a_run_an_export_and_itself(model_dir, tmp_path):
    (tmp_path / "model").symlink_to(model_dir)
    for place in (tmp_path, model_dir, model_dir / "saved_model"):
        assert find_saved_model(place).samefile(model_dir / "saved_model")
    with pytest.raises(ModelError, match="does not exist"):
        find_saved_model(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="has none"):
        find_saved_model(tmp_path / "empty")


@pytest.mark.parametrize(
    "proof",
    [
        {"tolerance": 1e-4, "formats": {"saved_model": {"max_difference": 1e-3}}},
        {"tolerance": 1e-4, "formats": {"saved_model": {"max_difference": float("nan")}}},
        {"tolerance": 1e-4, "formats": {"keras": {"max_difference": 0}}},
        [],
    ],
    ids=["too far off", "not a number", "of another format", "no proof"],
)
def test_an_export_that_was_not_proved_is_refused(tmp_path, proof):
    (tmp_path / "saved_model").mkdir()
    (tmp_path / "verification.json").write_text(json.dumps(proof))
    with pytest.raises(ModelError, match="Export the model again"):
        check_export(tmp_path / "saved_model")


def test_a_file_that_was_changed_after_it_was_published_is_refused(model_dir, tmp_path):
    storage.publish_tree(model_dir, str(tmp_path / "published"))
    saved_model = tmp_path / "published" / "saved_model"
    assert check_export(saved_model) == "proof and digests"
    assert check_export(model_dir / "saved_model") == "proof"
    variables = next((saved_model / "variables").glob("*.data-*"))
    content = bytearray(variables.read_bytes())
    content[len(content) // 2] ^= 1
    variables.write_bytes(content)
    with pytest.raises(ModelError, match="must be the file that was published"):
        check_export(saved_model)


def test_what_is_no_saved_model_is_refused(tmp_path):
    (tmp_path / "saved_model.pb").write_bytes(b"rubbish")
    with pytest.raises(ModelError, match="must be a SavedModel"):
        load_served_model(str(tmp_path))
    module = tf.Module()
    module.serve = tf.function(lambda x: {"y": x}, input_signature=[tf.TensorSpec([None], tf.float32)])
    tf.saved_model.save(module, str(tmp_path / "other"), signatures=module.serve)
    with pytest.raises(ModelError, match="signature 'serve'"):
        load_served_model(str(tmp_path / "other"))


def test_one_output_stands_alone_and_bytes_are_base64_by_name():
    assert answer({"y": [1.5, 2.5]}, by_row=True) == {"predictions": [1.5, 2.5]}
    assert answer({"y": [1.5, 2.5]}, by_row=False) == {"outputs": [1.5, 2.5]}
    assert answer({"x_bytes": [b"\xff"], "x": [b"\xc3\xbc"]}, by_row=True) == {
        "predictions": [{"x_bytes": {"b64": "/w=="}, "x": "ü"}]
    }


def test_base64_may_be_broken_into_lines_and_lack_its_padding():
    body = json.dumps({"instances": [{"b64": "YW\nI"}, {"b64": "YWI="}]}).encode()
    assert parse_json(body, most_instances=2).images == [b"ab", b"ab"]


def test_a_name_may_be_escaped_in_a_url():
    assert route("/v1/models/a%2Eb", "a.b").kind == "status"


# Tells at the end whether anything was imported that builds models; Keras itself is imported by TensorFlow.
PROGRAM = """
import os, sys
end = os._exit
os._exit = lambda code: (print("kubegraft.modeling" in sys.modules, flush=True), end(code))
from kubegraft.cli import main
main()
"""


def test_a_stopped_server_finishes_its_request(model_dir, images, expected):
    environment = {**os.environ, "KUBEGRAFT_LOG_FORMAT": "json"}
    command = [
        sys.executable,
        "-c",
        PROGRAM,
        "serve",
        str(model_dir),
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--debug",
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as process:
        try:
            events = map(json.loads, process.stderr)
            ready = next(event for event in events if event["event"] == "ready")
            port = int(re.search(r":(\d+)/", ready["url"])[1])
            assert ready["url"].endswith("/v1/models/kubegraft")
            body = images["turned"]
            head = f"POST /v1/models/kubegraft:predict HTTP/1.1\r\nContent-Length: {len(body)}\r\n"
            with (
                socket.create_connection(("127.0.0.1", port), timeout=60) as idle,
                socket.create_connection(("127.0.0.1", port), timeout=60) as connection,
            ):
                for opened in (idle, connection):
                    opened.sendall(b"GET / HTTP/1.1\r\n\r\n")
                    reply = b""
                    while not reply.endswith(b"}\n"):  # head and body may come one by one
                        reply += opened.recv(4096)
                connection.sendall(f"{head}Content-Type: image/jpeg\r\nExpect: 100-continue\r\n\r\n".encode())
                assert b" 100 " in connection.recv(4096)
                process.send_signal(signal.SIGTERM)
                assert idle.recv(4096) == b""  # closed: so the server stops
                with pytest.raises(OSError):
                    socket.create_connection(("127.0.0.1", port), timeout=5)
                connection.sendall(body)
                answered = received(connection).partition(b"\r\n\r\n")
            assert b"Connection: close" in answered[0]
            assert same(json.loads(answered[2])["predictions"][0], expected["turned"])
            last = list(events)
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert output == "False\n"
    assert last[-1] == {**last[-1], "event": "stopped", "abandoned": 0}
    requests = [event for event in last if event["event"] == "request"]
    assert (requests[-1]["status"], requests[-1]["images"]) == (200, 1)
