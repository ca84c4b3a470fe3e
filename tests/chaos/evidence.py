"""Everything that was seen from outside during a run, in one value that can be written to a file and checked again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from longshift.model import Json
from tests.support.fleet import Effect

TERMINAL = frozenset({"succeeded", "failed", "cancelled", "expired"})


@dataclass(frozen=True, slots=True)
class Asked:
    """One turn as a client asked for it, and what it was told: accepted (202) as ``turn``."""

    turn: str
    session: str
    expected: tuple[str, ...]
    """Ends that are right: a status, or ``failed:<code of the error>``."""
    output: Json = None  # if it succeeds; None: whatever it likes
    after: str | None = None  # the turn of this session that had been accepted when this one was sent
    poison: bool = False  # it ends its process


@dataclass(frozen=True, slots=True)
class Seen:
    """The state of a turn in one answer; in the order in which one client got them."""

    turn: str
    status: str
    output: Json = None


@dataclass(frozen=True, slots=True)
class Stream:
    """A session as somebody saw it who followed it, and who resumed after each interruption."""

    session: str
    seqs: list[int]
    resets: int = 0
    resumed: int = 0


@dataclass(frozen=True, slots=True)
class Key:
    """A key of Redis after the run."""

    name: str
    kind: str
    ttl: float  # seconds; -1: none
    length: int | None = None  # of a list


@dataclass(frozen=True, slots=True)
class Death:
    """A process that ended although the run had not asked it to."""

    process: str
    code: int
    log: str  # its last line


@dataclass(slots=True)
class Evidence:
    """What the checker reads. Identifiers as the API writes them."""

    asked: list[Asked] = field(default_factory=list)
    by_key: dict[str, list[str]] = field(default_factory=dict)
    """Ids of turns or batches answered, for each idempotency key."""
    unanswered: list[str] = field(default_factory=list)
    """Requests that never got their 202, with what came instead."""
    seen: list[Seen] = field(default_factory=list)
    turns: dict[str, Json] = field(default_factory=dict)
    """The last answer for each turn, by id."""
    listed: list[str] = field(default_factory=list)
    """Ids of all turns that the API lists after the run."""
    events: dict[str, list[Json]] = field(default_factory=dict)
    """The whole log of each session, by id."""
    streams: list[Stream] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)
    answers: int = 0
    """Answers that clients got, of any kind."""
    bad_answers: list[str] = field(default_factory=list)
    """Answers that the contract does not allow."""
    redis_keys: list[Key] = field(default_factory=list)
    """What is in Redis when everything is at rest."""
    redis_keys_during: list[Key] = field(default_factory=list)
    """What was there when somebody looked during the run, each look for itself."""
    leases_held: int = 0
    leases_of_the_dead: int = 0
    archived: int = 0
    """Sessions that have an archive when everything is at rest."""
    logs: int = 0
    """Log files read."""
    tracebacks: list[str] = field(default_factory=list)
    drift: list[str] = field(default_factory=list)
    """Copies of contexts that were not the fold of their log, as workers report them."""
    deaths: list[Death] = field(default_factory=list)

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, file: Path) -> Self:
        found: dict[str, Any] = json.loads(file.read_text())
        return cls(
            **{
                **found,
                "asked": [Asked(**{**each, "expected": tuple(each["expected"])}) for each in found["asked"]],
                "seen": _many(Seen, found["seen"]),
                "streams": _many(Stream, found["streams"]),
                "effects": _many(Effect, found["effects"]),
                "redis_keys": _many(Key, found["redis_keys"]),
                "redis_keys_during": _many(Key, found["redis_keys_during"]),
                "deaths": _many(Death, found["deaths"]),
            }
        )


def _many(kind: type[Any], values: Iterable[dict[str, Any]]) -> list[Any]:
    return [kind(**value) for value in values]


def end_of(turn: Json) -> str:
    """A turn's end as ``Asked.expected`` writes it."""
    if turn["status"] != "failed":
        return str(turn["status"])
    return f"failed:{(turn['error'] or {}).get('code')}"
