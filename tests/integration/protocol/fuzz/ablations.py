"""One fix taken away at a time. Each must make the checker speak: or the checker, or the fix, is worth nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch
from uuid import UUID

from sqlalchemy import TextClause, text

from longshift.db import leases, log, upkeep
from longshift.db.database import Database
from longshift.db.views import turn_record
from longshift.errors import Unavailable
from longshift.journal import Item, Journal
from longshift.model import Claim
from tests.integration.protocol.fuzz.world import Plan

BAD_WEATHER = Plan(turns=120, sessions=25, rate=0.02, stall=3, limit=60)
STALE = replace(
    BAD_WEATHER, pauses=0.08, obedience=0, step=0.2, burst=0.8, workers=3
)  # writers who were long overtaken
CROWDED = replace(BAD_WEATHER, doubled=0.8, sessions=12)  # many claims of the same few sessions
DEADLY = replace(BAD_WEATHER, crashes=0.1, rate=0.03)  # workers that die with a claim under way
MAIL = replace(BAD_WEATHER, sessions=150, waits=0.8, look=0.4)  # signals that just miss the look

Patch = tuple[object, str, Any]  # (module or class, attribute, what stands there instead)


@dataclass(frozen=True)
class Ablation:
    """``patches`` makes the naive form; ``breaks`` is what the checker must then say, one of these at least."""

    what: str
    patches: Callable[[], list[Patch]]
    breaks: frozenset[str]
    plan: Plan = BAD_WEATHER

    @contextmanager
    def applied(self) -> Iterator[None]:
        with ExitStack() as stack:
            for target, name, value in self.patches():
                stack.enter_context(patch.object(target, name, value))
            yield


def without(statement: TextClause, *parts: str, instead: str = "") -> TextClause:
    """The statement without ``parts``, each of which must be there."""
    sql = statement.text
    for part in parts:
        assert part in sql, f"{part!r} is not in this statement any more"
        sql = sql.replace(part, instead)
    return text(sql)


WRITES = ("APPEND", "START", "FINISH", "LEAVE")
FORK = frozenset(
    {
        "P2 an older epoch wrote after a newer one",
        "P4 a step is twice in the log",
        "P4 two terminal events",
        "P3 an event outside its turn",
        "P7 a gap in seq",
    }
)
STALE_TURN = FORK | {"P4 a recorded step was started again", "a worker raised IntegrityError", "open_turns is wrong"}
FOOLED = frozenset({"a rightful holder was told that his lease is lost"})
UNTRUE = frozenset({"an acknowledged event is not in the log"})
HANGS = frozenset({"P1 a turn never ended"})


def _plain_append() -> list[Patch]:
    """The key alone decides: multi-row ON CONFLICT DO NOTHING."""
    plain = (
        f"WITH r AS ({log._rows()}) INSERT INTO events ({log._COLUMNS})"
        """
        SELECT session_id, seq, id, epoch, turn_id, kind, key, 1, CAST(payload AS json) FROM r ORDER BY session_id, seq
        ON CONFLICT DO NOTHING RETURNING session_id, epoch"""
    )
    return [(log, "APPEND", text(plain))]


def _epoch_kept() -> list[Patch]:
    """A claim takes no new epoch, and the epoch is all that a write compares."""
    patches: list[Patch] = [
        (log, name, without(getattr(log, name), " AND s.lease_worker = h.worker")) for name in WRITES
    ]
    patches += [
        (leases, "CLAIM", without(leases.CLAIM, "lease_epoch = nextval('epochs')", instead="lease_epoch = 1")),
        (leases, "RECONCILE", without(leases.RECONCILE, " lease_epoch = nextval('epochs'),")),
        (upkeep, "RESCUE", without(upkeep.RESCUE, " lease_epoch = nextval('epochs'),")),
    ]
    return patches


def _ends_in_snapshot() -> list[Patch]:
    """The end of the log is read before the lock. The pause makes a batch of claims as slow as a busy server's."""
    pause = "AND (SELECT true FROM pg_sleep(0.1)) AND lease_worker IS NULL"
    slow = without(leases.CLAIM, "AND lease_worker IS NULL", instead=pause)

    # what the second statement would say, as of the first one's snapshot
    async def claim(db: Database, sessions: Any, *, worker_id: UUID) -> list[leases.Won]:
        async with db.transaction() as connection:
            before = (await connection.execute(leases.ENDS, {"sessions": list(sessions)})).all()
            rows = (await connection.execute(slow, {"sessions": list(sessions), "worker": worker_id})).all()
        ends = {row.claimed_id: row for row in before}
        return [
            leases.Won(
                Claim(
                    session_id=row.id,
                    tenant_id=row.tenant_id,
                    worker_id=worker_id,
                    epoch=row.lease_epoch,
                    mail_seq=row.mail_seq,
                    last_seq=ends[row.id].last_seq,
                    last_event_id=ends[row.id].last_event_id,
                ),
                turn_record(ends[row.id]) if ends[row.id].id is not None else None,
            )
            for row in rows
        ]

    return [(leases, "claim", claim)]


def _no_reconcile() -> list[Patch]:
    async def reconcile(db: Database, *, worker_id: UUID, orphans: Any) -> list[tuple[UUID, str]]:
        return []

    return [(leases, "reconcile", reconcile)]


def _one_shot_rescue() -> list[Patch]:
    """Only those whom this very pass declared dead are looked at, once."""
    tombstone = upkeep.tombstone
    fresh: list[UUID] = []

    async def declare(db: Database, verdict: upkeep.Verdict) -> list[UUID]:
        fresh[:] = await tombstone(db, verdict)
        return fresh

    async def rescue(db: Database, *, limit: int = 1000) -> tuple[int, upkeep.Rung]:
        dead = list(fresh)
        fresh.clear()
        rows = await upkeep.take_away(db, dead, limit=limit) if dead else []
        return len(rows), [(row.id, row.queue) for row in rows if row.ring]

    return [(upkeep, "tombstone", declare), (upkeep, "rescue", rescue)]


def _mail_not_compared() -> list[Patch]:
    return [(log, "LEAVE", without(log.LEAVE, "s.mail_seq <> r.seen OR "))]


def _doubt_is_failure() -> list[Patch]:
    """A write without an answer counts as not done, and is sent again as if it were new."""

    def doubt(journal: Journal, batch: list[Item], error: Unavailable) -> None:
        for lease, _ in batch:
            lease.in_flight = False
            if lease.unacked is not None:
                for entry in lease.unacked[1]:
                    if not entry.future.done():
                        entry.future.set_result(log.Done())
                lease.unacked = None
            journal._dispatch(lease)

    return [(Journal, "_doubt", doubt)]


WEATHERS = {"fair": Plan(), "bad": BAD_WEATHER, "stale": STALE, "crowded": CROWDED, "deadly": DEADLY, "mail": MAIL}
ABLATIONS = {
    "plain-append": Ablation("appends without the row lock", _plain_append, FORK, STALE),
    "epoch-kept": Ablation("claims under the epoch of the lease before", _epoch_kept, STALE_TURN, STALE),
    "ends-in-snapshot": Ablation("the end of the log from before the lock", _ends_in_snapshot, FOOLED, CROWDED),
    "no-reconcile": Ablation("claims whose reply was lost stay", _no_reconcile, HANGS),
    "one-shot-rescue": Ablation("the dead are looked at once", _one_shot_rescue, HANGS, DEADLY),
    "mail-not-compared": Ablation("a suspend forgets mail that came meanwhile", _mail_not_compared, HANGS, MAIL),
    "early-answer": Ablation("a write in doubt is acknowledged", _doubt_is_failure, UNTRUE),
}
