"""Logs: one line each, with fields, without secrets."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from longshift import telemetry


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_elsewhere_than_on_a_terminal_a_line_is_json_with_the_fields() -> None:
    stream = io.StringIO()
    telemetry.setup(stream=stream)
    logging.getLogger("longshift.x").info("it happened", extra={"turns": 3, "worker": "w1", "level": "none"})
    line = json.loads(stream.getvalue())
    assert (line["message"], line["level"], line["turns"], line["worker"]) == ("it happened", "info", 3, "w1")


def test_on_a_terminal_a_line_is_text_with_the_fields() -> None:
    stream = Terminal()
    telemetry.setup(stream=stream)
    logging.getLogger("longshift.x").warning("it happened", extra={"turns": 3})
    assert stream.getvalue().endswith("WARNING longshift.x  it happened  turns=3\n")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://:hush@host:1/0", "redis://:***@host:1/0"),
        ("postgresql://me:hush@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("Authorization: Bearer hush", "Authorization: Bearer ***"),
        ("the key lsk_hushhushhush is", "the key *** is"),
        ("nothing to hide", "nothing to hide"),
    ],
)
def test_what_looks_like_a_secret_is_masked(text: str, shown: str) -> None:
    assert telemetry.masked(text) == shown


def test_secrets_are_masked_in_messages_fields_and_tracebacks() -> None:
    stream = io.StringIO()
    telemetry.setup(stream=stream)
    try:
        raise ValueError("cannot reach redis://:hush@host")
    except ValueError:
        fields = {"api_key": "hush", "url": "redis://:hush@host", "lock_key": 7}
        logging.getLogger("longshift.x").exception("failed for redis://:hush@host", extra=fields)
    assert "hush" not in stream.getvalue()
    line = json.loads(stream.getvalue())
    assert (line["api_key"], line["lock_key"]) == ("***", 7)
    assert "ValueError" in line["trace"]
