"""The port of a process at which it is asked for its metrics and its health; in threads, so that a stalled event loop is seen.

/metrics            the metrics, in the format of Prometheus
/livez, /readyz     and other pages of the process: JSON, and a status code that says it all
"""

from __future__ import annotations

import json
import logging
import socket
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from socketserver import TCPServer
from threading import Thread
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from longshift.metrics.families import Metrics

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

logger = logging.getLogger(__name__)

PATIENCE = 10
"""Seconds for a request to come: a connection that says nothing keeps a thread."""
CLOSES = 0.1
"""Seconds within which a server that is closed ends."""
REASONS = {
    200: "OK",
    404: "Not Found",
    405: "Method Not Allowed",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


@dataclass(frozen=True, slots=True)
class Page:
    """An answer: HTTP's status code, and a JSON object."""

    status: int
    body: Mapping[str, Any] = field(default_factory=dict)


class _Handler(WSGIRequestHandler):
    timeout = PATIENCE

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is http.server's
        """Probes come every few seconds."""


class _Server(ThreadingWSGIServer):
    request_queue_size = 1024
    """Connections that wait to be accepted. Of a burst, socketserver's own 5 would leave the others waiting for many seconds."""

    def server_bind(self) -> None:
        """Without http.server's look-up of this machine's name: it asks DNS, and whoever starts would wait for that."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]  # of an internet address
        self.setup_environ()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that said nothing in time, or went away, is none of our errors; by default it is a traceback on stderr."""
        logger.debug("a connection failed", extra={"client": str(client_address), "reason": repr(sys.exception())})


class _Server6(_Server):
    address_family = socket.AF_INET6


class Server:
    """The metrics and pages of one process at one port."""

    def __init__(self, metrics: Metrics, pages: Mapping[str, Callable[[], Page]] | None = None) -> None:
        """``pages`` by path; they are asked in threads."""
        self._metrics = make_wsgi_app(metrics.registry)
        self._pages = dict(pages or {})
        self._served: tuple[WSGIServer, Thread] | None = None

    def listen(self, port: int, *, host: str) -> int:
        """Answer at ``host:port``; 0 takes a port that is free, and the log says which. Returns it.

        Raises:
            OSError: the port is taken, or the address is not one of this machine.
        """
        kind = _Server6 if ":" in host else _Server
        server = make_server(host, port, self._answer, server_class=kind, handler_class=_Handler)
        thread = Thread(target=server.serve_forever, args=(CLOSES,), name="metrics", daemon=True)
        thread.start()
        self._served = server, thread
        logger.info("metrics are served", extra={"host": host, "port": server.server_port})
        return server.server_port

    def try_listen(self, port: int, *, host: str) -> None:
        """The same; a port that is taken is logged and nothing more: work is worth more than its figures."""
        try:
            self.listen(port, host=host)
        except OSError as error:
            logger.warning("metrics cannot be served", extra={"host": host, "port": port, "reason": str(error)})

    def close(self) -> None:
        """Stop answering; blocking."""
        if self._served is not None:
            server, thread = self._served
            self._served = None
            server.shutdown()
            server.server_close()
            thread.join()

    def _answer(self, environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            answer: Iterable[bytes] = self._metrics(environ, start)
            return answer
        page = self._page(path, method=environ["REQUEST_METHOD"])
        body = json.dumps(page.body).encode() + b"\n"
        headers = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
        ]
        start(f"{page.status} {REASONS[page.status]}", headers)
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else body]

    def _page(self, path: str, *, method: str) -> Page:
        if path not in self._pages:
            return Page(
                404, {"detail": f"there is no {path[:80]!r}: ask for /metrics, {', '.join(sorted(self._pages))}"}
            )
        if method not in ("GET", "HEAD"):
            return Page(405, {"detail": "use GET"})
        try:
            return self._pages[path]()
        except Exception:  # a probe that got no answer would say nothing
            logger.exception("a probe failed", extra={"path": path})
            return Page(500, {"detail": "the probe failed: the log of this process says why"})
