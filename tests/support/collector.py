"""An OpenTelemetry collector for tests: an HTTP server on loopback that keeps the spans it is sent, and says which hang where."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode


@dataclass(frozen=True)
class Sent:
    """One span as a collector sees it; ids are hexadecimal, as in a traceparent."""

    name: str
    trace: str
    id: str
    parent: str  # '' for none
    attributes: dict[str, Any]
    failed: bool
    links: tuple[str, ...]  # traces
    service: str
    started: int  # nanoseconds
    ended: int
    told: str  # all that is in it


@dataclass
class Spans:
    """What has come."""

    found: list[Sent]

    def named(self, name: str, **attributes: Any) -> list[Sent]:
        """In their order of starting."""
        wanted = {key.replace("__", "."): value for key, value in attributes.items()}
        hits = [each for each in self.found if each.name == name and wanted.items() <= each.attributes.items()]
        return sorted(hits, key=lambda each: each.started)

    def one(self, name: str, **attributes: Any) -> Sent:
        hits = self.named(name, **attributes)
        assert len(hits) == 1, f"{len(hits)} spans are named {name!r}; there are {sorted(s.name for s in self.found)}"
        return hits[0]

    def below(self, span: Sent) -> list[str]:
        """Names of the spans right below, in their order of starting."""
        hits = [each for each in self.found if (each.trace, each.parent) == (span.trace, span.id)]
        return [each.name for each in sorted(hits, key=lambda each: each.started)]


@contextmanager
def collecting() -> Iterator[tuple[str, Spans]]:
    """The address for ``OTEL_EXPORTER_OTLP_ENDPOINT``, and the spans that come there."""
    spans = Spans([])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            spans.found.extend(_decoded(ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", spans
        server.shutdown()
        thread.join()


def spans_of(finished: Sequence[ReadableSpan]) -> Spans:
    """The same of what an in-memory exporter has."""
    return Spans([_read(each) for each in finished])


def _decoded(request: ExportTraceServiceRequest) -> Iterator[Sent]:
    for resource in request.resource_spans:
        service = _attributes(resource.resource.attributes)["service.name"]
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Sent(
                    name=span.name,
                    trace=span.trace_id.hex(),
                    id=span.span_id.hex(),
                    parent=span.parent_span_id.hex(),
                    attributes=_attributes(span.attributes),
                    failed=span.status.code == span.status.STATUS_CODE_ERROR,
                    links=tuple(link.trace_id.hex() for link in span.links),
                    service=service,
                    started=span.start_time_unix_nano,
                    ended=span.end_time_unix_nano,
                    told=f"{span} {resource.resource}",
                )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    if value.HasField("array_value"):
        return [_value(each) for each in value.array_value.values]
    kind = value.WhichOneof("value")
    return None if kind is None else getattr(value, kind)


def _read(span: ReadableSpan) -> Sent:
    assert span.context is not None
    assert span.start_time is not None
    assert span.end_time is not None
    return Sent(
        name=span.name,
        trace=f"{span.context.trace_id:032x}",
        id=f"{span.context.span_id:016x}",
        parent=f"{span.parent.span_id:016x}" if span.parent is not None else "",
        attributes={name: list(v) if isinstance(v, tuple) else v for name, v in (span.attributes or {}).items()},
        failed=span.status.status_code is StatusCode.ERROR,
        links=tuple(f"{link.context.trace_id:032x}" for link in span.links),
        service=str(span.resource.attributes["service.name"]),
        started=span.start_time,
        ended=span.end_time,
        told=span.to_json(),
    )
