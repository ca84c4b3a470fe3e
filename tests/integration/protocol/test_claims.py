"""Claims: one holder, a fresh epoch, and the true end of the log."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from uuid import UUID

from sqlalchemy import text

from longshift.db import leases, log
from longshift.db.database import Database
from longshift.model import new_id
from tests.integration.protocol.stage import Stage, append, finish, start

# The claim as one statement, as it must not be: the end of the log is read in the snapshot of the update.
ONE_STATEMENT = text(
    leases.CLAIM.text.replace(
        "RETURNING s.id", "RETURNING (SELECT max(seq) FROM events e WHERE e.session_id = s.id) last, s.id"
    )
)
FIXED_NOW = text(
    leases.CLAIM.text.replace("ready_at <= clock_timestamp()", "ready_at <= now() AND clock_timestamp() IS NOT NULL")
)


async def ready_again(stage: Stage) -> tuple[UUID, UUID, UUID]:
    """A session with two turns and nothing written: (session, first turn, second turn)."""
    session, first = await stage.submit()
    _, second = await stage.submit(session)
    return session, first, second


async def run_one(stage: Stage, session: UUID, turn: UUID) -> None:
    """Another worker claims the session, runs its first turn and gives it back."""
    claim = (await stage.claim(session)).claim
    await log.start(stage.db, [start(claim, turn)])
    await log.append(stage.db, [append(claim, turn, "a", seq=2)])
    await log.finish(stage.db, [finish(claim, turn, seq=3)])


async def test_a_claim_reads_the_end_of_the_log_after_it_holds_the_session(stage: Stage) -> None:
    """While the claim stands between snapshot and lock, the session is claimed, run and released by another."""
    session, first, second = await ready_again(stage)
    worker = await stage.worker()
    async with stage.slow() as slow:
        async with stage.stopped(leases.claim(slow, [session], worker_id=worker)) as claiming:
            await run_one(stage, session, first)
        [won] = await claiming

    assert won.claim.last_seq == 3
    assert won.turn is not None
    assert won.turn.id == second


async def test_the_end_of_the_log_in_the_claims_own_snapshot_is_stale(stage: Stage) -> None:
    """The ablation of the test above."""
    session, first, _ = await ready_again(stage)
    params = {"sessions": [session], "worker": await stage.worker()}
    async with stage.slow() as slow:
        async with stage.stopped(slow.fetch(ONE_STATEMENT, params)) as claiming:
            await run_one(stage, session, first)
        assert [row.last for row in await claiming] == [None]


async def test_a_claim_takes_a_session_that_got_ready_after_the_claim_began(stage: Stage) -> None:
    """Mail moves ``ready_at`` past the start of the claim's transaction: compared with now() the wake-up is lost."""
    session, _ = await stage.submit()
    worker = await stage.worker()
    async with stage.slow() as slow:
        for statement, taken in ((FIXED_NOW, 0), (leases.CLAIM, 1)):
            async with stage.stopped(slow.fetch(statement, {"sessions": [session], "worker": worker})) as claiming:
                await stage.signal(session)
            assert len(await claiming) == taken


async def test_of_many_claims_at_once_one_wins_and_the_others_are_told_nothing(stage: Stage) -> None:
    session, _ = await stage.submit()
    workers = [await stage.worker() for _ in range(6)]

    won = await asyncio.gather(*(leases.claim(stage.db, [session, new_id()], worker_id=worker) for worker in workers))

    assert sorted(map(len, won)) == [0, 0, 0, 0, 0, 1]


async def test_one_locked_session_does_not_hold_up_a_batch_of_claims(stage: Stage) -> None:
    (first, _), (second, _) = await stage.submit(), await stage.submit()
    async with stage.locked(first):
        won = await leases.claim(stage.db, [first, second], worker_id=await stage.worker())

    assert [w.claim.session_id for w in won] == [second]
    assert (await stage.row(first))["ready"], "the other one is rung by whoever held it, or by the sweeper"


async def test_epochs_are_not_repeated_when_a_session_id_is_deleted_and_made_again(stage: Stage) -> None:
    stale, turn = await stage.running()
    await stage.hand.execute("DELETE FROM sessions WHERE id = %s", (stale.session_id,))
    await stage.hand.execute("DELETE FROM events")
    await stage.hand.execute("DELETE FROM turns")
    await stage.submit(stale.session_id)

    claim = (await stage.claim(stale.session_id, stale.worker_id)).claim  # even by the same worker

    assert claim.epoch > stale.epoch
    assert await log.append(stage.db, [append(stale, turn, "old", seq=1)]) == {}


async def test_a_worker_without_a_row_or_with_a_tombstone_wins_no_claim(stage: Stage) -> None:
    """Nobody would ever rescue a lease whose worker has been forgotten."""
    session, _ = await stage.submit()
    dead = await stage.worker()
    await stage.kill(dead)

    assert await leases.claim(stage.db, [session], worker_id=dead) == []
    assert await leases.claim(stage.db, [session], worker_id=new_id()) == []


async def test_a_claim_whose_reply_was_lost_is_given_back_by_reconcile(stage: Stage) -> None:
    session, _ = await stage.submit()
    lost = (await stage.claim(session)).claim
    standing = await leases.held(stage.db, worker_id=lost.worker_id)

    kept = await leases.reconcile(stage.db, worker_id=lost.worker_id, orphans=[])
    given_back = await leases.reconcile(stage.db, worker_id=lost.worker_id, orphans=standing)

    assert standing == {(session, lost.epoch)}
    assert (kept, given_back) == ([], [(session, "default")])
    assert (await stage.claim(session)).claim.epoch > lost.epoch
    assert await leases.release(stage.db, lost) is False


async def test_a_late_reconcile_takes_no_lease_that_was_won_since(stage: Stage) -> None:
    """It may stand in line for a connection as long as it likes: it names epochs, and those never come again."""
    claim, turn = await stage.running()
    standing = await leases.held(stage.db, worker_id=claim.worker_id)
    await leases.release(stage.db, claim)
    again = (await stage.claim(claim.session_id, claim.worker_id)).claim

    assert await leases.reconcile(stage.db, worker_id=claim.worker_id, orphans=standing) == []

    assert (await stage.row(claim.session_id))["lease_worker"] == claim.worker_id
    assert await log.append(stage.db, [append(again, turn, "a", seq=2)]) != {}


async def test_a_reconcile_takes_nothing_without_the_holder_noticing(stage: Stage) -> None:
    """What is taken from a holder that way is fenced like any other lease that was taken away."""
    claim, turn = await stage.running()

    assert await leases.reconcile(stage.db, worker_id=claim.worker_id, orphans=[(claim.session_id, claim.epoch)])

    assert await log.append(stage.db, [append(claim, turn, "a", seq=2)]) == {}
    again = (await stage.claim(claim.session_id, claim.worker_id)).claim
    assert (await log.standing(stage.db, [(claim, 2), (again, 2)]))[claim.session_id, claim.epoch].held is False


async def test_a_session_claimed_in_vain_is_not_ready_again(stage: Stage) -> None:
    session, turn = await stage.submit()
    claim = (await stage.claim(session)).claim
    await stage.cancel(turn)

    assert await leases.head(stage.db, session) is None
    assert await leases.release(stage.db, claim) is False

    assert (await stage.row(session))["ready_at"] is None


async def test_a_submit_while_a_claim_is_given_back_leaves_the_session_ready(stage: Stage) -> None:
    """The release waits for the submit's row lock and must see its turn."""
    session, turn = await stage.submit()
    claim = (await stage.claim(session)).claim
    await stage.cancel(turn)
    async with stage.locked(session) as submit:
        releasing = stage.begin(leases.release(stage.db, claim))
        await stage.until_blocked()
        await submit.execute(
            "UPDATE sessions SET open_turns = open_turns + 1, next_position = next_position + 1 WHERE id = %s",
            (session,),
        )

    assert await releasing is True
    assert (await stage.row(session))["ready"]


async def test_a_released_turn_can_go_to_another_queue_after_a_delay(stage: Stage) -> None:
    session, _ = await stage.submit()
    claim = (await stage.claim(session)).claim

    assert await leases.release(stage.db, claim, delay=timedelta(hours=1), queue="large")

    row = await stage.row(session)
    assert (row["queue"], row["ready"], row["lease_worker"]) == ("large", False, None)


async def test_a_stopped_claim_does_not_take_a_session_that_is_leased_by_then(stage: Stage, database_url: str) -> None:
    session, _ = await stage.submit()
    worker = await stage.worker()
    assert isinstance(stage.db, Database)
    async with stage.slow() as slow:
        async with stage.stopped(leases.claim(slow, [session], worker_id=worker)) as claiming:
            holder = (await stage.claim(session)).claim
        assert await claiming == []

    assert (await stage.row(session))["lease_epoch"] == holder.epoch
