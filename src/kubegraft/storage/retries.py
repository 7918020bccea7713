"""Trying again what fails for a while, and errors that say what failed without saying a secret."""

from __future__ import annotations

import http.client
import os
import random
import re
import ssl
import threading
import urllib.error
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Final, TypeVar
from urllib.parse import urlsplit

from kubegraft.errors import KubegraftError, StorageError
from kubegraft.reporting.events import log_event
from kubegraft.storage.uris import public_uri

RETRY_WAITS_SECONDS: Final = (1.0, 2.0, 5.0, 15.0, 30.0)
_JITTER: Final = 0.25  # many pods that fail together should not come back together
_TRANSIENT_STATUS: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
# S3 says some passing faults with status 400.
_TRANSIENT_CODES: Final = frozenset(
    {
        "RequestTimeout",
        "BadDigest",
        "IncompleteBody",
        "XAmzContentSHA256Mismatch",
        "SlowDown",
        "InternalError",
    }
)
# Dropped connections and damaged bodies, as the clients of google-cloud-storage and boto3 name them.
_TRANSIENT_NAMES: Final = (
    "Connection", "Timeout", "Transport", "Incomplete", "Chunked", "Protocol", "Streaming", "Corruption", "Checksum",
)  # fmt: skip
_SECRET_VARIABLES: Final = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")
_QUERY: Final = re.compile(r"\?[^\s'\"<>)]*")
_USER: Final = re.compile(r"(?<=://)[^/\s@]*@")
_HEADER: Final = re.compile(r"(?i)((?:proxy-)?authorization|x-amz-security-token|cookie)(['\"]?\s*[:=]\s*).*")
_HINTS: Final = {
    401: "Give credentials (docs/operations.md, Storage).",
    403: "Check the permissions of the credentials in use (docs/operations.md, Storage).",
    404: "Check the spelling.",
}

_T = TypeVar("_T")


class PassingFault(Exception):
    """Something is not whole yet, or was damaged on its way: worth another try."""


@dataclass(frozen=True, slots=True)
class Retries:
    """How often and how patiently to try again.

    Attributes:
        waits_seconds: Wait before each further try, each changed by up to a quarter at random.
        stopped: Set when the work as a whole has ended, so that no thread waits on.
    """

    waits_seconds: Sequence[float] = RETRY_WAITS_SECONDS
    stopped: threading.Event = field(default_factory=threading.Event)

    def call(self, uri: str, action: Callable[[], _T], verb: str = "read") -> _T:
        """Return what `action` returns, tried again while its failure may be passing.

        Args:
            uri: What the action is about, for messages.
            action: May be called several times.
            verb: What could not be done, as a participle.

        Raises:
            StorageError: If it fails for good.
        """
        for wait_seconds in (*self.waits_seconds, None):
            try:
                return action()
            except KubegraftError:
                raise
            except Exception as error:  # each client has its own tree of errors; all end as a StorageError
                if wait_seconds is None or not is_passing(error) or self.stopped.is_set():
                    raise failure(uri, error, verb) from _shown_cause(error, uri)
                reason = redacted(f"{type(error).__name__}: {error}", uri)[:200]
                log_event("storage", "retrying", uri=public_uri(uri), seconds=wait_seconds, reason=reason)
                self.stopped.wait(wait_seconds * random.uniform(1 - _JITTER, 1 + _JITTER))
        raise AssertionError("unreachable: the last try returns or raises")


def is_passing(error: BaseException) -> bool:
    """Return whether the same request may succeed later with nothing changed."""
    if isinstance(error, PassingFault) or _error_code(error) in _TRANSIENT_CODES:
        return True
    status = http_status(error)
    if status is not None:
        return status in _TRANSIENT_STATUS
    if isinstance(error, urllib.error.URLError):
        return not isinstance(error.reason, (ssl.SSLCertVerificationError, str))
    if isinstance(error, (ConnectionError, TimeoutError, http.client.HTTPException)):
        return not isinstance(error, http.client.InvalidURL)
    if getattr(error, "retryable", False) is True:  # google.auth, while a metadata server comes up
        return True
    return any(word in type(error).__name__ for word in _TRANSIENT_NAMES)


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status of failure that an error of any client carries, or None."""
    response = getattr(error, "response", None)
    status = getattr(error, "code", None)
    if isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    elif response is not None and not isinstance(status, int):
        status = getattr(response, "status_code", None)
    # A damaged body comes with status 200: that is no reason.
    return int(status) if isinstance(status, int) and status >= 400 else None


def _error_code(error: BaseException) -> str:
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def failure(uri: str, error: BaseException, verb: str = "read") -> StorageError:
    """Return the error that says what could not be done to `uri`, without any secret."""
    hint = _HINTS.get(http_status(error) or 0, "Check that it exists and that this machine can reach it.")
    if isinstance(error, PermissionError):
        hint = _HINTS[403]
    reason = redacted(f"{type(error).__name__}: {error}", uri).rstrip(". ")
    failed = StorageError(f"`{public_uri(uri)}` could not be {verb}. Received: {reason}. {hint}")
    failed.is_missing = http_status(error) == HTTPStatus.NOT_FOUND
    return failed


def redacted(text: str, uri: str = "") -> str:
    """Return `text` without what may be a credential: queries, user names, headers, and secrets we can know of."""
    text = _HEADER.sub(r"\1\2***", _USER.sub("", _QUERY.sub("", text)))
    text = " ".join(text.split())  # one event a line
    parts = urlsplit(uri) if "://" in uri else None
    known = [parts.netloc.rpartition("@")[0], *_password(parts.netloc), parts.query] if parts else []
    for secret in (*known, *(os.environ.get(name, "") for name in _SECRET_VARIABLES)):
        if len(secret) > 2:
            text = text.replace(secret, "***")
    return text


def _password(netloc: str) -> list[str]:
    return [netloc.rpartition("@")[0].partition(":")[2]]


def _shown_cause(error: Exception, uri: str) -> Exception | None:
    """Return the cause to chain, or None where its text holds a secret that a traceback would print."""
    text = " ".join(str(error).split())
    return error if redacted(text, uri) == text else None
