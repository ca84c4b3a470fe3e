"""The turns of a batch as they were sent: read one at a time, as often as needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

from pydantic import ValidationError

from longshift.artifacts import Spooled
from longshift.catalogue import Draft, Misfit
from longshift.errors import InvalidInput
from longshift.model import Json
from longshift_api.bodies import parse_json
from longshift_api.problems import misfits
from longshift_api.sent import BatchLine

MOST_LINES = 50_000
MOST_ITEMS = 1_000


class JsonLines:
    """One turn on each line; blank lines are skipped, but counted. ``longest``: bytes of one line."""

    def __init__(self, body: Spooled, *, longest: int, traceparent: str | None = None) -> None:
        self._body = body
        self._traceparent = traceparent
        self._longest = longest

    def __iter__(self) -> Iterator[Draft | Misfit]:
        found = 0
        with self._body.rewound() as file:
            for number, line in enumerate(_lines(file, self._longest), start=1):
                if not line.strip():
                    continue
                found += 1
                if found > MOST_LINES:
                    raise InvalidInput(
                        f"a batch may have {MOST_LINES:,} turns; this one has more: send several batches"
                    )
                if len(line) > self._longest:
                    yield _misfit(number, f"longer than the {self._longest:,} bytes allowed for one turn")
                else:
                    yield _parsed(number, line, self._traceparent)


class JsonArray:
    """The items of an array.

    Raises:
        InvalidInput: not an array, or too many items.
    """

    def __init__(self, body: bytes, *, traceparent: str | None = None) -> None:
        items = parse_json(body)
        if not isinstance(items, list):
            raise InvalidInput('a batch in JSON is an array of turns: [{"agent": ..., "input": ...}, ...]')
        if len(items) > MOST_ITEMS:
            raise InvalidInput(f"an array may have {MOST_ITEMS:,} turns, not {len(items):,}: send JSON lines instead")
        self._items, self._traceparent = items, traceparent

    def __iter__(self) -> Iterator[Draft | Misfit]:
        for number, item in enumerate(self._items, start=1):
            yield _drafted(number, item, self._traceparent)


def _lines(file: IO[bytes], longest: int) -> Iterator[bytes]:
    """Lines without reading one whole that is too long: of such a line the beginning."""
    while line := file.readline(longest + 2):
        head = line
        while not line.endswith(b"\n") and (line := file.readline(longest)):
            head = head[: longest + 1]
        yield head.rstrip(b"\r\n")


def _parsed(number: int, line: bytes, traceparent: str | None) -> Draft | Misfit:
    try:
        return _drafted(number, parse_json(line), traceparent)
    except InvalidInput as error:
        return _misfit(number, str(error))


def _drafted(number: int, value: Json, traceparent: str | None) -> Draft | Misfit:
    try:
        return BatchLine.model_validate(value).draft(line=number, traceparent=traceparent)
    except ValidationError as error:
        return Misfit(number, misfits(error))


def _misfit(number: int, message: str) -> Misfit:
    return Misfit(number, [{"path": "", "message": message}])
