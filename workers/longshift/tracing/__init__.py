"""Traces: who did what, when, and below what, from the request to the call of a model. OpenTelemetry has its home here.

    POST /v1/turns                  the request; ``turns.traceparent`` is this span's own
      claim                         from the wake-up to the lease
      turn research                 one attempt; the next one, on whichever worker, stands beside it
        step fetch                  from its start to its durable record
        step model:gpt-5
          chat gpt-5                one request to the model
        step file_ticket
          execute_tool file_ticket  one call of the tool's own code

A process traces if ``LONGSHIFT_TRACES`` says so; where spans go, which of them, and how often, is said by OpenTelemetry's own
variables (``OTEL_EXPORTER_OTLP_ENDPOINT``, ``OTEL_TRACES_SAMPLER``, ``OTEL_BSP_...``), which its SDK reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from longshift.config import Config
from longshift.errors import ConfigError
from longshift.tracing.spans import NO_SPAN, NOTHING, OFF, Attribute, Attributes, Kind, Span, Traces

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter


def open_traces(config: Config, *, service: str) -> Traces:
    """As the settings say; ``service`` is who the spans are of, unless ``OTEL_SERVICE_NAME`` says something else.

    Raises:
        ConfigError: they are to be sent, and the packages for that are missing.
    """
    if config.traces == "off":
        return OFF
    try:
        from longshift.tracing import otel
    except ImportError as error:
        _missing(error)
    return otel.sending(service=service)


def traces_to(exporter: SpanExporter, *, service: str = "longshift") -> Traces:
    """Every span goes to ``exporter`` as soon as it has ended: for tests, with OpenTelemetry's ``InMemorySpanExporter``.

    Raises:
        ConfigError: the packages for that are missing.
    """
    try:
        from longshift.tracing import otel
    except ImportError as error:
        _missing(error)
    return otel.giving(exporter, service=service)


def _missing(error: ImportError) -> NoReturn:
    raise ConfigError(
        f"LONGSHIFT_TRACES is otlp, but the package {error.name!r} is missing: pip install 'longshift[otel]'"
    ) from None


__all__ = [
    "NOTHING",
    "NO_SPAN",
    "OFF",
    "Attribute",
    "Attributes",
    "Kind",
    "Span",
    "Traces",
    "open_traces",
    "traces_to",
]
