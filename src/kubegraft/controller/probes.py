"""One port for Prometheus (`/metrics`) and for the kubelet (`/healthz`, `/readyz`)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from kubegraft.errors import EnvironmentFault

if TYPE_CHECKING:
    from kubegraft.controller.metrics import Metrics

Probe = Callable[[], str]


@asynccontextmanager
async def serving(port: int, metrics: Metrics, *, healthy: Probe, ready: Probe) -> AsyncIterator[int]:
    """Answer within the block; yield the port.

    Args:
        port: TCP port on all addresses; 0 for any.
        metrics: What is shown.
        healthy: Returns "" or what is wrong; asked by the kubelet, which restarts the pod.
        ready: Likewise, for readiness.

    Raises:
        EnvironmentFault: If the port is taken.
    """
    from aiohttp import web

    async def show(_: Any) -> Any:
        return web.Response(body=metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"})

    application = web.Application()
    application.router.add_get("/metrics", show)
    application.router.add_get("/healthz", _answering(healthy))
    application.router.add_get("/readyz", _answering(ready))
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, port=port)
        try:
            await site.start()
        except OSError as error:
            raise EnvironmentFault(
                f"`metrics_port` must be a free port. Received: metrics_port={port} ({error.strerror}). Give another."
            ) from error
        # With port 0, IPv4 and IPv6 get a port each; an address of IPv4 is a pair.
        yield min(runner.addresses, key=len)[1]
    finally:
        await runner.cleanup()


def _answering(probe: Probe) -> Callable[[Any], Any]:
    from aiohttp import web

    async def answer(_: Any) -> Any:
        wrong = probe()
        return web.Response(status=503 if wrong else 200, text=f"{wrong or 'ok'}\n")

    return answer
