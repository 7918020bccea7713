"""`gs://`: a bucket of Google Cloud Storage, or of an emulator at `STORAGE_EMULATOR_HOST`.

Credentials are Google's application-default ones: `GOOGLE_APPLICATION_CREDENTIALS`, `gcloud auth application-default
login`, or the workload identity of a pod. Without any, requests are anonymous, which public buckets allow.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from kubegraft.storage.objects import CONNECT_SECONDS, NUM_THREADS, READ_SECONDS, StoredObject, not_installed

EMULATOR_VARIABLE: Final = "STORAGE_EMULATOR_HOST"
_TIMEOUT: Final = (CONNECT_SECONDS, READ_SECONDS)
_NO_PROJECT: Final = "<none>"  # objects belong to buckets, whatever the project
_LISTED_FIELDS: Final = "items(name,size,crc32c,contentEncoding),nextPageToken"
# Retries are ours (`retries`): the client's own would multiply them.
_REQUEST: Final[dict[str, Any]] = {"timeout": _TIMEOUT, "retry": None}


class GoogleBucket:
    """One bucket; see `ObjectStore`."""

    def __init__(self, name: str) -> None:
        self._client = _client()
        self._bucket = self._client.bucket(name)

    def page(self, prefix: str, token: str | None) -> tuple[list[StoredObject], str | None]:
        """Return a page of a listing."""
        blobs = self._client.list_blobs(
            self._bucket, prefix=prefix, page_token=token, fields=_LISTED_FIELDS, **_REQUEST
        )
        objects = [_stored(blob) for blob in next(blobs.pages, ())]
        return objects, blobs.next_page_token

    def download(self, key: str, target: Path) -> None:
        """Write an object to `target`; the client compares CRC32C or MD5."""
        self._bucket.blob(key).download_to_filename(str(target), checksum="auto", **_REQUEST)

    def upload(self, source: Path, key: str) -> None:
        """Write a file to `key`; its CRC32C is compared."""
        self._bucket.blob(key).upload_from_filename(str(source), checksum="crc32c", **_REQUEST)

    def read(self, key: str) -> bytes | None:
        """Return the content, or None."""
        from google.api_core.exceptions import NotFound

        try:
            content: bytes = self._bucket.blob(key).download_as_bytes(checksum="auto", **_REQUEST)
        except NotFound:
            return None
        return content

    def write(self, key: str, content: bytes) -> None:
        """Write a small object."""
        blob = self._bucket.blob(key)
        blob.cache_control = "no-store"  # public objects are cached for an hour otherwise
        blob.upload_from_string(content, content_type="application/json", checksum="crc32c", **_REQUEST)

    def copy(self, key: str, new_key: str) -> None:
        """Copy on the server, in as many calls as it takes."""
        source, target = self._bucket.blob(key), self._bucket.blob(new_key)
        token = None
        while True:
            token, _, _ = target.rewrite(source, token=token, **_REQUEST)
            if token is None:
                return

    def delete(self, key: str) -> None:
        """Delete an object if it is there."""
        from google.api_core.exceptions import NotFound

        try:
            self._bucket.blob(key).delete(**_REQUEST)
        except NotFound:
            return

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def _client() -> Any:
    try:
        import google.auth
        from google.auth.exceptions import DefaultCredentialsError
        from google.cloud import storage
        from requests.adapters import HTTPAdapter
    except ImportError as error:
        raise not_installed("gs", "google-cloud-storage", "train", error) from error
    emulator = os.environ.get(EMULATOR_VARIABLE, "")
    if emulator:
        client = storage.Client.create_anonymous_client() if "://" in emulator else _at(f"http://{emulator}")
    else:
        try:
            credentials, project = google.auth.default(scopes=storage.Client.SCOPE)
            client = storage.Client(project=project or _NO_PROJECT, credentials=credentials)
        except DefaultCredentialsError:  # public buckets can be read by anyone
            client = storage.Client.create_anonymous_client()
    for scheme in ("https://", "http://"):
        client._http.mount(scheme, HTTPAdapter(pool_maxsize=NUM_THREADS))  # else connections are thrown away
    return client


def _at(endpoint: str) -> Any:
    """Return a client for an emulator that is named without a scheme, as Go's client and KFP's launcher want it."""
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage

    options = {"api_endpoint": endpoint}
    return storage.Client(_NO_PROJECT, AnonymousCredentials(), client_options=options)


def _stored(blob: Any) -> StoredObject:
    if blob.content_encoding == "gzip":  # served decoded: size and checksum are those of the encoded bytes
        return StoredObject(blob.name, -1)
    return StoredObject(blob.name, int(blob.size), f"crc32c:{blob.crc32c}" if blob.crc32c else "")
