"""What the user gives on the command line: JSON, files, standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from longshift.errors import InvalidInput
from longshift.model import Json


def read_input(given: str | None, *, name: str = "INPUT") -> Json:
    """The input of a turn or the like: JSON, ``@file`` with JSON, ``-`` for standard input; nothing is null.

    Args:
        given: by the user.
        name: what the help calls it.

    Raises:
        InvalidInput: it is not JSON, or the file cannot be read.
    """
    if given is None:
        return None
    if given == "-":
        return _parsed(sys.stdin.buffer.read(), "standard input")
    if given.startswith("@"):
        return _parsed(read_bytes(Path(given[1:])), given[1:])
    return _parsed(
        given.encode("utf-8", "surrogateescape"), name, hint=""": write text in quotes, for example '"text"'"""
    )


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"cannot read {str(path)!r}: {error.strerror}") from None


def read_lines(source: str, *, agent: str | None) -> Iterator[dict[str, Json]]:
    """The lines of a batch, from a file or ``-``; those that name no agent get ``agent``.

    Raises:
        InvalidInput: the file cannot be read, or a line (named by its number) is no JSON object.
    """
    for number, line in enumerate(_opened(source), start=1):
        if not line.strip():
            continue
        value = _parsed(line, f"line {number}")
        if not isinstance(value, dict):
            raise InvalidInput(f'line {number} is no JSON object of the form {{"agent": ..., "input": ...}}')
        yield value if agent is None else {"agent": agent, **value}


def _opened(source: str) -> Iterator[bytes]:
    if source == "-":
        yield from sys.stdin.buffer
        return
    try:
        with Path(source).open("rb") as file:
            yield from file
    except OSError as error:
        raise InvalidInput(f"cannot read {source!r}: {error.strerror}") from None


def _parsed(data: bytes, where: str, *, hint: str = "") -> Json:
    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=_refused)
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{where} is not UTF-8, from byte {error.start} on") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise InvalidInput(f"{where} is not JSON: {error.msg} at {place}{hint}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{where} is not usable JSON: {error}") from None


def _refused(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON: use null or text")
