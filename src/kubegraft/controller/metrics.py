"""What the operator counts, for Prometheus, and the port that shows it beside the probes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from kubegraft import __version__

_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """Counters of one operator; every metric is described by its `HELP` line.

    Attributes:
        registry: Of prometheus_client.
    """

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        build = Gauge("kubegraft_build_info", "Always 1.", ["version"], registry=self.registry)
        build.labels(__version__).set(1)
        self._reconciles = Counter(
            "kubegraft_operator_reconciles",
            "Reconciles by kind and outcome: ok, gone (the object was deleted), refused (by the API server), error.",
            ["kind", "outcome"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "kubegraft_operator_reconcile_seconds",
            "How long a reconcile took, calls to the API server included.",
            ["kind"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._writes = Counter(
            "kubegraft_operator_api_writes",
            "Writes to the API server by kind, verb and result: ok, or the HTTP status.",
            ["kind", "verb", "result"],
            registry=self.registry,
        )
        self._depth = Gauge(
            "kubegraft_operator_queue_depth", "Objects that wait for a worker.", registry=self.registry
        )
        self._leading = Gauge(
            "kubegraft_operator_leader", "1 where this replica holds the lease.", registry=self.registry
        )

    def wrote(self, kind: str, verb: str, result: str) -> None:
        """Count a write."""
        self._writes.labels(kind, verb, result).inc()

    def depth(self, depth: int) -> None:
        """Say how many objects wait."""
        self._depth.set(depth)

    def leading(self, leads: bool) -> None:
        """Say whether this replica leads."""
        self._leading.set(leads)

    @contextmanager
    def reconcile(self, kind: str) -> Iterator[dict[str, str]]:
        """Measure a reconcile; the block sets `outcome` of what it gets, `error` otherwise."""
        found, started = {"outcome": "error"}, time.perf_counter()
        try:
            yield found
        finally:
            self._seconds.labels(kind).observe(time.perf_counter() - started)
            self._reconciles.labels(kind, found["outcome"]).inc()

    def count_jobs(self, count: Callable[[], Mapping[str, int]]) -> None:
        """Show how many TransferJobs are in which condition, asked for when the metrics are read."""
        self.registry.register(_Jobs(count))

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        from prometheus_client import generate_latest

        return bytes(generate_latest(self.registry))


class _Jobs:
    """What `prometheus_client` calls a collector."""

    def __init__(self, count: Callable[[], Mapping[str, int]]) -> None:
        self._count = count

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily

        family = GaugeMetricFamily(
            "kubegraft_operator_jobs",
            "TransferJobs by the last of their conditions that is true; New for none.",
            labels=["condition"],
        )
        for condition, number in sorted(self._count().items()):
            family.add_metric([condition], number)
        yield family
