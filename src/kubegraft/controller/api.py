"""Calls to the API server, one function a verb; counts what is written."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from kubegraft.errors import ClusterError

if TYPE_CHECKING:
    from kubegraft.controller.access import Access
    from kubegraft.controller.metrics import Metrics

FIELD_MANAGER: Final = "kubegraft"
_SECONDS: Final = 30.0
_LOG_SECONDS: Final = 5.0  # a lost node must not hold a worker for long
# Between two messages of a watch; the server sends a bookmark every minute.
_SILENT_SECONDS: Final = 100.0
_WATCH_SECONDS: Final = 600
_PAGE: Final = 500
_NOT_FOUND: Final = 404
_CONFLICT: Final = 409
_GONE: Final = 410
_TOO_MANY: Final = 429
_FIRST_ERROR: Final = 400
_FIRST_SERVER_ERROR: Final = 500

Path = tuple[str, str]  # prefix and plural
KINDS: Final[Mapping[str, Path]] = {
    "TransferJob": ("/apis/kubegraft.dev/v1alpha1", "transferjobs"),
    "TransferSchedule": ("/apis/kubegraft.dev/v1alpha1", "transferschedules"),
    "JobSet": ("/apis/jobset.x-k8s.io/v1alpha2", "jobsets"),
    "Job": ("/apis/batch/v1", "jobs"),
    "Lease": ("/apis/coordination.k8s.io/v1", "leases"),
    "ConfigMap": ("/api/v1", "configmaps"),
    "Pod": ("/api/v1", "pods"),
    "Event": ("/api/v1", "events"),
}


class ApiError(ClusterError):
    """The API server can't be reached, or refused a call.

    Attributes:
        status: HTTP status; 0 if there was no answer.
        reason: Kubernetes' own word, for example `Forbidden`.
        seconds: How long the server asks to be left alone; 0.0 where it said nothing.
    """

    def __init__(self, message: str, *, status: int = 0, reason: str = "", seconds: float = 0.0) -> None:
        super().__init__(message)
        self.status, self.reason, self.seconds = status, reason, seconds

    @property
    def refused(self) -> bool:
        """Whether the same call would be refused again: what was asked for is forbidden or invalid."""
        return _FIRST_ERROR <= self.status < _FIRST_SERVER_ERROR and self.status not in (
            _CONFLICT,
            _GONE,
            _TOO_MANY,
        )

    @property
    def conflict(self) -> bool:
        """Whether the object had changed, or was there."""
        return self.status == _CONFLICT

    @property
    def gone(self) -> bool:
        """Whether a watch must begin with a new list."""
        return self.status == _GONE

    @property
    def missing(self) -> bool:
        """Whether the object is not there."""
        return self.status == _NOT_FOUND


@dataclass(frozen=True, slots=True)
class Listing:
    """What a list call found.

    Attributes:
        items: The objects.
        version: Resource version to watch from.
    """

    items: tuple[dict[str, Any], ...]
    version: str


def path_of(kind: str, namespace: str = "", name: str = "", subresource: str = "") -> str:
    """Return the path of a kind's objects, or of one."""
    prefix, plural = KINDS[kind]
    parts = [prefix, *(("namespaces", namespace) if namespace else ()), plural, name, subresource]
    return "/".join(part for part in parts if part)


class Api:
    """A session with the API server; an asynchronous context manager."""

    def __init__(self, access: Access, metrics: Metrics) -> None:
        self.access, self.metrics = access, metrics
        self._session: Any = None

    async def __aenter__(self) -> Self:
        """Open the session."""
        import aiohttp

        connector = aiohttp.TCPConnector(ssl=self.access.tls(), limit=64)
        self._session = aiohttp.ClientSession(base_url=self.access.server, connector=connector)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close it."""
        await self._session.close()

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        """Return an object, or None if there is none."""
        try:
            found: dict[str, Any] = await self._call("GET", path_of(kind, namespace, name))
            return found
        except ApiError as error:
            if error.missing:
                return None
            raise

    async def list(self, kind: str, namespace: str = "", **query: str) -> Listing:
        """Return the objects of a kind in a namespace, or in all; `query` as the API has it, `labelSelector`."""
        items: list[dict[str, Any]] = []
        page = {**query, "limit": str(_PAGE)}
        while True:
            found = await self._call("GET", path_of(kind, namespace), query=page)
            of = {"apiVersion": found["apiVersion"], "kind": kind}  # which items of built-in kinds don't say
            items += ({**of, **item} for item in found.get("items") or ())
            following = found["metadata"].get("continue")
            if not following:
                return Listing(tuple(items), found["metadata"].get("resourceVersion", ""))
            page["continue"] = following

    async def watch(
        self, kind: str, namespace: str, version: str, **query: str
    ) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """Yield what changes after a version, until the server ends it: type (`ADDED`, ...) and object.

        Raises:
            ApiError: If the server refuses; `gone` if it has forgotten the version.
        """
        wanted = {
            **query,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(_WATCH_SECONDS),
        }
        async for line in self._lines(path_of(kind, namespace), wanted):
            change = json.loads(line)
            if change["type"] == "ERROR":
                status = change["object"]
                raise ApiError(status.get("message", ""), status=status.get("code", 0))
            yield change["type"], change["object"]

    async def apply(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Make an object be as described (server-side apply), and return it."""
        metadata = manifest["metadata"]
        return await self._write(
            "apply",
            manifest["kind"],
            "PATCH",
            path_of(manifest["kind"], metadata["namespace"], metadata["name"]),
            query={"fieldManager": FIELD_MANAGER, "force": "true"},
            body=manifest,
            content_type="application/apply-patch+yaml",
        )

    async def apply_status(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Make the status of an object be as described (server-side apply), and return the object.

        Args:
            manifest: `apiVersion`, `kind`, `metadata`, `status`; what is absent from the status is removed. With a
                `metadata.resourceVersion` or `uid`, another one is a conflict.
        """
        metadata = manifest["metadata"]
        return await self._write(
            "apply-status",
            manifest["kind"],
            "PATCH",
            path_of(manifest["kind"], metadata["namespace"], metadata["name"], "status"),
            query={"fieldManager": FIELD_MANAGER, "force": "true"},
            body=manifest,
            content_type="application/apply-patch+yaml",
        )

    async def create(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Make an object; one that is there is a conflict."""
        path = path_of(manifest["kind"], manifest["metadata"]["namespace"])
        query = {"fieldManager": FIELD_MANAGER}
        return await self._write("create", manifest["kind"], "POST", path, query=query, body=manifest)

    async def update(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Replace an object, if it is still of the version that `manifest` says."""
        metadata = manifest["metadata"]
        path = path_of(manifest["kind"], metadata["namespace"], metadata["name"])
        return await self._write("update", manifest["kind"], "PUT", path, body=manifest)

    async def delete(self, kind: str, namespace: str, name: str, *, uid: str = "", version: str = "") -> None:
        """Delete an object and what it owns; one that is gone, or another now, is left.

        What a JobSet owns goes first: its name is free when its pods are gone.

        Args:
            kind: Of the object.
            namespace: Of the object.
            name: Of the object.
            uid: The very object, not one of the same name made later; "" for whichever is there.
            version: Its resource version; "" for any.
        """
        options: dict[str, Any] = {"propagationPolicy": "Foreground" if kind == "JobSet" else "Background"}
        if conditions := {k: v for k, v in (("uid", uid), ("resourceVersion", version)) if v}:
            options["preconditions"] = conditions
        try:
            await self._write("delete", kind, "DELETE", path_of(kind, namespace, name), body=options)
        except ApiError as error:
            if not (error.missing or error.conflict):
                raise

    async def log(self, namespace: str, pod: str, *, tail_lines: int) -> str:
        """Return the end of a pod's log; "" where there is none (yet, or any more), or its node does not answer."""
        path = path_of("Pod", namespace, pod, "log")
        query = {"tailLines": str(tail_lines), "limitBytes": str(256 << 10)}
        try:
            return str(await self._call("GET", path, query=query, text=True, seconds=_LOG_SECONDS))
        except ApiError:
            return ""

    async def is_served(self, kind: str) -> bool:
        """Return whether the API server knows a kind."""
        prefix, plural = KINDS[kind]
        try:
            found = await self._call("GET", prefix)
        except ApiError as error:
            if error.missing:
                return False
            raise
        return any(resource["name"] == plural for resource in found["resources"])

    async def _write(self, verb: str, kind: str, method: str, path: str, **call: Any) -> dict[str, Any]:
        try:
            found: dict[str, Any] = await self._call(method, path, **call)
        except ApiError as error:
            self.metrics.wrote(kind, verb, str(error.status))
            raise
        self.metrics.wrote(kind, verb, "ok")
        return found

    async def _call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
        text: bool = False,
        seconds: float = _SECONDS,
    ) -> Any:
        import aiohttp

        data = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        headers = {**self._headers(), "Content-Type": content_type}
        timeout = aiohttp.ClientTimeout(total=seconds)
        try:
            async with self._session.request(
                method, path, params=query, data=data, headers=headers, timeout=timeout
            ) as answer:
                content = await answer.read()
                if answer.status >= _FIRST_ERROR:
                    raise _refusal(method, path, answer, content)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ApiError(
                f"The API server does not answer {method} {path}: {type(error).__name__}: {error}. It is tried again."
            ) from error
        return content.decode("utf-8", "replace") if text else json.loads(content)

    async def _lines(self, path: str, query: Mapping[str, str]) -> AsyncIterator[bytes]:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_SECONDS, sock_read=_SILENT_SECONDS)
        try:
            async with self._session.get(
                path, params=query, headers=self._headers(), timeout=timeout
            ) as answer:
                if answer.status >= _FIRST_ERROR:
                    raise _refusal("GET", path, answer, await answer.read())
                rest = b""
                async for chunk in answer.content.iter_any():  # readline() refuses lines over 128 KiB
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        yield line
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ApiError(f"The watch of {path} broke: {type(error).__name__}: {error}.") from error

    def _headers(self) -> dict[str, str]:
        token = self.access.bearer()
        return {"Authorization": f"Bearer {token}"} if token else {}


def _refusal(method: str, path: str, answer: Any, content: bytes) -> ApiError:
    try:
        status = json.loads(content)
    except ValueError:
        status = {}
    message = status.get("message") or content[:300].decode("utf-8", "replace") or answer.reason
    after = answer.headers.get("Retry-After", "")
    return ApiError(
        f"{method} {path}: {message}",
        status=answer.status,
        reason=status.get("reason", ""),
        seconds=float(after) if after.isdecimal() else 0.0,
    )
