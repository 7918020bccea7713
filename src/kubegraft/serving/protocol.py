"""Requests and answers of TensorFlow Serving's REST API, which is also KServe's V1 protocol, as plain values.

Whoever talks to TensorFlow Serving can talk to this: the same paths, the same JSON. Nothing here knows
TensorFlow or sockets.

Source:
    TensorFlow Serving, "RESTful API"; KServe, "V1 Protocol".
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote

INPUT: Final = "image_bytes"
VERSION: Final = "1"
DEFAULT_SIGNATURE: Final = "serving_default"
JSON_TYPES: Final = (
    "",
    "application/json",
    "application/x-www-form-urlencoded",
    "text/plain",
)  # curl -d says the third
RAW_TYPES: Final = ("application/octet-stream", "image/")

_MODEL_PATH: Final = re.compile(
    r"/v1/models/(?P<name>[^/:]+)(?:/versions/(?P<version>\d+)|/labels/(?P<label>[^/:]+))?"
    r"(?:/(?P<resource>metadata)|:(?P<verb>\w+))?",
    re.IGNORECASE,
)
_SPACES: Final = re.compile(rb"\s+")


class RequestError(Exception):
    """A request that is answered by an error.

    Attributes:
        status: HTTP status.
        instance: Position of the image that is to blame, or None.
    """

    def __init__(self, status: int, message: str, *, instance: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.instance = instance


@dataclass(frozen=True, slots=True)
class Question:
    """What a client asks.

    Attributes:
        images: Bytes of image files, at least one.
        signature: Name of the signature.
        by_row: Whether the answer is a list of one object an image, not one object of lists.
    """

    images: list[bytes]
    signature: str = DEFAULT_SIGNATURE
    by_row: bool = True


@dataclass(frozen=True, slots=True)
class Route:
    """What a path names.

    Attributes:
        kind: `live`, `models`, `status`, `metadata` or `predict`.
        name: Name of the model, "" where the path has none.
    """

    kind: str
    name: str = ""

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods that the path allows."""
        return ("POST",) if self.kind == "predict" else ("GET", "HEAD")


def route(path: str, model_name: str) -> Route:
    """Return what a request's path names; a query is ignored.

    Raises:
        RequestError: 404, if it names nothing, or another model or version.
    """
    path = path.partition("?")[0]
    if path in ("/", "/healthz"):
        return Route("live")
    if path.rstrip("/").casefold() == "/v1/models":
        return Route("models")
    match = _MODEL_PATH.fullmatch(path)
    if match is None:
        raise RequestError(404, f"Nothing is at this path. Try /v1/models/{model_name}:predict")
    name, verb = unquote(match["name"]), (match["verb"] or "").casefold()
    if name != model_name:
        raise RequestError(404, f"Model {name!r} is not served here; /v1/models/{model_name} is")
    if match["label"] or int(match["version"] or VERSION) != int(VERSION):
        wanted = match["label"] or match["version"]
        raise RequestError(404, f"Model {name!r} has no version {wanted!r}; its only version is {VERSION}")
    if verb not in ("", "predict"):
        raise RequestError(404, f"`:{verb}` is not offered; `:predict` is")
    return Route("metadata" if match["resource"] else verb or "status", name)


def parse_json(body: bytes | bytearray, *, most_instances: int) -> Question:
    """Return the question in a JSON body.

    Args:
        body: `{"instances": [...]}` or `{"inputs": ...}`, perhaps with `signature_name`.
        most_instances: How many images are allowed.

    Raises:
        RequestError: 400 if it is malformed, 413 if there are too many images.
    """
    document = _document(body)
    signature = document.get("signature_name", DEFAULT_SIGNATURE)
    if not isinstance(signature, str):
        raise RequestError(400, "`signature_name` must be a string")
    given = [key for key in ("instances", "inputs") if key in document]
    if len(given) != 1:
        raise RequestError(400, "The request must have one of the keys 'instances' and 'inputs'")
    key = given[0]
    values = document[key]
    if key == "inputs" and isinstance(values, dict) and not _is_base64(values):
        if set(values) != {INPUT}:
            raise RequestError(
                400, f"`inputs` must have the one key {INPUT!r}. Received: {_shown(list(values))}"
            )
        values = values[INPUT]
    if not isinstance(values, list) or not values:
        raise RequestError(400, f"`{key}` must be a list of at least one image. Received: {_shown(values)}")
    require_number(len(values), most_instances)
    images = [_image(value, index, by_row=key == "instances") for index, value in enumerate(values)]
    return Question(images, signature or DEFAULT_SIGNATURE, by_row=key == "instances")


def require_number(num_instances: int, most_instances: int) -> None:
    """Raise RequestError (413) if there are too many images in one request."""
    if num_instances > most_instances:
        raise RequestError(
            413,
            f"A request must have at most {most_instances} images. Received: {num_instances}. "
            "Send several requests",
        )


def _document(body: bytes | bytearray) -> dict[str, Any]:
    if body[:3] == b"\xff\xd8\xff" or body[:4] == b"\x89PNG" or body[:4] == b"GIF8":
        raise RequestError(
            400, "The body is an image, not JSON. Send it with `Content-Type: application/octet-stream`"
        )
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"JSON Parse error: {str(error) or 'nested too deeply'}") from error
    if not isinstance(document, dict):
        raise RequestError(400, f"The body must be a JSON object. Received: {_shown(document)}")
    return document


def _image(value: Any, index: int, *, by_row: bool) -> bytes:
    if by_row and isinstance(value, dict) and not _is_base64(value):
        if set(value) != {INPUT}:
            raise _instance_error(index, f"must have the one key {INPUT!r}. Received: {_shown(list(value))}")
        value = value[INPUT]
    if not _is_base64(value):
        raise _instance_error(index, f'must be {{"b64": "<base64 of a file>"}}. Received: {_shown(value)}')
    try:
        text = _SPACES.sub(b"", value["b64"].encode("ascii"))
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise _instance_error(index, f"must hold base64. Received: {error}") from error


def _instance_error(index: int, rule: str) -> RequestError:
    return RequestError(400, f"Image {index} {rule}", instance=index)


def _is_base64(value: Any) -> bool:
    return isinstance(value, dict) and len(value) == 1 and isinstance(value.get("b64"), str)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def answer(outputs: Mapping[str, Sequence[Any]], *, by_row: bool) -> dict[str, Any]:
    """Return the answer as TensorFlow Serving lays it out.

    Args:
        outputs: Name of an output -> a value for each image: nested lists of numbers, bytes.
        by_row: See `Question`.

    Returns:
        `{"predictions": [...]}`, one object an image, or its value alone where there is one output; else
        `{"outputs": {...}}`, or the list alone where there is one output. Bytes are text, or `{"b64": ...}`
        where the output's name ends in `_bytes`.
    """
    columns = {
        name: [_json_value(value, as_text=not name.endswith("_bytes")) for value in column]
        for name, column in outputs.items()
    }
    if not by_row:
        return {"outputs": next(iter(columns.values())) if len(columns) == 1 else columns}
    if len(columns) == 1:
        return {"predictions": next(iter(columns.values()))}
    rows = zip(*columns.values(), strict=True)
    return {"predictions": [dict(zip(columns, row, strict=True)) for row in rows]}


def _json_value(value: Any, *, as_text: bool) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace") if as_text else {"b64": base64.b64encode(value).decode()}
    if isinstance(value, list):
        return [_json_value(each, as_text=as_text) for each in value]
    return value


def status_document(name: str, *, ready: bool) -> dict[str, Any]:
    """Return TensorFlow Serving's status of a model and KServe's, whose keys don't clash, in one object."""
    return {
        "model_version_status": [
            {
                "version": VERSION,
                "state": "AVAILABLE" if ready else "LOADING",
                "status": {"error_code": "OK", "error_message": ""},
            }
        ],
        "name": name,
        "ready": ready,
    }


def metadata_document(name: str, signatures: Mapping[str, Any]) -> dict[str, Any]:
    """Return TensorFlow Serving's metadata of a model.

    Args:
        name: Name of the model.
        signatures: Name -> its SignatureDef in protobuf's JSON.
    """
    return {
        "model_spec": {"name": name, "signature_name": "", "version": VERSION},
        "metadata": {"signature_def": {"signature_def": dict(signatures)}},
    }
