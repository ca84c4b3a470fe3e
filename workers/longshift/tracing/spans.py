"""Spans as the rest of the library knows them. These are the ones of a process that traces nothing, and cost nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from types import TracebackType
from typing import Self
from uuid import UUID

Attribute = str | int | float | bool | Sequence[str] | None
"""None: there is nothing to say."""
Attributes = Mapping[str, Attribute]
NOTHING: Attributes = {}


class Kind(StrEnum):
    """What a span is to the one above it."""

    INTERNAL = "internal"
    SERVER = "server"  # answers a request
    CLIENT = "client"  # makes one
    CONSUMER = "consumer"  # does what was asked for earlier


class Span:
    """A stretch of work, from its making to the end of its ``with`` block, inside which it is the current one.

    Never carries what agents are given or give: no input, no output, no text of an error, which may quote them.
    """

    __slots__ = ()

    @property
    def traceparent(self) -> str | None:
        """What somebody else needs to hang spans of theirs below this one (W3C Trace Context)."""
        return None

    @property
    def is_recorded(self) -> bool:
        """Whether anybody will see what is said of it."""
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """An exception is the span's, by the name of its type, and goes on."""

    def end(self, at: float) -> None:
        """Instead of a ``with`` block, for what is over: seconds since the epoch."""

    def set(self, attributes: Attributes) -> None:
        """Say more of it."""

    def link(self, traceparent: str) -> None:
        """It has to do with that span, which is not above it."""

    def rename(self, name: str) -> None:
        """Give it the name that was not known when it began."""

    def fail(self, error_type: str) -> None:
        """What it stands for went wrong."""


NO_SPAN = Span()


class Traces:
    """Makes the spans of one process."""

    is_on = False

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
        """A span that begins now, or at ``begun`` (seconds since the epoch).

        It is below ``parent`` (a traceparent), or else the current span. If there is neither, it is part of ``trace``, whose
        id is made from something that others know, too; or of a new one.
        """
        return NO_SPAN

    def share(self) -> None:
        """Let instrumentation of other libraries in this process send its spans the same way, unless it has a way."""

    def close(self) -> None:
        """Send what is left, as far as that is possible in a moment."""


OFF = Traces()
