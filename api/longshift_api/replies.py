"""Headers that several resources answer with, and their documentation."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from fastapi import Request

from longshift.model import TurnRecord, TurnStatus

REPLAYED = {"Idempotent-Replayed": "true"}
IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "an equal request with the same key, within a day, makes nothing new",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
}
_PATIENCE = ((10, 1), (60, 2), (600, 5), (3600, 15))
_LONGEST = 60


def made(example: str) -> dict[str, Any]:
    """The documentation of the headers of a 201 or 202."""
    return {
        "Location": {"schema": {"type": "string"}, "description": "where it is", "example": example},
        "Idempotent-Replayed": {
            "schema": {"type": "string", "enum": ["true"]},
            "description": "present if an equal request with this Idempotency-Key came before: nothing new was made",
        },
    }


def retry_after(turn: TurnRecord, now: datetime) -> int:
    """Seconds until another look is worth it: more, the older the turn is."""
    if turn.status is TurnStatus.SCHEDULED and turn.run_after is not None and turn.run_after > now:
        return max(1, min(_LONGEST, round((turn.run_after - now).total_seconds())))
    age = (now - turn.created_at).total_seconds()
    return next((seconds for younger_than, seconds in _PATIENCE if age < younger_than), _LONGEST)


def etag(version: int, *, partial: bool = False) -> str:
    """Weak: ``blocked_by`` may change while the turn does not. ``partial``: something is missing that will be there again."""
    return f'W/"{version}{"-partial" if partial else ""}"'


def matches(request: Request, tag: str) -> bool:
    """Whether ``If-None-Match`` names ``tag`` (weak comparison)."""
    given = [part.strip().removeprefix("W/") for part in request.headers.get("if-none-match", "").split(",")]
    return "*" in given or tag.removeprefix("W/") in given
