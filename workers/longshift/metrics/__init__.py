"""What processes count and measure: names and labels are a public interface (``docs/reference/metrics.md``).

families    what a metric is, and the maker of metrics that remembers what it made
worker      of a worker; its turns are in ``turns``
api         of an API process
fleet       of the whole fleet, read from Postgres by the exporter
server      the port at which a process is asked for its metrics and its health
"""

from longshift.metrics.api import ApiMetrics
from longshift.metrics.families import Family, Metrics
from longshift.metrics.fleet import Figures, FleetMetrics
from longshift.metrics.server import Page, Server
from longshift.metrics.turns import TurnMetrics
from longshift.metrics.worker import WorkerMetrics

__all__ = [
    "ApiMetrics",
    "Family",
    "Figures",
    "FleetMetrics",
    "Metrics",
    "Page",
    "Server",
    "TurnMetrics",
    "WorkerMetrics",
]
