"""Exit codes, and how an error is said."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

from longshift.errors import (
    ConfigError,
    Conflict,
    Denied,
    IdempotencyMismatch,
    InvalidInput,
    LongshiftError,
    NotFound,
    Unavailable,
    UsageError,
)


class ExitCode(IntEnum):
    """What a command's exit code means."""

    OK = 0
    FAILED = (
        1  # the turn, or a turn of the batch, has not succeeded; a tortured agent broke a promise; a probe: not well
    )
    USAGE = 2  # wrong arguments, settings or input
    NOT_FOUND = 3
    UNAVAILABLE = 4  # the API, Postgres or Redis does not answer
    DENIED = 5  # the API key is missing, wrong, or lacks a scope
    CONFLICT = 6  # it contradicts what is there: answered or settled already, not ended, busy
    INTERRUPTED = 130  # Ctrl-C


CODES: Mapping[type[LongshiftError], ExitCode] = {
    ConfigError: ExitCode.USAGE,
    Conflict: ExitCode.CONFLICT,
    IdempotencyMismatch: ExitCode.USAGE,
    Denied: ExitCode.DENIED,
    InvalidInput: ExitCode.USAGE,
    NotFound: ExitCode.NOT_FOUND,
    Unavailable: ExitCode.UNAVAILABLE,
    UsageError: ExitCode.USAGE,
}
EPILOG = (
    "Exit codes: 0 done, 1 the turn has not succeeded (or a promise was broken), 2 wrong arguments or input, 3 not found, "
    "4 no answer, 5 the API key is refused, 6 too late or too early, 130 interrupted."
)


def code_of(error: LongshiftError) -> ExitCode:
    return next((CODES[kind] for kind in type(error).__mro__ if kind in CODES), ExitCode.FAILED)


def report(error: LongshiftError) -> ExitCode:
    """Say it on standard error, with the places that do not fit, and return the exit code."""
    from longshift.cli.output import say

    say(f"error: {error}", style="red")
    places = error.errors if isinstance(error, InvalidInput) else []
    for place in places:
        where = [f"line {place['line']}"] if place.get("line") else []
        where += [str(place["path"])] if place.get("path") else []
        line = ": ".join([*where, str(place.get("message", ""))])
        if line not in str(error):
            say(f"  {line}")
    return code_of(error)
