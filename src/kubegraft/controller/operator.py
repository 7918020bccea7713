"""The operator as a process: takes the lease, watches, works off the queue, and ends what it began."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import socket
import traceback
from collections.abc import AsyncIterator, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from kubegraft.controller.access import Access
from kubegraft.controller.actions import Action, Apply, Event, PatchStatus
from kubegraft.controller.api import Api, ApiError
from kubegraft.controller.cluster import Cluster, Key
from kubegraft.controller.leader import Leader
from kubegraft.controller.metrics import Metrics
from kubegraft.controller.observed import Observed, ObservedSchedule
from kubegraft.controller.probes import serving
from kubegraft.controller.reconcile import reconcile
from kubegraft.controller.settings import Settings
from kubegraft.controller.work_queue import WorkQueue
from kubegraft.errors import ClusterError
from kubegraft.reporting.events import log_event

_WORKERS: Final = 24  # they wait for the API server nearly all the time
_END_SECONDS: Final = 20.0  # for reconciles that run when the process is asked to end; the pod has 30
_STUCK_SECONDS: Final = 180.0  # a call to the API server ends after 30
_LOOK_AGAIN_SECONDS: Final = 600.0
_NEEDED: Final = ("TransferJob", "TransferSchedule", "JobSet")
_MISSING_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How an operator runs.

    Attributes:
        access: The API server.
        settings: What jobs get that say nothing.
        metrics_port: TCP port of metrics and probes.
        identity: Name of this replica.
        lease_namespace: Where the lease is; "" for the access's namespace.
        lease_seconds: For how long a replica that is gone keeps others waiting.
    """

    access: Access
    settings: Settings
    metrics_port: int = 8080
    identity: str = field(default_factory=socket.gethostname)
    lease_namespace: str = ""
    lease_seconds: float = 15.0


class Operator:
    """Reconciles what is in its queue.

    Attributes:
        cluster: What it sees.
        queue: What it has to look at.
    """

    def __init__(self, api: Api, settings: Settings, metrics: Metrics) -> None:
        self.queue: WorkQueue[Key] = WorkQueue(observe_depth=metrics.depth, is_urgent=self._is_new)
        self.cluster = Cluster(api, namespace=settings.namespace, notify=self.queue.add)
        self._settings, self._metrics = settings, metrics
        metrics.count_jobs(self.cluster.count_jobs)

    def _is_new(self, key: Key) -> bool:
        return self.cluster.is_new(key)

    async def work(self, key: Key) -> None:
        """Reconcile an object; what fails is tried again, each time later."""
        with self._metrics.reconcile(key.kind) as measured:
            try:
                measured["outcome"] = await self._work(key)
            except ApiError as error:
                if error.missing:  # deleted meanwhile, which a watch is about to tell
                    measured["outcome"] = "gone"
                self._again(key, str(error), error.seconds, quiet=error.missing or error.conflict)
            except Exception:  # a bug must not stop the work on other jobs
                self._again(key, traceback.format_exc(limit=-4), 0.0)

    async def _work(self, key: Key) -> str:
        observed = await self.cluster.observe(key)
        if observed is None:
            self.queue.forget(key)
            return "gone"
        try:
            seconds = await self.cluster.act(key, observed, self._wanted(observed))
        except ApiError as error:
            if not error.refused or error.missing:
                raise
            await self._say_refused(key)
            self._again(key, str(error), error.seconds)
            return "refused"
        self.queue.forget(key)
        if seconds is not None:
            self.queue.add_after(key, seconds)
        return "ok"

    async def _say_refused(self, key: Key) -> None:
        """Let the object's conditions say what the API server refused; make nothing."""
        observed = await self.cluster.observe(key)
        if observed is None:
            return
        wanted = [one for one in self._wanted(observed) if isinstance(one, PatchStatus | Event | Apply)]
        if isinstance(
            observed, ObservedSchedule
        ):  # after its first object it tells of a job that was not made
            wanted = list(itertools.takewhile(lambda one: not isinstance(one, Apply), wanted))
        words = [one for one in wanted if not isinstance(one, Apply)]
        await self.cluster.act(key, observed, words)

    def _wanted(self, observed: Observed | ObservedSchedule) -> Iterable[Action]:
        if isinstance(observed, ObservedSchedule):
            from kubegraft.controller.schedule import reconcile_schedule

            return reconcile_schedule(observed, self._settings)
        return reconcile(observed, self._settings)

    def _again(self, key: Key, why: str, at_least: float, *, quiet: bool = False) -> None:
        seconds = self.queue.retry(key, at_least)
        if not quiet:
            about = f"{key.kind}/{key.namespace}/{key.name}"
            log_event("operator", "retrying", about=about, seconds=round(seconds, 1), text=why)


async def run(options: Options) -> None:
    """Run until SIGTERM or SIGINT.

    Raises:
        ClusterError: If the lease was lost, or a watch ended for good: let the process be started anew.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    metrics = Metrics()
    async with Api(options.access, metrics) as api:
        operator = Operator(api, options.settings, metrics)
        alive = _Alive(operator.queue)
        async with serving(options.metrics_port, metrics, healthy=alive.healthy, ready=alive.ready) as port:
            log_event("operator", "started", port=port, namespace=options.settings.namespace or "all")
            await _until(stop, _lead(api, operator, options, metrics, alive, stop), alive)
    log_event("operator", "ended")


async def _lead(
    api: Api, operator: Operator, options: Options, metrics: Metrics, alive: _Alive, stop: asyncio.Event
) -> None:
    alive.up = (
        True  # a standby is ready: else a roll-out would wait for the lease of the pod that it replaces
    )
    await _needed(api)
    async with _leading(api, options, metrics) as kept:
        work = asyncio.create_task(_work(operator, options, alive, stop))
        done, _ = await asyncio.wait({work, kept}, return_when=asyncio.FIRST_COMPLETED)
        if work not in done:
            work.cancel()  # another replica leads: not one more write
            await asyncio.gather(work, return_exceptions=True)
            raise ClusterError(
                "The lease was lost: the API server did not answer in time, or somebody took it."
            )
        await work


async def _needed(api: Api) -> None:
    """Return when the API server serves all that the operator needs; say what is missing."""
    said = ""
    while True:
        missing = [kind for kind in _NEEDED if not await _is_served(api, kind)]
        if not missing:
            return
        if said != (said := ", ".join(missing)):
            log_event(
                "operator",
                "warning",
                text=f"The cluster has no {said}. Apply manifests/crds, and install JobSet 0.8 or newer.",
            )
        await asyncio.sleep(_MISSING_SECONDS)


async def _is_served(api: Api, kind: str) -> bool:
    try:
        return await api.is_served(kind)
    except ApiError as error:
        log_event("operator", "warning", text=str(error))
        return False


@contextlib.asynccontextmanager
async def _leading(api: Api, options: Options, metrics: Metrics) -> AsyncIterator[asyncio.Task[None]]:
    """Hold the lease within the block; yield a task that ends if it is lost."""
    leader = Leader(
        api=api,
        namespace=options.lease_namespace or options.access.namespace,
        identity=options.identity,
        seconds=options.lease_seconds,
    )
    await leader.acquire()
    metrics.leading(True)
    kept = asyncio.create_task(leader.keep())
    try:
        yield kept
    finally:
        kept.cancel()
        await asyncio.gather(kept, return_exceptions=True)
        metrics.leading(False)
        await leader.give_back()


async def _work(operator: Operator, options: Options, alive: _Alive, stop: asyncio.Event) -> None:
    """Watch and reconcile until asked to stop, then end the reconciles that run."""
    from kubegraft.controller.handlers import watch

    cluster, queue = operator.cluster, operator.queue
    watches = [asyncio.create_task(one.run()) for one in cluster.watches]
    # What people wrote is looked at when what was made for it is known.
    for one in cluster.watches:
        await _first(one.ready.wait(), watches)
    watches.append(asyncio.create_task(watch(cluster.take, options.access, options.settings.namespace)))
    watches.append(asyncio.create_task(_look_again(cluster)))
    workers = [asyncio.create_task(queue.work(operator.work)) for _ in range(_WORKERS)]
    alive.working = True
    try:
        await _first(stop.wait(), [*watches, *workers])
    finally:
        alive.working = False
        queue.close()
        await asyncio.wait(workers, timeout=_END_SECONDS)
        for task in (*watches, *workers):
            task.cancel()
        await asyncio.gather(*watches, *workers, return_exceptions=True)


async def _look_again(cluster: Cluster) -> None:
    while True:
        await asyncio.sleep(_LOOK_AGAIN_SECONDS)
        try:
            await cluster.look_again()
        except ApiError as error:
            log_event("operator", "warning", text=str(error))


async def _first(wanted: Coroutine[Any, Any, object], endless: Iterable[asyncio.Task[None]]) -> None:
    """Wait for one thing; raise what ended one of the tasks that should not end."""
    waiting = asyncio.ensure_future(wanted)
    done, _ = await asyncio.wait({waiting, *endless}, return_when=asyncio.FIRST_COMPLETED)
    if waiting in done:
        return
    waiting.cancel()
    for task in done:
        task.result()
    raise ClusterError("A watch ended, which none should. It is the operator's fault: start it anew.")


async def _until(stop: asyncio.Event, work: Coroutine[Any, Any, None], alive: _Alive) -> None:
    """Run until it ends by itself; before it leads, a wish to stop cancels it."""
    task = asyncio.ensure_future(work)
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if not task.done() and alive.working:
        await asyncio.wait({task}, timeout=_END_SECONDS + 5)
    for one in (task, stopped):
        one.cancel()
    results = await asyncio.gather(task, stopped, return_exceptions=True)
    if isinstance(results[0], BaseException) and not isinstance(results[0], asyncio.CancelledError):
        raise results[0]


class _Alive:
    """What the probes say.

    Attributes:
        up: Whether the process has begun.
        working: Whether it leads and works.
    """

    def __init__(self, queue: WorkQueue[Key]) -> None:
        self.up = self.working = False
        self._queue = queue

    def healthy(self) -> str:
        seconds = self._queue.longest_work_seconds()
        return f"a reconcile has run for {seconds:.0f} s" if seconds > _STUCK_SECONDS else ""

    def ready(self) -> str:
        return "" if self.up else "starting"
