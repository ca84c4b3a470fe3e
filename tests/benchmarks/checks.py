"""What must be true of every turn, whatever happened to its workers: said of the effects (a file) and the log (Postgres).

``History`` is both, read once when all is over. Its findings are lists of sentences, empty if nothing is wrong; a report
that requires them makes the command end with a code other than 0.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from uuid import UUID

from tests.benchmarks import effects
from tests.benchmarks.effects import BEGUN, Effect, step_number
from tests.benchmarks.stack import Site, until

Attempt = tuple[UUID, int]
"""A turn, and the how-manieth start of it."""

FACTS = """
SELECT e.turn_id, e.epoch, e.kind, extract(epoch FROM e.created_at)::float AS at, e.payload ->> 'name' AS step,
       CAST(e.payload ->> 'attempt' AS integer) AS attempt
  FROM events e JOIN turns t ON t.id = e.turn_id
 WHERE t.agent = ANY(%s) AND e.kind IN ('turn.started', 'step.completed', 'turn.succeeded', 'turn.failed',
       'turn.cancelled', 'turn.expired')
 ORDER BY e.session_id, e.seq"""
TURNS = """
SELECT id, agent, status, attempts, json_array_length(input -> 'steps') AS steps,
       (SELECT sum(CAST(ms AS integer)) FROM json_array_elements_text(input -> 'steps') AS ms)::float AS work,
       error ->> 'code' AS code,
       extract(epoch FROM created_at)::float AS created, extract(epoch FROM started_at)::float AS started,
       extract(epoch FROM ended_at)::float AS ended
  FROM turns WHERE agent = ANY(%s)"""
GAPS = """
SELECT count(*) AS n FROM (
    SELECT FROM events GROUP BY session_id HAVING min(seq) <> 1 OR max(seq) <> count(*)) gaps"""
LATE = """
SELECT count(*) AS n FROM (
    SELECT epoch < max(epoch) OVER (PARTITION BY session_id ORDER BY seq) AS late FROM events) e WHERE late"""
UNSETTLED = "SELECT count(*) AS n FROM sessions WHERE open_turns > 0 OR lease_worker IS NOT NULL"
SETTLING = 40.0
"""Seconds for leases that a killed worker held on sessions without work: a TTL, and some."""


@dataclass(frozen=True, slots=True)
class Fact:
    """An event that matters here. ``attempt``: whose lease wrote it; ``step``: the name of a step that was completed."""

    turn: UUID
    epoch: int
    attempt: int
    kind: str
    at: float
    step: str | None = None

    @property
    def is_end(self) -> bool:
        return self.kind not in ("turn.started", "step.completed")

    @property
    def is_progress(self) -> bool:
        return self.kind != "turn.started"


@dataclass(frozen=True, slots=True)
class Ended:
    """A turn as its row has it. ``steps``: how many it was to take; ``work``: their ms. Times in seconds since 1970."""

    id: UUID
    agent: str
    status: str
    attempts: int
    steps: int
    work: float
    code: str | None
    created: float
    started: float | None
    ended: float | None


@dataclass
class History:
    """Everything that happened to the turns of some agents, in order."""

    effects: Sequence[Effect]
    facts: Sequence[Fact]
    turns: Sequence[Ended]
    gaps: int = 0  # sessions whose seq is not 1, 2, 3 ...
    late: int = 0  # events under an older epoch than one before them
    unsettled: int = 0  # sessions with an open turn or a lease, long after the last turn has ended
    exempt: frozenset[int] = field(default_factory=frozenset)
    """Pids of processes that were stopped and continued: what they begin in vain is said elsewhere."""

    @cached_property
    def recorded_by(self) -> dict[tuple[UUID, int], int]:
        """For each step with a result (turn, number) the first attempt that recorded it."""
        backwards = [f for f in reversed(self.facts) if f.step is not None]
        return {(f.turn, step_number(f.step or "")): f.attempt for f in backwards}

    @cached_property
    def of_turn(self) -> dict[UUID, list[Fact]]:
        found: dict[UUID, list[Fact]] = defaultdict(list)
        for fact in self.facts:
            found[fact.turn].append(fact)
        return found

    @cached_property
    def runs(self) -> Counter[tuple[UUID, int]]:
        """How often each step (turn, number) has begun."""
        return Counter((e.turn, e.step) for e in self.effects if e.what == BEGUN)

    # -- findings

    def violations(self, *, turns: int) -> list[str]:
        """Everything below; ``turns`` must have succeeded."""
        return [
            *self.not_succeeded(turns),
            *self.out_of_order(),
            *self.forked(),
            *self.run_again(),
            *self.recorded_wrongly(),
        ]

    def not_succeeded(self, turns: int) -> list[str]:
        counts = Counter(turn.status for turn in self.turns)
        return [] if counts == {"succeeded": turns} else [f"{turns:,} turns were to succeed, but: {dict(counts)}"]

    def out_of_order(self) -> list[str]:
        """Turns of a session come one after another, attempts of a turn too: nothing old happens once a new one began."""
        newest: dict[UUID, Effect] = {}
        order, overlap = [], []
        for effect in self.effects:
            if effect.pid in self.exempt:
                continue
            last = newest.setdefault(effect.session, effect)
            if effect.place < last.place:
                order.append(effect)
            elif (effect.place, effect.attempt) < (last.place, last.attempt):
                overlap.append(effect)
            else:
                newest[effect.session] = effect
        return [
            *_said("effects of a turn after a later turn of its session had begun", order),
            *_said("effects of an attempt after a later attempt had begun", overlap),
        ]

    def forked(self) -> list[str]:
        """An attempt is of one process."""
        pids: dict[Attempt, set[int]] = defaultdict(set)
        for effect in self.effects:
            pids[effect.turn, effect.attempt].add(effect.pid)
        forks = [attempt for attempt, processes in pids.items() if len(processes) > 1]
        return _said("attempts by more than one process", forks)

    def run_again(self) -> list[str]:
        """No attempt after the one that recorded a step's result has begun the step once more."""
        never = 1 << 30
        again = [
            e for e in self.effects if e.what == BEGUN and e.attempt > self.recorded_by.get((e.turn, e.step), never)
        ]
        return _said("finished steps run again", again)

    def recorded_wrongly(self) -> list[str]:
        steps = Counter((f.turn, f.step) for f in self.facts if f.step is not None)
        ends = Counter(f.turn for f in self.facts if f.is_end)
        done = Counter(turn for turn, _ in steps)
        missing = [t for t in self.turns if t.status == "succeeded" and done[t.id] != t.steps]
        unseen = [step for step in self.recorded_by if step not in self.runs]
        return [
            *_said("steps recorded twice", [step for step, times in steps.items() if times > 1]),
            *_said("steps recorded that never began", unseen),
            *_said("turns that succeeded without all their steps", missing),
            *_said("turns that ended twice", [turn for turn, times in ends.items() if times > 1]),
            *([f"{self.gaps:,} sessions have gaps in their seq"] if self.gaps else []),
            *([f"{self.late:,} events of an older epoch stand behind a newer one"] if self.late else []),
            *([f"{self.unsettled:,} sessions are still held, or have open turns"] if self.unsettled else []),
        ]


async def history(
    site: Site, file: Path, *, agents: Iterable[str] = ("work",), exempt: Iterable[int] = (), settle: bool = True
) -> History:
    """All that has happened on the site to turns of ``agents``; ``settle``: when every session has come to rest."""
    names = list(agents)
    unsettled = await _settled(site) if settle else 0
    turns = [Ended(*row) for row in await site.query(TURNS, names)]
    return History(
        effects.read(file),
        list(_facts(await site.query(FACTS, names))),
        turns,
        gaps=(await site.query(GAPS))[0].n,
        late=(await site.query(LATE))[0].n,
        unsettled=unsettled,
        exempt=frozenset(exempt),
    )


async def _settled(site: Site) -> int:
    """Sessions that are not at rest when there was time enough."""

    async def at_rest() -> bool:
        return bool((await site.query(UNSETTLED))[0].n == 0)

    with suppress(AssertionError):
        await until(at_rest, description="no session is held", limit=SETTLING)
    return int((await site.query(UNSETTLED))[0].n)


def _facts(rows: Iterable[tuple[UUID, int, str, float, str | None, int | None]]) -> Iterator[Fact]:
    """Rows in the order of the log: ``turn.started`` says which attempt the events of its epoch belong to."""
    attempts: dict[tuple[UUID, int], int] = {}
    for turn, epoch, kind, at, step, attempt in rows:
        if attempt is not None and kind == "turn.started":
            attempts[turn, epoch] = attempt
        yield Fact(turn, epoch, attempts.get((turn, epoch), 0), kind, at, step if kind == "step.completed" else None)


def _said(what: str, found: Sequence[object]) -> list[str]:
    return [f"{len(found):,} {what}, the first: {found[0]}"] if found else []
