"""Replay: which recorded result belongs to which call.

After a resume the agent's code runs again from its first line; a step whose result is recorded returns it instead of
running. A call is recognised by its **replay key**: the branch it is made in, the step's name, and the how-manieth such
call it is in that branch, written ``branch/name#n``. Branches are the coroutines given to ``turn.gather``, and any task
that the agent starts by itself; each counts for itself, so that they may overtake each other.

The digest of the arguments is a check. Recorded calls of the same name match by digest first; a recorded step whose
arguments changed still wins, since its effect has happened, and the difference is reported as ``diverged``.

This module is pure: no I/O, no clock.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import datetime
from random import Random
from typing import Any
from uuid import UUID

from pydantic import BaseModel
from pydantic_core import PydanticSerializationError, to_jsonable_python

from longshift.errors import UsageError
from longshift.events import FOLDED, Event, Kind, NewEvent
from longshift.model import Json

_NAME = re.compile(r"[^/#~\x00-\x1f]{1,128}\Z")
_STRANGER = re.compile(r"~~\d+")
_REPLAYED = frozenset(
    {
        Kind.STEP_COMPLETED,
        Kind.STEP_FAILED,
        Kind.VALUE_RECORDED,
        Kind.WAIT_BEGUN,
        Kind.WAIT_ENDED,
        Kind.STATE_CHANGED,
        Kind.MESSAGE_SAID,
        Kind.CONTEXT_SUMMARIZED,
    }
)


def check_name(name: str, *, ours: bool = False) -> str:
    """``name`` if it can be part of a replay key; it is a wire format, so choose it for good.

    Raises:
        UsageError: empty, too long, with a character that keys use, or with the ``$`` of our own (``ours``).
    """
    if not _NAME.match(name) or (name.startswith("$") and not ours):
        raise UsageError(
            f"{name!r} cannot name a step: use 1 to 128 characters, without '/', '#', '~' and control characters, and "
            "not '$' as the first"
        )
    return name


@dataclass(frozen=True, slots=True)
class Recorded:
    """What the log knows about one call."""

    key: str
    kind: str
    payload: Mapping[str, Json]
    order: int = 0  # its seq: grows along the log
    earlier: bool = False  # by a turn that this one retries: the session's context has it already

    @property
    def digest(self) -> str:
        return str(self.payload.get("digest", ""))


@dataclass(frozen=True, slots=True)
class Call:
    """A call in its place: its key, and what is recorded of it (None: it has to run)."""

    key: str
    recorded: Recorded | None
    diverged: bool = False


@dataclass(slots=True, eq=False)
class Scope:
    """One branch of a turn: its own counters, its own random numbers, its own time."""

    path: str
    now: datetime
    seed: str
    owner: object | None = None  # the task that runs it; None: any (the agent runs in a thread)
    counters: Counter[str] = field(default_factory=Counter)
    gathers: int = 0
    tasks: int = 0
    strangers: int = 0
    is_task: bool = False  # not a branch of ``turn.gather``
    counted: bool = False  # among the branches that must wait before the turn leaves
    parent: Scope | None = None  # where it was forked
    calls: int = 0  # that a framework makes for it side by side: meanwhile it waits for them, and they count instead
    # Within a branch of ``turn.race``: ends of waits, recorded with what the branch does next, or with its victory. If it
    # loses first, they are forgotten: what came is still there for others. None elsewhere: they are recorded at once.
    late: list[NewEvent] | None = None
    _random: Random | None = field(default=None, init=False)

    @property
    def random(self) -> Random:
        """Made when first asked for: 2.5 KB each, and costly to seed, while few agents and no step asks."""
        if self._random is None:
            self._random = Random(f"{self.seed}/{self.path}")
        return self._random

    def fork_branches(self, number: int, *, racing: bool = False) -> list[Scope]:
        """The branches of the next ``turn.gather`` or ``turn.race``."""
        self.gathers += 1
        branches = [self._fork(f"{self.gathers - 1}.{index}") for index in range(number)]
        if racing or self.late is not None:
            for branch in branches:
                branch.late = []
        return branches

    def fork_task(self) -> Scope:
        """The branch of a task that the agent starts by itself, numbered in the order of their creation."""
        self.tasks += 1
        return self._fork(f"~{self.tasks - 1}", is_task=True)

    def fork_stranger(self, *, owner: object | None) -> Scope:
        """The branch of a task or thread whose creation was not seen, numbered in the order of their first calls."""
        self.strangers += 1
        return self._fork(f"~~{self.strangers - 1}", owner=owner, is_task=True)

    def within(self, key: str) -> Scope:
        """For the inside of the step that is recorded under ``key``: the same on each of its tries."""
        return Scope(path=f"{key}/", now=self.now, seed=self.seed)

    def fork_named(self, name: str) -> Scope:
        """A branch of the library's own, which no agent's code can run in."""
        return self._fork(name)

    def _fork(self, mark: str, *, owner: object | None = None, is_task: bool = False) -> Scope:
        path = f"{self.path}{mark}/"
        return Scope(path=path, now=self.now, seed=self.seed, owner=owner, is_task=is_task, parent=self)


class Replay:
    """The recorded calls of one turn, each handed out once."""

    def __init__(self, events: Iterable[Event], *, turn_id: UUID | None = None) -> None:
        """``turn_id``: the turn that replays them; default: the one that recorded them."""
        latest: dict[str, Recorded] = {}
        self.diverged: set[str] = set()
        self.retrying: dict[str, tuple[int, datetime]] = {}  # by key: tries so far, and when the next one is due
        self.called: dict[str, str] = {}  # by key: the irreversible call that was started there last
        self.newest = 0  # seq of the newest event
        self._own: set[str] = set()  # keys of what this turn itself has recorded
        for event in events:
            self.newest = event.seq
            if event.key is None:
                continue
            if turn_id is None or event.turn_id == turn_id:
                self._own.add(event.key)
            if event.kind in _REPLAYED:
                latest[event.key] = Recorded(
                    event.key, event.kind, event.payload, event.seq, turn_id is not None and event.turn_id != turn_id
                )
            elif event.kind == Kind.STEP_RETRYING:
                self.retrying[event.key] = event.payload["attempt"], datetime.fromisoformat(event.payload["until"])
            elif event.kind == Kind.TOOL_STARTED:
                self.called[event.key] = event.payload["call"]
            elif event.kind == Kind.TURN_DIVERGED:
                self.diverged.add(event.key)
        self._skipped: list[str] = []
        self._recorded = frozenset(latest)
        self._taken = set(latest)
        self._waiting: dict[str, dict[int, Recorded]] = defaultdict(dict)
        # by arguments too, lowest number first: a search among all calls of one name would make long replays quadratic
        self._by_digest: dict[tuple[str, str], deque[int]] = defaultdict(deque)
        for key, recorded in latest.items():
            base, _, number = key.rpartition("#")
            self._waiting[base][int(number)] = recorded
        for base, waiting in self._waiting.items():
            for place in sorted(waiting):
                self._by_digest[base, waiting[place].digest].append(place)

    def call(self, scope: Scope, name: str, *, digest: str) -> Call:
        """The next call of ``name`` in ``scope``: what is recorded of it, else the key under which to record it."""
        base = f"{scope.path}{name}"
        place = scope.counters[base]
        scope.counters[base] += 1
        waiting = self._waiting.get(base, {})
        same = self._lowest(base, digest)
        if same is not None:
            return Call(waiting[same].key, waiting.pop(same))
        if "~~" in scope.path and f"{base}#{place}" in self._recorded:
            swapped = self._of_sibling(base, digest)
            if swapped is not None:
                return Call(swapped.key, swapped)
        if place in waiting:
            recorded = waiting.pop(place)
            return Call(recorded.key, recorded, diverged=recorded.key not in self.diverged)
        while f"{base}#{place}" in self._taken:  # its record was handed to a call with the same arguments
            place += 1
        key = f"{base}#{place}"
        self._taken.add(key)
        return Call(key, None)

    def _lowest(self, base: str, digest: str) -> int | None:
        """The lowest number among the waiting calls of ``base`` with these arguments."""
        numbers = self._by_digest.get((base, digest))
        while numbers and numbers[0] not in self._waiting[base]:  # handed out by its place
            numbers.popleft()
        return numbers[0] if numbers else None

    def _of_sibling(self, base: str, digest: str) -> Recorded | None:
        """The same call as recorded by another stranger, whose numbers may change on a replay.

        Only asked where the call would diverge otherwise.
        """
        shape = _STRANGER.sub("~~", base)
        for other in sorted(self._waiting):
            if _STRANGER.sub("~~", other) == shape:
                number = self._lowest(other, digest)
                if number is not None:
                    return self._waiting[other].pop(number)
        return None

    def upcoming(self, scope: Scope, name: str) -> Recorded | None:
        """What is recorded of the next call of ``name`` in ``scope``, whose arguments do not count."""
        base = f"{scope.path}{name}"
        return self._waiting.get(base, {}).get(scope.counters[base])

    def has_begun(self, before: str) -> bool:
        """Whether this turn has recorded anything outside of the branch ``before``, which runs before its agent."""
        return any(not key.startswith(f"{before}/") for key in self._own)

    def ahead(self, path: str = "") -> Iterator[Recorded]:
        """What this turn has recorded in ``path`` that joins the context, and the code has not come to yet."""
        for waiting in self._waiting.values():
            for recorded in waiting.values():
                if recorded.kind in FOLDED and not recorded.earlier and recorded.key.startswith(path):
                    yield recorded

    def skip(self, path: str) -> list[Recorded]:
        """The branch ``path`` will not run again: it has lost a race. What it has left in the context."""
        left = list(self.ahead(path))
        for recorded in left:
            base, _, number = recorded.key.rpartition("#")
            del self._waiting[base][int(number)]
        self._skipped.append(path)
        return left

    @property
    def unused(self) -> list[str]:
        """Keys of recorded calls that the code has not made (yet)."""
        keys = (recorded.key for waiting in self._waiting.values() for recorded in waiting.values())
        return sorted(key for key in keys if not key.startswith(tuple(self._skipped)))


def digest_of(name: str, arguments: Mapping[str, Any]) -> str:
    """16 hex digits that change when the arguments do; what cannot be written as JSON counts by its type."""
    text = json.dumps(to_json(arguments), sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(f"{name}\n{text}".encode("utf-8", "surrogatepass")).hexdigest()[:16]


def to_json(value: Any) -> Json:
    def by_type(other: Any) -> str:
        return f"<{type(other).__module__}.{type(other).__qualname__}>"

    try:
        return to_jsonable_python(_ordered(value), fallback=by_type, inf_nan_mode="strings", bytes_mode="base64")
    except (PydanticSerializationError, ValueError, RecursionError):
        return by_type(value)


def exact_json(value: Any) -> Json:
    """``value`` as JSON has it.

    Raises:
        TypeError, ValueError: some of it cannot be written as JSON.
    """

    def refuse(other: Any) -> Any:
        raise TypeError(f"a {type(other).__qualname__} is no data")

    return to_jsonable_python(_ordered(value), fallback=refuse, inf_nan_mode="strings", bytes_mode="base64")


def _ordered(value: Any) -> Any:
    """``value`` with its sets as sorted lists: their own order changes from process to process."""
    match value:
        case set() | frozenset():
            return sorted(
                (_ordered(each) for each in value), key=lambda each: json.dumps(to_json(each), sort_keys=True)
            )
        case dict():
            return {key: _ordered(each) for key, each in value.items()}
        case list() | tuple():
            return [_ordered(each) for each in value]
        case BaseModel():
            return {key: _ordered(each) for key, each in value}
        case _ if is_dataclass(value) and not isinstance(value, type):
            return {each.name: _ordered(getattr(value, each.name)) for each in fields(value)}
        case _:
            return value


def derived_id(root: UUID, *parts: str) -> UUID:
    """The same UUID for the same turn and place, on every replay."""
    digest = hashlib.sha256("\n".join((root.hex, *parts)).encode()).digest()
    return UUID(bytes=digest[:16], version=4)
