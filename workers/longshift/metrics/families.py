"""What a metric is, and a maker of metrics that remembers what it has made: documents and dashboards are checked by it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from longshift.version import version

MOMENTS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
"""Seconds of what should take milliseconds."""
WAITS = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 120, 600, 3600)
"""Seconds of what waits for a free worker."""
WORK = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 120, 600, 1800, 7200)
"""Seconds of what agents and their steps do."""
DAYS = (0.1, 0.3, 1, 3, 10, 30, 120, 600, 1800, 7200, 86_400, 604_800)
"""Seconds of turns, which may wait for people."""
ROWS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Family:
    """One metric, with its name as queries use it (that of a counter ends in ``_total``)."""

    name: str
    kind: Kind
    text: str
    labels: tuple[str, ...] = ()

    @property
    def series(self) -> frozenset[str]:
        """Names that stand in a scrape."""
        if self.kind == "histogram":
            return frozenset(f"{self.name}_{part}" for part in ("bucket", "count", "sum"))
        return frozenset({self.name})


class Metrics:
    """The metrics of one process, in a registry of its own."""

    def __init__(self, *, revision: str | None = None) -> None:
        """``revision``: newest one of the schema that this software knows."""
        self.registry = CollectorRegistry()
        self.families: list[Family] = []
        ProcessCollector(registry=self.registry)
        info = self.gauge("longshift_build_info", "1; the labels say which software it is.", "version", "revision")
        info.labels(version=version(), revision=revision or "").set(1)
        self.loop_lag = self.histogram(
            "longshift_loop_lag_seconds",
            "How late the event loop came back to a task that slept, looked at four times a second.",
            buckets=MOMENTS,
        )

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        self.families.append(Family(name, "counter", text, labels))
        return Counter(name, text, labels, registry=self.registry)

    def gauge(self, name: str, text: str, *labels: str) -> Gauge:
        self.families.append(Family(name, "gauge", text, labels))
        return Gauge(name, text, labels, registry=self.registry)

    def histogram(self, name: str, text: str, *labels: str, buckets: Iterable[float]) -> Histogram:
        self.families.append(Family(name, "histogram", text, labels))
        return Histogram(name, text, labels, registry=self.registry, buckets=tuple(buckets))

    def read(self, name: str, text: str, *labels: str) -> Family:
        """A gauge whose values are read at each scrape, by a collector that is added with ``collect_by``."""
        family = Family(name, "gauge", text, labels)
        self.families.append(family)
        return family

    def collect_by(self, collector: Collector) -> None:
        self.registry.register(collector)


def values(family: Family, samples: Iterable[tuple[tuple[str, ...], float]]) -> GaugeMetricFamily:
    """What a collector gives for a family: a value for each tuple of label values."""
    made = GaugeMetricFamily(family.name, family.text, labels=family.labels)
    for labels, value in samples:
        made.add_metric(labels, value)
    return made
