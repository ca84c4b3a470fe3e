"""How long it takes to restore what an agent sees of a session: from a checkpoint, and as the fold of the whole log.

Events of 1 KiB. In a usual session most are steps, which leave no trace in the context: 64 of them are messages, so
that the context has 64 KiB. In the other kind every event is a message, so that the context is as large as the log.
"""

from __future__ import annotations

import json
import time
from uuid import UUID

import psycopg

from longshift.context import restore
from longshift.db.database import Database
from longshift.model import new_id
from tests.benchmarks.figures import Report
from tests.benchmarks.stack import Site, Stack

TEXT = "x" * 940  # with what surrounds it, about 1 KiB of payload
MESSAGES = 64
EVENTS = """
INSERT INTO events (session_id, seq, id, epoch, turn_id, kind, key, payload)
SELECT %(session)s, n, gen_random_uuid(), 1, %(turn)s,
       CASE WHEN n %% %(every)s = 0 THEN 'message.said' ELSE 'step.completed' END, 'key#' || n,
       CASE WHEN n %% %(every)s = 0 THEN %(message)s::json ELSE %(step)s::json END
  FROM generate_series(1, %(total)s) AS n"""
CHECKPOINT = """
INSERT INTO checkpoints (session_id, seq, event_id, context)
SELECT session_id, seq, id, %s FROM events WHERE session_id = %s AND seq = %s"""


async def run(stack: Stack, *, short: bool) -> Report:
    repetitions, sizes = (3, (1000,)) if short else (15, (1000, 10_000))
    report = Report("restore", "restoring the context of a session with events of 1 KiB")
    async with stack.site() as site:
        for total in sizes:
            await _measure(site, report, total=total, messages=MESSAGES, repetitions=repetitions)
        if not short:
            await _measure(site, report, total=sizes[-1], messages=sizes[-1], repetitions=5)
    report.notes.append("The checkpoint is a tenth of the log back. There is no hot copy in Redis yet.")
    return report


async def _measure(site: Site, report: Report, *, total: int, messages: int, repetitions: int) -> None:
    full, session = new_id(), new_id()
    for each in (full, session):
        await _fill(site, each, total=total, messages=messages)
    back = total // 10
    context = (await restore(site.db, session, through=total - back)).context
    saved = json.dumps({"history": context.history, "state": context.state})
    with psycopg.connect(site.database_url, autocommit=True) as connection:
        connection.execute(CHECKPOINT, (saved, session, total - back))
        connection.execute("VACUUM ANALYZE events, checkpoints")
    whole, recent = [], []
    for _ in range(repetitions):
        whole.append(await _restored(site.db, full, total=total))
        recent.append(await _restored(site.db, session, total=total))
    what = f"{total:,} events, context {len(saved) / 1024 * total / (total - back):,.0f} KiB"
    fold = report.add(f"{what}: full fold", "ms", whole)
    checkpoint = report.add(f"{what}: checkpoint {back:,} back", "ms", recent)
    report.ratio(f"{what}: full fold / checkpoint", fold, checkpoint)


async def _fill(site: Site, session: UUID, *, total: int, messages: int) -> None:
    with psycopg.connect(site.database_url, autocommit=True) as connection:
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


async def _restored(db: Database, session: UUID, *, total: int) -> float:
    begun = time.perf_counter()
    restored = await restore(db, session, through=total)
    took = (time.perf_counter() - begun) * 1000
    if restored.context.seq != total:
        raise RuntimeError(f"restored {restored.context.seq} of {total} events")
    return took
