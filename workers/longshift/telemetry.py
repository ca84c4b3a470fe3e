"""Logging of a process, set up in one place: constant messages with fields, secrets never.

    on a terminal   10:42:04 INFO    longshift.worker  worker ready  agents=1 worker_id=0193...
    elsewhere       {"time": "...", "level": "info", "logger": "longshift.worker", "message": "worker ready", ...}

Fields come from ``extra=``, and from ``about``: what is logged inside such a block, by whomever, says which turn or request
it belongs to. Ids are shown as the API shows them. What looks like a secret by its name or its form is masked, in fields,
messages and tracebacks alike.
"""

from __future__ import annotations

import json
import logging
import logging.config
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, Token
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, TextIO
from uuid import UUID

from longshift.model import Json, Prefix, show_id

MASK = "***"
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_SECRET_NAME = re.compile(r"(?:^|_)(?:api_?key|authorization|password|passwd|secret|token)(?:$|_)", re.IGNORECASE)
_SECRET_FORM = re.compile(
    r"(?P<user>://[^\s/:@]*:)[^\s@]+(?=@)|\blsk_[\w-]{8,}|(?P<bearer>\bBearer\s+)\S+", re.IGNORECASE
)
_QUIET = ("alembic", "botocore", "httpcore", "httpx", "httpx2", "mcp", "uvicorn", "uvicorn.error")
"""Libraries whose everyday messages say nothing about the fleet."""
_IDS = {f"{name.lower()}_id": prefix for name, prefix in Prefix.__members__.items()}
_BARE_ID = re.compile(r"[0-9a-f]{32}\Z")
Fields = Mapping[str, Json]
_about: ContextVar[Fields] = ContextVar("longshift_about", default=MappingProxyType({}))


def setup(*, level: str = "INFO", stream: TextIO | None = None) -> None:
    """Log to ``stream`` (default: standard error), as text on a terminal and as JSON lines elsewhere.

    Replaces what was set up before; call it once, when the process starts.
    """
    stream = stream or sys.stderr
    formatter = TextFormatter if stream.isatty() else JsonFormatter
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"own": {"()": formatter}},
            "filters": {"about": {"()": About}},
            "handlers": {
                "own": {"class": "logging.StreamHandler", "stream": stream, "formatter": "own", "filters": ["about"]}
            },
            "root": {"level": level, "handlers": ["own"]},
            "loggers": {name: {"level": "WARNING"} for name in _QUIET},
        }
    )
    logging.captureWarnings(True)


@contextmanager
def about(**fields: Json) -> Iterator[None]:
    """Lines that are logged inside carry these fields; in tasks and threads, too, that got a copy of this context."""
    token = add(fields)
    try:
        yield
    finally:
        remove(token)


def add(fields: Fields) -> Token[Fields]:
    """The beginning of such a block, where a ``with`` would cost too much."""
    return _about.set({**_about.get(), **fields})


def remove(token: Token[Fields]) -> None:
    """Its end, in the same context."""
    _about.reset(token)


class About(logging.Filter):
    """Adds what a line is about, unless the line says otherwise. On the handler: filters of loggers see their own lines only."""

    def filter(self, record: logging.LogRecord) -> bool:
        for name, value in _about.get().items():
            record.__dict__.setdefault(name, value)
        return True


def masked(text: str) -> str:
    """``text`` without the passwords of URLs, API keys and bearer tokens."""
    return _SECRET_FORM.sub(_mask, text)


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": masked(record.getMessage()),
        }
        line = line | _fields(record) | line  # a field does not replace what a line is found by
        if trace := _trace(self, record):
            line["trace"] = trace
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """One line for people, and a traceback below it if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        fields = " ".join(f"{name}={value}" for name, value in _fields(record).items())
        line = f"{time} {record.levelname:<7} {record.name}  {masked(record.getMessage())}"
        return "\n".join(part for part in (f"{line}  {fields}".rstrip(), _trace(self, record)) if part)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {
        name: MASK if _SECRET_NAME.search(name) else _shown(_as_shown(name, value))
        for name, value in sorted(vars(record).items())
        if name not in _STANDARD
    }


def _as_shown(name: str, value: object) -> object:
    """An id that is named after what it is of, with its prefix."""
    if name in _IDS and (isinstance(value, UUID) or (isinstance(value, str) and _BARE_ID.match(value))):
        return show_id(_IDS[name], value if isinstance(value, UUID) else UUID(value))
    return value


def _shown(value: object) -> object:
    return value if isinstance(value, int | float | bool) or value is None else masked(str(value))


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    trace = formatter.formatException(record.exc_info) if record.exc_info else ""
    return masked("\n".join(part for part in (trace, record.stack_info) if part))


def _mask(found: re.Match[str]) -> str:
    return (found["user"] or found["bearer"] or "") + MASK
