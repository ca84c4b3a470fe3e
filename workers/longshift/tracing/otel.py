"""Spans of the OpenTelemetry SDK, sent in the background. Imported only where spans are made: it is an extra."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from threading import Thread
from types import TracebackType
from typing import Final, Self
from uuid import UUID

from opentelemetry import trace
from opentelemetry.context import Context, attach, detach
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from longshift import telemetry
from longshift.clock import SYSTEM, Clock
from longshift.model import new_id
from longshift.tracing.names import ERROR_TYPE
from longshift.tracing.spans import NOTHING, Attributes, Kind, Span, Traces
from longshift.version import version

LAST_SPANS = 2.0
"""Seconds that the last spans of a process get to be sent; a collector that is away keeps nobody from ending."""
COMPLAIN_EVERY = 60.0
"""Seconds between two lines that say that the collector does not answer."""
_SENDER: Final = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
_QUEUE: Final = "opentelemetry.sdk._shared_internal"
_KINDS: Final = {kind: SpanKind[kind.name] for kind in Kind}


def sending(*, service: str) -> Traces:
    """To the collector that OpenTelemetry's variables name."""
    exporter = OTLPSpanExporter()
    return OtelTraces(BatchSpanProcessor(exporter), service=service, exporter=exporter)


def giving(exporter: SpanExporter, *, service: str) -> Traces:
    """To ``exporter``, one by one."""
    return OtelTraces(SimpleSpanProcessor(exporter), service=service, exporter=exporter)


class Recorded(Span):
    """A span of the SDK, or what it has for one that is not sampled: that is followed, too, and sent by nobody."""

    __slots__ = ("_before", "_line", "_span")

    def __init__(self, span: trace.Span) -> None:
        self._span = span
        self._before: Token[Context] | None = None
        self._line: Token[telemetry.Fields] | None = None

    @property
    def traceparent(self) -> str:
        here = self._span.get_span_context()
        return f"00-{here.trace_id:032x}-{here.span_id:016x}-{here.trace_flags:02x}"

    @property
    def is_recorded(self) -> bool:
        return self._span.is_recording()

    def __enter__(self) -> Self:
        here = self._span.get_span_context()
        self._before = attach(trace.set_span_in_context(self._span))
        self._line = telemetry.add({"trace_id": f"{here.trace_id:032x}", "span_id": f"{here.span_id:016x}"})
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None:
            self.fail(kind.__name__)
        if self._line is not None:
            telemetry.remove(self._line)
        if self._before is not None:
            detach(self._before)
        self._span.end()

    def end(self, at: float) -> None:
        self._span.end(_nanoseconds(at))

    def set(self, attributes: Attributes) -> None:
        self._span.set_attributes(_said(attributes))

    def link(self, traceparent: str) -> None:
        self._span.add_link(trace.get_current_span(_below(traceparent)).get_span_context())

    def rename(self, name: str) -> None:
        self._span.update_name(name)

    def fail(self, error_type: str) -> None:
        self._span.set_status(StatusCode.ERROR)
        self._span.set_attribute(ERROR_TYPE, error_type)


class Ids(RandomIdGenerator):
    """Random ids, and traces whose id is given: attempts at a turn are one trace, also if nobody has begun one for it."""

    def __init__(self) -> None:
        self._given: ContextVar[UUID | None] = ContextVar("longshift_trace", default=None)

    @contextmanager
    def of(self, trace: UUID | None) -> Iterator[None]:
        if trace is None:
            yield
            return
        token = self._given.set(trace)
        try:
            yield
        finally:
            self._given.reset(token)

    def generate_trace_id(self) -> int:
        given = self._given.get()
        if given is None:
            return super().generate_trace_id()
        # Samplers by ratio compare the lower 64 bits. The first two of these are the same in every UUID: by them, a ratio of a
        # half would sample none at all.
        return given.int ^ (given.int & 0b11) << 62


class OtelTraces(Traces):
    """The spans of one process, through a provider of its own."""

    is_on = True

    def __init__(self, processor: SpanProcessor, *, service: str, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._ids = Ids()
        self._provider = TracerProvider(resource=_resource(service), id_generator=self._ids, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("longshift", version())
        self._complaints = Seldom()
        logging.getLogger(_SENDER).addFilter(self._complaints)
        # it would have a line for each span that finds the queue full, and that takes longer than the span
        logging.getLogger(_QUEUE).setLevel(logging.ERROR)

    def share(self) -> None:
        if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
            trace.set_tracer_provider(self._provider)

    def span(
        self,
        name: str,
        *,
        parent: str | None = None,
        trace: UUID | None = None,
        kind: Kind = Kind.INTERNAL,
        begun: float | None = None,
        attributes: Attributes = NOTHING,
    ) -> Span:
        start = None if begun is None else _nanoseconds(begun)
        with self._ids.of(trace):
            return Recorded(
                self._tracer.start_span(name, _below(parent), _KINDS[kind], _said(attributes), start_time=start)
            )

    def close(self) -> None:
        closing = Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        closing.start()
        closing.join(LAST_SPANS)
        if closing.is_alive():
            self._exporter.shutdown()  # ends its tries
            closing.join(LAST_SPANS / 10)  # not longer: a request that is under way goes on
        if not closing.is_alive():  # else it may complain yet
            logging.getLogger(_SENDER).removeFilter(self._complaints)


class Seldom(logging.Filter):
    """One line of a logger in a while: an outage has one beginning, not one for each try."""

    def __init__(self, *, clock: Clock = SYSTEM) -> None:
        super().__init__()
        self._clock = clock
        self._next = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        now = self._clock.monotonic()
        if now < self._next:
            return False
        self._next = now + COMPLAIN_EVERY
        return True


def _below(parent: str | None) -> Context | None:
    """The context of ``parent``; None: the current one. What is no traceparent is nobody's parent."""
    if parent is None:
        return None
    return TraceContextTextMapPropagator().extract({"traceparent": parent}, Context())


def _said(attributes: Attributes) -> dict[str, AttributeValue]:
    return {name: value for name, value in attributes.items() if value is not None}


def _resource(service: str) -> Resource:
    """Who we are; what the environment says of it comes first."""
    said = Resource.create({"service.instance.id": str(new_id()), "service.version": version()})
    if str(said.attributes.get("service.name", "unknown_service")).startswith("unknown_service"):
        said = said.merge(Resource({"service.name": service}))
    return said


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
