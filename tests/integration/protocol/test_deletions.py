"""Deleting a session beside others who want to use it: one of them is first, and the other is told."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from uuid import UUID

import pytest

from longshift.db import aging, deletions, leases, log
from longshift.db.database import Database
from longshift.errors import InUse, NotFound
from longshift.model import Claim, new_id
from tests.integration.protocol.stage import Stage, append, finish, start

SOON = timedelta(minutes=1)


async def idle(stage: Stage) -> tuple[Claim, UUID]:
    """A session whose only turn has ended: the lease that it had, and the turn."""
    claim, turn = await stage.running()
    assert await log.finish(stage.db, [finish(claim, turn, seq=2)])
    return claim, turn


async def test_a_submit_that_waits_for_a_deletion_finds_no_session(stage: Stage) -> None:
    claim, _ = await idle(stage)
    session = claim.session_id
    other = Database(stage.url)
    async with stage.second() as deleter, deleter.transaction():
        await deleter.execute("UPDATE sessions SET deleted_at = clock_timestamp() WHERE id = %s", (session,))
        submitting = stage.begin(stage.submit(session, db=other))
        await stage.until_blocked()

    with pytest.raises(NotFound):
        await submitting
    await other.close()


async def test_a_deletion_that_waits_for_a_submit_finds_the_session_in_use(stage: Stage) -> None:
    claim, _ = await idle(stage)
    session = claim.session_id
    other = Database(stage.url)
    async with stage.locked(session) as submitter:
        deleting = stage.begin(deletions.bury(other, session, again=SOON))
        await stage.until_blocked()
        await submitter.execute("UPDATE sessions SET open_turns = 1 WHERE id = %s", (session,))
        await submitter.execute(
            "INSERT INTO turns (id, session_id, tenant_id, position, status, agent, queue, input, root_turn_id, deadline)"
            " VALUES (%s, %s, %s, 2, 'queued', 'echo', 'default', '{}', %s, clock_timestamp())",
            (new_id(), session, stage.tenant, new_id()),
        )

    with pytest.raises(InUse):
        await deleting
    assert (await stage.row(session))["deleted_at"] is None
    await other.close()


async def test_of_two_deletions_one_deletes(stage: Stage) -> None:
    claim, _ = await idle(stage)

    both = [deletions.bury(stage.db, claim.session_id, again=SOON) for _ in range(2)]
    told = await asyncio.gather(*both, return_exceptions=True)

    assert sorted(type(one).__name__ for one in told) == ["Buried", "NotFound"]


async def test_nobody_comes_back_to_a_deleted_session(stage: Stage) -> None:
    claim, turn = await idle(stage)
    session = claim.session_id

    buried = await deletions.bury(stage.db, session, again=SOON, tenant_id=stage.tenant)

    assert (buried.events, buried.epoch > claim.epoch) == (2, True)
    assert await leases.claim(stage.db, [session], worker_id=await stage.worker()) == []
    assert not await log.append(stage.db, [append(claim, turn, "late", seq=3)])
    with pytest.raises(NotFound):
        await stage.signal(session)
    removed = await deletions.purge(stage.db, session, limit=1)
    assert (removed["events"], removed["turns"]) == (2, 1)
    assert await stage.log(session) == []
    with pytest.raises(NotFound):
        await stage.submit(session)


async def test_the_session_of_a_child_stays_as_long_as_its_parent_runs(stage: Stage) -> None:
    parent, parent_turn = await stage.running()
    session, child = await stage.submit()
    await stage.hand.execute("UPDATE turns SET parent_turn_id = %s WHERE id = %s", (parent_turn, child))
    won = await stage.claim(session)
    await log.start(stage.db, [start(won.claim, child)])
    await log.finish(stage.db, [finish(won.claim, child, seq=2)])

    with pytest.raises(InUse, match="child"):
        await deletions.bury(stage.db, session, again=SOON)
    await log.finish(stage.db, [finish(parent, parent_turn, seq=2)])

    assert (await deletions.bury(stage.db, session, again=SOON)).events == 2


async def test_a_session_that_was_used_after_the_sweeper_looked_does_not_expire(stage: Stage) -> None:
    claim, _ = await idle(stage)
    session = claim.session_id
    await stage.hand.execute("UPDATE sessions SET expires_at = clock_timestamp() WHERE id = %s", (session,))
    [found] = await aging.expired(stage.db, [session], ttl=timedelta(0))

    _, again = await stage.submit(session)
    won = await stage.claim(session)
    await log.start(stage.db, [start(won.claim, again)])
    await log.finish(stage.db, [finish(won.claim, again, seq=4)])

    with pytest.raises(InUse):
        await deletions.bury(stage.db, session, again=SOON, unused_since=found.active_at)
