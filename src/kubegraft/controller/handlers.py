"""kopf watches TransferJobs and TransferSchedules; the only module that imports it.

Its handlers observe and nothing more: a change goes to `Cluster.take`, which queues the object. kopf's own ways to
keep progress (annotations, finalizers, events) are for handlers that act, so that it writes nothing to any object. It
runs in a thread and a loop of its own: when it ends it cancels every task of its loop, and in the main thread it would
take over the signals.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any, Final

import kopf

from kubegraft.controller.access import Access

_GROUP: Final = ("kubegraft.dev", "v1alpha1")
_PLURALS: Final = ("transferjobs", "transferschedules")
_PAGE: Final = 500
_END_SECONDS: Final = 1.0  # it only reads, so that nothing is lost with its thread
# Who kopf is to its peers, of whom there are none; it would ask for the user's name, and the image's has none.
_IDENTITY: Final = "kubegraft"
Take = Callable[[str | None, dict[str, Any]], None]


async def watch(take: Take, access: Access, namespace: str) -> None:
    """Tell `take` of all objects that there are, and of every change, until cancelled.

    Args:
        take: Called in this loop with the type of the change (None for what was there before) and the object.
        access: The API server.
        namespace: The only one to watch; "" for all.

    Raises:
        Exception: What ended kopf, which should not end.
    """
    loop, stop, ended = asyncio.get_running_loop(), threading.Event(), asyncio.Event()
    failures: list[BaseException] = []

    def take_here(change: str | None, found: dict[str, Any]) -> None:
        loop.call_soon_threadsafe(take, change, found)

    def work() -> None:
        try:
            asyncio.run(_operate(take_here, access, namespace, stop))
        except BaseException as error:  # raised in the other loop
            failures.append(error)
        if not loop.is_closed():
            loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=work, daemon=True, name="kopf").start()
    try:
        await ended.wait()
    finally:
        stop.set()
        await asyncio.wait([asyncio.ensure_future(ended.wait())], timeout=_END_SECONDS)
    if failures:
        raise failures[0]


async def _operate(take: Take, access: Access, namespace: str, stop: threading.Event) -> None:
    # It warns that a thread gets no signals, which is what is wanted.
    logging.getLogger("kopf").setLevel(logging.ERROR)
    await kopf.operator(
        registry=_registry(take, access),
        settings=_settings(),
        identity=_IDENTITY,  # type: ignore[arg-type]
        standalone=True,
        clusterwide=not namespace,
        namespaces=[namespace] if namespace else [],
        stop_flag=stop,
    )


def _settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True  # neither namespaces nor definitions come and go while this runs
    settings.watching.chunk_size = _PAGE
    settings.queueing.idle_timeout = 1.0
    settings.process.ultimate_exiting_timeout = None  # it would kill the process
    return settings


def _registry(take: Take, access: Access) -> kopf.OperatorRegistry:
    registry = kopf.OperatorRegistry()

    async def log_in(**_: Any) -> kopf.ConnectionInfo:
        return _connection(access)

    async def on_event(event: kopf.RawEvent, **_: Any) -> None:
        take(event["type"], dict(event["object"]))

    kopf.on.login(registry=registry)(log_in)
    for plural in _PLURALS:
        kopf.on.event(*_GROUP, plural, registry=registry, id=f"take-{plural}")(on_event)
    return registry


def _connection(access: Access) -> kopf.ConnectionInfo:
    return kopf.ConnectionInfo(
        server=access.server,
        ca_data=access.authority or None,
        token=access.bearer() or None,
        certificate_data=access.certificate or None,
        private_key_data=access.key or None,
        default_namespace=access.namespace,
    )
