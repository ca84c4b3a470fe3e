"""What a process counts and measures, in one registry of its own: names are a public interface."""

from __future__ import annotations

import logging
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server

logger = logging.getLogger(__name__)


class Metrics:
    """The metrics of one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._served: tuple[WSGIServer, Thread] | None = None
        self.contexts = Counter(
            "longshift_contexts_restored",
            "Contexts restored at the start of a turn, by where they came from: local, hot, warm or cold.",
            ["tier"],
            registry=self.registry,
        )
        self.drift = Counter(
            "longshift_context_drift",
            "Copies of contexts that were not the fold of the log, by what was wrong; each was dropped and rebuilt.",
            ["reason"],
            registry=self.registry,
        )
        self.collected = Counter(
            "longshift_collected",
            "What the collector has removed because nothing refers to it: artifacts, blobs (their bytes, once for each tenant"
            " and content) and bytes.",
            ["what"],
            registry=self.registry,
        )
        self.restore_seconds = Histogram(
            "longshift_context_restore_seconds",
            "Time to restore a context.",
            ["tier"],
            registry=self.registry,
            buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10),
        )

    def serve(self, port: int, *, host: str) -> None:
        """Answer scrapes at ``host:port``, in a thread; port 0 takes one that is free, and the log says which.

        A port that is taken is logged and nothing more: work is worth more than its figures.
        """
        try:
            self._served = start_http_server(port, host, self.registry)
        except OSError as error:
            logger.warning("metrics cannot be served", extra={"host": host, "port": port, "reason": str(error)})
        else:
            logger.info("metrics are served", extra={"host": host, "port": self._served[0].server_port})

    def close(self) -> None:
        if self._served is not None:
            server, thread = self._served
            self._served = None
            server.shutdown()
            server.server_close()
            thread.join()
