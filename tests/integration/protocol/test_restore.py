"""Restoring a context: the fold of the log, at the price of what came after the newest checkpoint."""

from __future__ import annotations

import json

from longshift.context import keep, restore
from longshift.db import log
from longshift.events import Kind
from longshift.model import Claim
from tests.integration.protocol.stage import Stage, event

EVENTS = 60
TEXT = "x" * 1000


async def _talk(stage: Stage, claim: Claim, *, first: int, last: int) -> None:
    """Messages with the places ``first`` to ``last``."""
    said = [
        event(
            None, Kind.MESSAGE_SAID, key=f"say-{seq}", payload=json.dumps({"role": "user", "content": f"{seq} {TEXT}"})
        )
        for seq in range(first, last + 1)
    ]
    assert await log.append(stage.db, [log.Append(claim, first, tuple(said))])


async def test_a_restore_reads_only_what_came_after_the_checkpoint(stage: Stage) -> None:
    """What the checkpoint covers is taken away: the restore must not miss it."""
    session, _ = await stage.submit()
    claim = (await stage.claim(session)).claim
    await _talk(stage, claim, first=1, last=EVENTS - 10)
    assert await keep(stage.db, claim, (await restore(stage.db, session, through=EVENTS - 10)).fold, every=EVENTS - 10)
    await _talk(stage, claim, first=EVENTS - 9, last=EVENTS)
    whole = await restore(stage.db, session, through=EVENTS)
    await stage.hand.execute("DELETE FROM events WHERE session_id = %s AND seq <= %s", (session, EVENTS - 10))

    restored = await restore(stage.db, session, through=EVENTS)

    assert restored.context == whole.context
    assert [message["content"].split()[0] for message in restored.context.history] == [
        str(seq) for seq in range(1, EVENTS + 1)
    ]


async def _note(stage: Stage, claim: Claim, seq: int) -> None:
    """The state, which is written again and again."""
    payload = json.dumps({"set": {"page": f"{seq} {TEXT}"}})
    noted = event(None, Kind.STATE_CHANGED, key=f"note-{seq}", payload=payload)
    assert await log.append(stage.db, [log.Append(claim, seq, (noted,))])


async def test_checkpoints_together_cost_no_more_than_the_log(stage: Stage) -> None:
    """After each event one is kept if it pays; two of them are never more than a few, whatever the length of the log."""
    session, _ = await stage.submit()
    claim = (await stage.claim(session)).claim
    written = 0
    for seq in range(1, EVENTS + 1):
        await _note(stage, claim, seq)
        restored = await restore(stage.db, session, through=seq)
        if await keep(stage.db, claim, restored.fold):
            newest = (
                "SELECT length(context::text) AS size FROM checkpoints WHERE session_id = %s ORDER BY seq DESC LIMIT 1"
            )
            written += (await stage.one(newest, session))["size"]

    row = await stage.one("SELECT count(*) AS n FROM checkpoints WHERE session_id = %s", session)
    assert row["n"] == 2
    size = await stage.one("SELECT sum(length(payload::text)) AS bytes FROM events WHERE session_id = %s", session)
    assert 0 < written <= size["bytes"]


async def test_a_session_that_only_grows_is_not_stored_once_more_by_its_checkpoints(stage: Stage) -> None:
    """Its log is no longer than a checkpoint would be. As soon as it is, one is kept."""
    session, _ = await stage.submit()
    claim = (await stage.claim(session)).claim
    await _talk(stage, claim, first=1, last=EVENTS)
    assert not await keep(stage.db, claim, (await restore(stage.db, session, through=EVENTS)).fold)
    for seq in range(EVENTS + 1, 2 * EVENTS):
        await _note(stage, claim, seq)
        if await keep(stage.db, claim, (await restore(stage.db, session, through=seq)).fold):
            break
    assert seq < EVENTS + 5
