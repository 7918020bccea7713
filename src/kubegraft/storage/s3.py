"""`s3://`: a bucket of Amazon S3, or of any server that speaks its protocol at `AWS_ENDPOINT_URL`.

Credentials are found by boto3: environment variables, shared files, a web identity (IRSA), a pod's or machine's role.
Without any, requests are anonymous.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from pathlib import Path
from typing import Any, Final

from kubegraft.storage.digests import checksum_of
from kubegraft.storage.objects import CONNECT_SECONDS, NUM_THREADS, READ_SECONDS, StoredObject, not_installed
from kubegraft.storage.retries import PassingFault

_CHUNK_BYTES: Final = 1024 * 1024
_LARGEST_PUT_BYTES: Final = 4 * 1024**3  # S3 takes 5 GiB in one request
_MD5: Final = re.compile(r"[0-9a-f]{32}")


class S3Bucket:
    """One bucket; see `ObjectStore`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._client = _client()

    def page(self, prefix: str, token: str | None) -> tuple[list[StoredObject], str | None]:
        """Return a page of a listing."""
        more = {"ContinuationToken": token} if token else {}
        answer = self._client.list_objects_v2(Bucket=self._name, Prefix=prefix, **more)
        objects = [
            StoredObject(item["Key"], item["Size"], _md5_in(item["ETag"]))
            for item in answer.get("Contents", ())
        ]
        return objects, answer.get("NextContinuationToken")

    def download(self, key: str, target: Path) -> None:
        """Write an object to `target`, and compare its size and, where the ETag is one, its MD5."""
        answer = self._client.get_object(Bucket=self._name, Key=key)
        digest, size = hashlib.md5(usedforsecurity=False), 0
        with answer["Body"] as body, target.open("wb") as file:
            while chunk := body.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
                file.write(chunk)
        if size != answer["ContentLength"]:
            raise PassingFault(f"{size} of {answer['ContentLength']} bytes came")
        expected = _expected_md5(answer)
        if expected and expected != f"md5:{digest.hexdigest()}":
            raise PassingFault(f"the bytes have the checksum md5:{digest.hexdigest()} instead of {expected}")

    def upload(self, source: Path, key: str) -> None:
        """Write a file to `key`; the server compares its MD5."""
        if source.stat().st_size > _LARGEST_PUT_BYTES:
            self._client.upload_file(str(source), self._name, key)
            return
        md5 = checksum_of(source, "md5").partition(":")[2]
        with source.open("rb") as file:
            self._put(key, file, bytes.fromhex(md5))

    def read(self, key: str) -> bytes | None:
        """Return the content, or None."""
        try:
            content: bytes = self._client.get_object(Bucket=self._name, Key=key)["Body"].read()
        except self._client.exceptions.NoSuchKey:
            return None
        return content

    def write(self, key: str, content: bytes) -> None:
        """Write a small object."""
        self._put(key, content, hashlib.md5(content, usedforsecurity=False).digest())

    def copy(self, key: str, new_key: str) -> None:
        """Copy on the server, in parts if it is large."""
        from boto3.s3.transfer import TransferConfig

        # In one part where S3 allows it: the ETag stays an MD5.
        config = TransferConfig(multipart_threshold=_LARGEST_PUT_BYTES)
        self._client.copy({"Bucket": self._name, "Key": key}, self._name, new_key, Config=config)

    def delete(self, key: str) -> None:
        """Delete an object; S3 does not mind if it is not there."""
        self._client.delete_object(Bucket=self._name, Key=key)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _put(self, key: str, body: Any, md5: bytes) -> None:
        self._client.put_object(
            Bucket=self._name, Key=key, Body=body, ContentMD5=base64.b64encode(md5).decode()
        )


def _client() -> Any:
    try:
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config
    except ImportError as error:
        raise not_installed("s3", "boto3", "s3", error) from error
    session = boto3.Session()
    options: dict[str, Any] = {
        "connect_timeout": CONNECT_SECONDS,
        "read_timeout": READ_SECONDS,
        "max_pool_connections": NUM_THREADS,
        "retries": {"total_max_attempts": 1},  # retries are ours: the client's own would multiply them
    }
    for variable in ("request_checksum_calculation", "response_checksum_validation"):
        # AWS's newer checksums are unknown to many servers; MD5, which we send and compare, is not.
        options[variable] = os.environ.get(f"AWS_{variable.upper()}", "when_required").casefold()
    if session.get_credentials() is None:
        options["signature_version"] = UNSIGNED
    return session.client("s3", config=Config(**options))


def _md5_in(etag: str) -> str:
    """Return the MD5 that an ETag is, except that of an object uploaded in parts."""
    text = etag.strip('"').casefold()
    return f"md5:{text}" if _MD5.fullmatch(text) else ""


def _expected_md5(answer: dict[str, Any]) -> str:
    if answer.get("ServerSideEncryption", "AES256") != "AES256" or answer.get("SSECustomerAlgorithm"):
        return ""  # the ETag of such an object is not its MD5
    return _md5_in(answer["ETag"])
