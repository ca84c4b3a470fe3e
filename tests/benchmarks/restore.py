"""How long it takes to restore what an agent sees of a session: a hot copy, a checkpoint, and the fold of the whole log.

Events of 1 KiB. In a usual session most are steps, which leave no trace in the context: 64 of them are messages, so
that the context has 64 KiB. In the other kind every event is a message, so that the context is as large as the log.
Sessions of many turns have a summary whenever their context passes its budget, as an agent with one has.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import UUID

import psycopg
from psycopg.types.json import Json as AsJson

from longshift.context import Tier, Tiers, is_due, restore
from longshift.db.checkpoints import KEEP
from longshift.events import Context, Kind
from longshift.lease import Fold
from longshift.model import Claim, Json, Kept, new_id
from tests.benchmarks.figures import Report
from tests.benchmarks.stack import Site, Stack

TEXT = "x" * 940  # with what surrounds it, about 1 KiB of payload
MESSAGES = 64
BUDGET = 64 * 1024
"""Characters of a context above which the oldest half of it is summarized."""
EVENTS = """
INSERT INTO events (session_id, seq, id, epoch, turn_id, kind, key, payload)
SELECT %(session)s, n, gen_random_uuid(), 1, %(turn)s,
       CASE WHEN n %% %(every)s = 0 THEN 'message.said' ELSE 'step.completed' END, 'key#' || n,
       CASE WHEN n %% %(every)s = 0 THEN %(message)s::json ELSE %(step)s::json END
  FROM generate_series(1, %(total)s) AS n"""
SESSION = "INSERT INTO sessions (id, tenant_id, queue) VALUES (%s, %s, 'default') ON CONFLICT DO NOTHING"
CHECKPOINT = "INSERT INTO checkpoints (session_id, seq, event_id, context) VALUES (%s, %s, %s, %s)"


@dataclass(frozen=True)
class Session:
    """A session with a log, as the claim of its next turn sees it."""

    site: Site
    id: UUID
    last_seq: int
    event_id: UUID

    @property
    def claim(self) -> Claim:
        return Claim(self.id, self.site.tenant, new_id(), 1, 0, self.last_seq, self.event_id)

    async def heat(self) -> None:
        """Let Redis have the context, as after a turn's end."""
        context = (await restore(self.site.db, self.id, through=self.last_seq)).context
        key = self.site.tenant, self.id
        if not await self.site.hot.contexts.store(key, context, epoch=1, kept=Kept()):
            raise RuntimeError("Redis does not take a copy")

    async def restored(self, tier: Tier) -> float:
        """Milliseconds of what the start of a turn does, if it finds the context there."""
        hot = tier is Tier.HOT
        tiers, claim = Tiers(contexts=self.site.hot.contexts), self.claim if hot else None
        begun = time.perf_counter()
        restored = await restore(
            self.site.db, self.id, through=self.last_seq, event_id=self.event_id, claim=claim, tiers=tiers
        )
        took = (time.perf_counter() - begun) * 1000
        if restored.context.seq != self.last_seq or restored.tier is not tier:
            raise RuntimeError(f"restored {restored.context.seq} of {self.last_seq} events, {restored.tier}")
        return took


async def run(stack: Stack, *, short: bool) -> Report:
    repetitions, sizes, lengths = (3, (1000,), (10,)) if short else (31, (1000, 10_000), (10, 100, 1000))
    report = Report("restore", "restoring the context of a session with events of 1 KiB")
    async with stack.site() as site:
        for total in sizes:
            await _measure(site, report, total=total, messages=MESSAGES, repetitions=repetitions)
        if not short:
            await _measure(site, report, total=sizes[-1], messages=sizes[-1], repetitions=5)
        for turns in lengths:
            await _many_turns(site, report, turns=turns, repetitions=repetitions)
    report.notes.append(
        "The checkpoint is a tenth of the log back. Hot is the read of a copy in Redis, as a turn's start does it."
    )
    return report


async def _measure(site: Site, report: Report, *, total: int, messages: int, repetitions: int) -> None:
    full, session = (fill(site, total=total, messages=messages) for _ in range(2))
    back = total // 10
    context = (await restore(site.db, session.id, through=total - back)).context
    size = save_checkpoint(site, session.id, context)
    _settle(site)
    if messages < total:  # a context as large as the log is too large for Redis
        await session.heat()
    whole = [await full.restored(Tier.WARM) for _ in range(repetitions)]
    recent = [await session.restored(Tier.WARM) for _ in range(repetitions)]
    what = f"{total:,} events, context {size / 1024 * total / (total - back):,.0f} KiB"
    fold = report.add(f"{what}: full fold", "ms", whole)
    checkpoint = report.add(f"{what}: cold, checkpoint {back:,} back", "ms", recent)
    report.ratio(f"{what}: full fold / cold", fold, checkpoint)
    if messages < total:
        copies = [await session.restored(Tier.HOT) for _ in range(repetitions)]
        report.ratio(f"{what}: cold / hot", checkpoint, report.add(f"{what}: hot", "ms", copies))


def fill(site: Site, *, total: int, messages: int, session: UUID | None = None) -> Session:
    session = session or new_id()
    with psycopg.connect(site.database_url, autocommit=True) as connection:
        connection.execute(SESSION, (session, site.tenant))
        connection.execute(
            EVENTS,
            {
                "session": session,
                "turn": new_id(),
                "every": total // messages,
                "total": total,
                "message": json.dumps({"role": "assistant", "content": TEXT}),
                "step": json.dumps({"name": "read", "digest": "0123456789abcdef", "ms": 12, "result": TEXT}),
            },
        )
        row = connection.execute(
            "SELECT id FROM events WHERE session_id = %s AND seq = %s", (session, total)
        ).fetchone()
    assert row is not None
    return Session(site, session, total, row[0])


def save_checkpoint(site: Site, session: UUID, context: Context) -> int:
    saved = json.dumps({"history": context.history, "state": context.state})
    with psycopg.connect(site.database_url, autocommit=True) as connection:
        connection.execute(CHECKPOINT, (session, context.seq, context.event_id, saved))
    return len(saved)


def _settle(site: Site) -> None:
    with psycopg.connect(site.database_url, autocommit=True) as connection:
        connection.execute("VACUUM ANALYZE events, checkpoints")


# -- sessions of many turns


async def _many_turns(site: Site, report: Report, *, turns: int, repetitions: int) -> None:
    session, size = _talk(site, turns=turns)
    _settle(site)
    await session.heat()
    what = f"turn {turns + 1:,} of a session, {session.last_seq:,} events, context {size / 1024:,.0f} KiB"
    for tier, name in ((Tier.WARM, "cold"), (Tier.HOT, "hot")):
        report.add(f"{what}: {name}", "ms", [await session.restored(tier) for _ in range(repetitions)])


def _talk(site: Site, *, turns: int) -> tuple[Session, int]:
    """A session of so many turns, with the checkpoints that it would have; and the size of its context."""
    session, fold = new_id(), Fold(Context(), Kept())
    kept: list[tuple[int, UUID | None, str]] = []
    with psycopg.connect(site.database_url, autocommit=True) as connection, connection.cursor() as cursor:
        cursor.execute(SESSION, (session, site.tenant))
        columns = "session_id, seq, id, epoch, turn_id, kind, key, payload"
        with cursor.copy(f"COPY events ({columns}) FROM STDIN") as copy:
            for _ in range(turns):
                if is_due(fold):
                    text = json.dumps({"history": fold.context.history, "state": fold.context.state})
                    kept = [*kept[1 - KEEP :], (fold.context.seq, fold.context.event_id, text)]
                    fold.kept = Kept(fold.context.seq)
                turn = new_id()
                for kind, payload in _turn(fold.context):
                    seq, event_id, text = fold.context.seq + 1, new_id(), json.dumps(payload)
                    copy.write_row((session, seq, event_id, 1, turn, kind, f"{kind}#{seq}", AsJson(payload)))
                    fold.add(seq, event_id, kind=kind, payload=text, turn_id=turn)
        for at, of, text in kept:
            cursor.execute(CHECKPOINT, (session, at, of, text))
    assert fold.context.event_id is not None
    return Session(site, session, fold.context.seq, fold.context.event_id), fold.context.size


def _turn(context: Context) -> Iterator[tuple[Kind, Json]]:
    """A question, four steps, an answer; before them a summary, if the context is over its budget."""
    yield Kind.TURN_STARTED, {"attempt": 1, "input": TEXT}
    if context.size > BUDGET:
        replaces = len(context.messages) // 2
        yield Kind.CONTEXT_SUMMARIZED, {"replaces": replaces, "role": "system", "content": TEXT, "tokens": {}}
    for _ in range(4):
        yield Kind.STEP_COMPLETED, {"name": "read", "digest": "0123456789abcdef", "ms": 12, "result": TEXT}
    yield Kind.TURN_SUCCEEDED, {"output": TEXT}
