"""`http://` and `https://`: single files, read with the standard library."""

from __future__ import annotations

import base64
import http.client
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit, urlunsplit

from kubegraft import __version__

_CONNECTION_TIMEOUT_SECONDS: Final = 60.0
_CHUNK_BYTES: Final = 1024 * 1024


def download_http(uri: str, target: Path) -> None:
    """Write the file behind a URL to `target`; a user name and password in it are sent as basic credentials.

    Raises:
        ConnectionError: If fewer bytes came than were announced.
        OSError: What urllib raises.
    """
    with _opened(_request(uri)) as response, target.open("wb") as file:
        # A connection that drops in the middle looks like the end of the file to `read(size)`.
        expected = response.headers.get("Content-Length")
        shutil.copyfileobj(response, file, _CHUNK_BYTES)
        if expected is not None and file.tell() != int(expected):
            raise ConnectionError(f"the connection ended after {file.tell()} of {expected} bytes")


def _opened(request: urllib.request.Request) -> http.client.HTTPResponse:
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(
            request, timeout=_CONNECTION_TIMEOUT_SECONDS
        )
    except urllib.error.HTTPError as error:
        error.close()  # it is the answer too, and would hold the connection as long as the error lives
        raise
    return response


def _request(uri: str) -> urllib.request.Request:
    parts = urlsplit(uri)
    user, _, host = parts.netloc.rpartition("@")
    url = urlunsplit((parts.scheme, host, parts.path, parts.query, ""))
    request = urllib.request.Request(url, headers={"User-Agent": f"kubegraft/{__version__}"})
    if user:
        # Not redirected: another host must not see them.
        token = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return request
