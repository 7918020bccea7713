"""A small API server on the loopback for tests: objects in memory, watches, preconditions, and a record of all calls.

It checks no schema and runs no controller. What it does, it does as Kubernetes: resource versions, 404 and 409,
bodies of refusals, lists without the items' kinds.
"""

import asyncio
import contextlib
import itertools
import json
import threading
import uuid
from dataclasses import dataclass, field

from aiohttp import web

KINDS = {
    "transferjobs": "TransferJob",
    "transferschedules": "TransferSchedule",
    "jobsets": "JobSet",
    "jobs": "Job",
    "leases": "Lease",
    "configmaps": "ConfigMap",
    "pods": "Pod",
    "events": "Event",
    "namespaces": "Namespace",
    "customresourcedefinitions": "CustomResourceDefinition",
}
BUILT_IN = ("jobs", "configmaps", "pods", "events", "leases")
NOW = "2026-11-28T12:00:00Z"


@dataclass(frozen=True)
class Place:
    group: str
    version: str
    plural: str
    namespace: str = ""
    name: str = ""
    subresource: str = ""

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version


def parsed(path: str) -> Place:
    parts = path.strip("/").split("/")
    group, version, rest = ("", parts[1], parts[2:]) if parts[0] == "api" else (parts[1], parts[2], parts[3:])
    namespace = ""
    if rest[:1] == ["namespaces"]:
        namespace, rest = rest[1], rest[2:]
    plural, name, subresource = [*rest, "", "", ""][:3]
    return Place(group, version, plural, namespace, name, subresource)


def refusal(status: int, reason: str, message: str) -> web.Response:
    body = {"kind": "Status", "status": "Failure", "message": message, "reason": reason, "code": status}
    return web.json_response(body, status=status)


@dataclass
class Standin:
    """The server; use `running()`.

    Attributes:
        objects: By plural, namespace and name.
        calls: Verb, group, resource (with its subresource) and namespace of every call.
        refuse: By verb and resource: status, reason and message of what is refused.
        logs: By pod: its log.
        undeclared: Fields of a status that the definitions lack.
    """

    objects: dict = field(default_factory=dict)
    calls: list = field(default_factory=list)
    refuse: dict = field(default_factory=dict)
    logs: dict = field(default_factory=dict)
    undeclared: set = field(default_factory=set)
    url: str = ""

    def __post_init__(self) -> None:
        self._versions = itertools.count(100)
        self._changes: list = []
        self._watching: set = set()
        self._changed = threading.Condition()
        self._loop = None

    # ---- for tests

    @contextlib.contextmanager
    def running(self):
        started, self._loop = threading.Event(), asyncio.new_event_loop()
        thread = threading.Thread(target=self._serve, args=(started,))
        thread.start()
        started.wait()
        try:
            yield self
        finally:
            self._loop.call_soon_threadsafe(self._ended.set)
            thread.join()

    def put(self, plural: str, found: dict) -> dict:
        """Make or change an object from outside, as another client would."""
        with self._changed:
            return self._store(plural, found)

    def remove(self, plural: str, namespace: str, name: str) -> None:
        with self._changed:
            self._remove((plural, namespace, name))

    def get(self, plural: str, namespace: str, name: str) -> dict | None:
        with self._changed:
            found = self.objects.get((plural, namespace, name))
            return json.loads(json.dumps(found)) if found else None

    def of(self, plural: str) -> list[dict]:
        with self._changed:
            return [json.loads(json.dumps(o)) for (kind, *_), o in self.objects.items() if kind == plural]

    def wait(self, found, seconds: float = 20):
        """Return what `found()` returns as soon as that is true; it is asked after every change."""
        with self._changed:
            result = self._changed.wait_for(found, timeout=seconds)
        assert result, "not within the time"
        return result

    def writes(self) -> list[tuple]:
        return [call for call in self.calls if call[0] not in ("get", "list", "watch")]

    # ---- the server

    def _serve(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._run(started))
        finally:
            self._loop.close()

    async def _run(self, started: threading.Event) -> None:
        self._ended = asyncio.Event()
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        started.set()
        await self._ended.wait()
        for queue in self._watching:
            queue.put_nowait(None)
        await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if (request.path.count("/") < 4 and not request.path.startswith("/api/v1/")) or request.path in (
            "/api/v1",
        ):
            return self._discovery(request.path)
        place = parsed(request.path)
        verb = self._verb(request, place)
        resource = "/".join(filter(None, (place.plural, place.subresource)))
        with self._changed:
            self.calls.append((verb, place.group, resource, place.namespace))
            self._changed.notify_all()
        if refused := self.refuse.get((verb, resource)):
            return refusal(*refused)
        if verb == "watch":
            return await self._watch(request, place)
        body = await request.json() if request.can_read_body else None
        with self._changed:
            return getattr(self, f"_{verb}")(request, place, body)

    def _verb(self, request: web.Request, place: Place) -> str:
        if request.method == "GET" and not place.name:
            return "watch" if request.query.get("watch") == "true" else "list"
        return {"GET": "get", "POST": "create", "PATCH": "patch", "PUT": "update", "DELETE": "delete"}[
            request.method
        ]

    def _discovery(self, path: str) -> web.Response:
        groups = {
            "kubegraft.dev": ("v1alpha1", ("transferjobs", "transferschedules")),
            "jobset.x-k8s.io": ("v1alpha2", ("jobsets",)),
            "batch": ("v1", ("jobs",)),
            "coordination.k8s.io": ("v1", ("leases",)),
            "apiextensions.k8s.io": ("v1", ("customresourcedefinitions",)),  # kopf waits to find it
        }
        if path == "/version":
            return web.json_response({"major": "1", "minor": "34"})
        if path == "/apis":
            found = [
                {
                    "name": g,
                    "versions": [{"groupVersion": f"{g}/{v}", "version": v}],
                    "preferredVersion": {"groupVersion": f"{g}/{v}", "version": v},
                }
                for g, (v, _) in groups.items()
            ]
            return web.json_response({"kind": "APIGroupList", "groups": found})
        if path == "/api":
            return web.json_response({"kind": "APIVersions", "versions": ["v1"]})
        if path == "/api/v1":
            plurals = ("namespaces", "configmaps", "pods", "events")
        else:
            _, _, group, _ = path.split("/")
            if group not in groups:
                return refusal(404, "NotFound", "no such group")
            plurals = groups[group][1]
        resources = [
            {
                "name": plural,
                "singularName": KINDS[plural].lower(),
                "kind": KINDS[plural],
                "namespaced": True,
                "verbs": ["list", "watch", "get"],
            }
            for plural in plurals
        ]
        return web.json_response({"kind": "APIResourceList", "resources": resources})

    # ---- verbs

    def _get(self, request, place, _):
        if place.subresource == "log":
            if place.name in self.logs:
                return web.Response(text=self.logs[place.name])
            return refusal(404, "NotFound", "no log")
        found = self.objects.get((place.plural, place.namespace, place.name))
        return web.json_response(found) if found else self._missing(place)

    def _list(self, request, place, _):
        items = [o for o in self._all(place) if selected(o, request.query)]
        if place.plural in BUILT_IN:
            items = [{k: v for k, v in o.items() if k not in ("kind", "apiVersion")} for o in items]
        body = {
            "apiVersion": place.api_version,
            "kind": f"{KINDS[place.plural]}List",
            "metadata": {"resourceVersion": str(next(self._versions))},
            "items": items,
        }
        return web.json_response(body)

    def _create(self, request, place, body):
        key = (place.plural, place.namespace, body["metadata"]["name"])
        if key in self.objects:
            return refusal(409, "AlreadyExists", f"{place.plural} {key[2]!r} already exists")
        body["metadata"].setdefault("namespace", place.namespace)
        return web.json_response(self._store(place.plural, body), status=201)

    def _patch(self, request, place, body):
        key = (place.plural, place.namespace, place.name)
        known = self.objects.get(key)
        applied = "apply" in request.content_type
        if known is None and (place.subresource or not applied or body["metadata"].get("uid")):
            return self._missing(place) if not body["metadata"].get("uid") else self._conflict(place)
        wanted = body.get("metadata", {})
        if known and any(
            wanted.get(name) not in (None, known["metadata"][name]) for name in ("uid", "resourceVersion")
        ):
            return self._conflict(place)
        if place.subresource == "status":
            for name in self.undeclared & set(body["status"]):
                message = f"failed to create typed patch object: .status.{name}: field not declared in schema"
                return refusal(500, "InternalError", message)
            changed = {**known, "status": body["status"]}
        elif known:
            changed = {**known, **{k: v for k, v in body.items() if k not in ("metadata", "status")}}
            if not applied:
                changed["spec"] = {**known.get("spec", {}), **body.get("spec", {})}
            changed["metadata"] = {**known["metadata"], **wanted}
        else:
            changed = body
        if known == changed:
            return web.json_response(known)
        return web.json_response(self._store(place.plural, changed))

    def _update(self, request, place, body):
        known = self.objects.get((place.plural, place.namespace, place.name))
        if known is None:
            return self._missing(place)
        if body["metadata"].get("resourceVersion") != known["metadata"]["resourceVersion"]:
            return self._conflict(place)
        return web.json_response(self._store(place.plural, body))

    def _delete(self, request, place, body):
        key = (place.plural, place.namespace, place.name)
        if key not in self.objects:
            return self._missing(place)
        known = self.objects[key]["metadata"]
        if any(known[name] != value for name, value in (body or {}).get("preconditions", {}).items()):
            return self._conflict(place)
        self._remove(key)
        return web.json_response({"kind": "Status", "status": "Success"})

    async def _watch(self, request, place):
        queue: asyncio.Queue = asyncio.Queue()
        response = web.StreamResponse()
        response.content_type = "application/json"
        await response.prepare(request)
        since = int(request.query.get("resourceVersion") or 0)
        with self._changed:
            missed = [
                change for change in self._changes if int(change[1]["metadata"]["resourceVersion"]) > since
            ]
            self._watching.add(queue)
        try:
            for change in missed:
                await self._write(response, change, place, request)
            while (change := await queue.get()) is not None:
                await self._write(response, change, place, request)
        except ConnectionResetError:
            pass
        finally:
            self._watching.discard(queue)
        return response

    async def _write(self, response, change, place, request) -> None:
        kind, found, plural = change
        if plural != place.plural or place.namespace not in ("", found["metadata"].get("namespace")):
            return
        if selected(found, request.query):
            line = json.dumps({"type": kind, "object": found}) + "\n"
            await response.write(line.encode())

    # ---- the store

    def _all(self, place):
        return [
            o
            for (plural, namespace, _), o in self.objects.items()
            if plural == place.plural and place.namespace in ("", namespace)
        ]

    def _store(self, plural: str, found: dict) -> dict:
        metadata = found["metadata"]
        key = (plural, metadata.get("namespace", ""), metadata["name"])
        known = self.objects.get(key)
        stored = json.loads(json.dumps(found))
        stored.setdefault("kind", KINDS[plural])
        stored.setdefault("apiVersion", "v1")
        before = known["metadata"] if known else {}
        stored["metadata"] = {
            "uid": str(uuid.uuid4()),
            "creationTimestamp": NOW,
            "generation": 1,
            **before,
            **stored["metadata"],
            "resourceVersion": str(next(self._versions)),
        }
        self.objects[key] = stored
        self._tell("MODIFIED" if known else "ADDED", stored, plural)
        return stored

    def _remove(self, key: tuple) -> None:
        found = self.objects.pop(key)
        found["metadata"]["resourceVersion"] = str(next(self._versions))
        self._tell("DELETED", found, key[0])

    def _tell(self, kind: str, found: dict, plural: str) -> None:
        change = (kind, json.loads(json.dumps(found)), plural)
        self._changes.append(change)
        for queue in list(self._watching):
            self._loop.call_soon_threadsafe(queue.put_nowait, change)
        self._changed.notify_all()

    def _missing(self, place) -> web.Response:
        return refusal(404, "NotFound", f"{place.plural} {place.name!r} not found")

    def _conflict(self, place) -> web.Response:
        return refusal(409, "Conflict", f"{place.plural} {place.name!r}: the object has been modified")


def selected(found: dict, query) -> bool:
    labels = found["metadata"].get("labels") or {}
    for term in filter(None, query.get("labelSelector", "").split(",")):
        name, _, value = term.lstrip("!").partition("=")
        if term.startswith("!") == (name in labels) or (value and labels.get(name) != value):
            return False
    for term in filter(None, query.get("fieldSelector", "").split(",")):
        path, _, value = term.partition("=")
        inner = found
        for part in path.split("."):
            inner = inner.get(part, {})
        if inner != value:
            return False
    return True
