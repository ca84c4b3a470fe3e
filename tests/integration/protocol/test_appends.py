"""The fence: after a claim commits, nothing of an earlier holder commits (P2), and nothing is recorded twice (P4)."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Coroutine
from datetime import timedelta

import pytest
from sqlalchemy import text

from longshift.db import leases, log, upkeep
from longshift.errors import InvalidInput
from longshift.model import Claim, MailKind, TurnStatus, new_id
from tests.integration.protocol.stage import Stage, append, event, finish, leave, start

# What the design forbids: the key alone as a fence. Used to show that each race below is one that the naive form loses.
PLAIN = text("""
INSERT INTO events (session_id, seq, id, epoch, kind, payload)
SELECT :session, n, gen_random_uuid(), :epoch, 'step.completed', '{}'
  FROM generate_series(CAST(:first AS bigint), CAST(:last AS bigint)) n ON CONFLICT DO NOTHING RETURNING seq""")
EXISTS = text("""
INSERT INTO events (session_id, seq, id, epoch, kind, payload)
SELECT :session, :seq, gen_random_uuid(), :epoch, 'step.completed', '{}'
 WHERE EXISTS (SELECT 1 FROM sessions WHERE id = :session AND lease_epoch = CAST(:epoch AS bigint))
ON CONFLICT DO NOTHING RETURNING seq""")


async def taken_over(stage: Stage, claim: Claim) -> Claim:
    """The holder is declared dead, the session rescued and claimed by another."""
    await stage.kill(claim.worker_id)
    assert (await upkeep.rescue(stage.db))[0] == 1
    return (await stage.claim(claim.session_id)).claim


async def test_a_stale_batch_does_not_fork_the_log_after_a_takeover(stage: Stage) -> None:
    stale, turn = await stage.running()
    claim = await taken_over(stage, stale)
    await log.start(stage.db, [start(claim, turn)])

    assert await log.append(stage.db, [append(stale, turn, "a", "b", "c", seq=2)]) == {}

    assert await stage.log(claim.session_id) == [(1, "turn.started"), (2, "turn.started")]
    naive = await stage.db.fetch(PLAIN, {"session": claim.session_id, "epoch": stale.epoch, "first": 2, "last": 4})
    assert [row.seq for row in naive] == [3, 4], "the plain statement lets the stale rows 3 and 4 in"


@pytest.mark.parametrize(
    ("statement", "write"),
    [
        (log.append, lambda claim, turn: append(claim, turn, "a", seq=2)),
        (log.start, lambda claim, turn: start(claim, turn, seq=2)),
        (log.finish, lambda claim, turn: finish(claim, turn, seq=2)),
        (log.leave, lambda claim, turn: leave(claim, turn, seq=2, seen=0)),
    ],
    ids=["append", "start", "finish", "leave"],
)
async def test_a_write_whose_snapshot_still_shows_the_lease_is_refused_at_the_lock(
    stage: Stage, statement: Callable[..., Coroutine[object, object, object]], write: Callable[..., log.Write]
) -> None:
    stale, turn = await stage.running()
    async with stage.slow() as slow:
        async with stage.stopped(statement(slow, [write(stale, turn)])) as late:
            claim = await taken_over(stage, stale)
        assert await late == {}

    assert await stage.log(claim.session_id) == [(1, "turn.started")]
    row = await stage.row(claim.session_id)
    assert (row["lease_worker"], row["open_turns"]) == (claim.worker_id, 1)


async def test_a_condition_read_from_the_snapshot_would_let_the_stale_write_in(stage: Stage) -> None:
    """The ablation of the test above: EXISTS instead of a row lock."""
    stale, _ = await stage.running()
    async with stage.slow() as slow:
        params = {"session": stale.session_id, "epoch": stale.epoch, "seq": 2}
        async with stage.stopped(slow.fetch(EXISTS, params)) as late:
            await taken_over(stage, stale)
        assert len(await late) == 1


async def test_a_rescue_does_not_overtake_an_append_in_flight(stage: Stage) -> None:
    """The claimant would read the end of the log without the row that is about to commit, and lose its first append."""
    claim, turn = await stage.running()
    await stage.kill(claim.worker_id)
    async with stage.db.transaction() as flight:
        written = await flight.execute(log.APPEND, log._run([append(claim, turn, "a", seq=2)]))
        assert len(written.all()) == 1
        assert await upkeep.rescue(stage.db) == (0, [])
        assert await leases.claim(stage.db, [claim.session_id], worker_id=await stage.worker()) == []

    assert (await upkeep.rescue(stage.db))[0] == 1
    assert (await stage.claim(claim.session_id)).claim.last_seq == 2


async def test_a_retry_beside_its_own_first_try_is_recognised_by_a_later_statement(stage: Stage) -> None:
    claim, turn = await stage.running()
    write = append(claim, turn, "a", seq=2)
    async with stage.db.transaction() as zombie:
        await zombie.execute(log.APPEND, log._run([write]))
        assert await log.append(stage.db, [write]) == {}
        during = (await log.standing(stage.db, [(claim, 2)]))[write.key]

    assert (during.held, during.event_id) == (True, None), "so far: the row was locked, try again"
    assert await log.append(stage.db, [write]) == {}
    after = (await log.standing(stage.db, [(claim, 2)]))[write.key]
    assert after.event_id == write.events[0].id
    assert await stage.log(claim.session_id) == [(1, "turn.started"), (2, "a")]


async def test_one_locked_session_does_not_hold_up_the_batch(stage: Stage) -> None:
    held = [await stage.running() for _ in range(3)]
    (locked, _), *free = held
    async with stage.locked(locked.session_id):
        written = await log.append(stage.db, [append(claim, turn, "a", seq=2) for claim, turn in held])

    assert written.keys() == {(claim.session_id, claim.epoch) for claim, _ in free}
    assert (await log.standing(stage.db, [(locked, 2)]))[locked.session_id, locked.epoch].held


async def test_the_fence_holds_where_the_archive_took_the_rows_away(stage: Stage) -> None:
    stale, turn = await stage.running()
    await log.append(stage.db, [append(stale, turn, "a", "b", seq=2)])
    claim = await taken_over(stage, stale)
    await stage.hand.execute("DELETE FROM events WHERE session_id = %s", (claim.session_id,))
    await stage.hand.execute("UPDATE sessions SET archived_through = 3 WHERE id = %s", (claim.session_id,))

    assert await log.append(stage.db, [append(stale, turn, "z", seq=2)]) == {}

    standing = (await log.standing(stage.db, [(claim, 4)]))[claim.session_id, claim.epoch]
    assert (standing.held, standing.last_seq) == (True, 3)
    naive = await stage.db.fetch(PLAIN, {"session": claim.session_id, "epoch": stale.epoch, "first": 2, "last": 2})
    assert len(naive) == 1, "no key stands in the way of the plain statement"


async def test_the_end_of_an_archived_log_is_where_the_archive_ends(stage: Stage) -> None:
    claim, _ = await stage.running()
    await stage.hand.execute("DELETE FROM events WHERE session_id = %s", (claim.session_id,))
    await stage.hand.execute("UPDATE sessions SET archived_through = 1 WHERE id = %s", (claim.session_id,))

    again = await taken_over(stage, claim)

    assert (again.last_seq, again.last_event_id) == (1, None)


@pytest.mark.parametrize("payload", ['{"a":"\0"}', '{"a":', "[" * 100_000 + "]" * 100_000, '{"a":"\ud800"}'])
async def test_a_payload_that_postgres_refuses_is_invalid_input_and_writes_nothing(stage: Stage, payload: str) -> None:
    """InvalidInput lets the journal find the one bad row; anything else would be retried for ever, or end a lane."""
    (claim, turn), (other, other_turn) = await stage.running(), await stage.running()
    bad = log.Append(claim, 2, (event(turn, payload=payload),))

    with pytest.raises(InvalidInput):
        await log.append(stage.db, [bad, append(other, other_turn, "a", seq=2)])

    assert len(await stage.log(other.session_id)) == 1


async def test_finish_after_a_rescue_changes_nothing_though_the_epoch_still_matches(stage: Stage) -> None:
    claim, turn = await stage.running()
    assert await leases.release(stage.db, claim)  # gives the lease back under the same epoch

    assert await log.finish(stage.db, [finish(claim, turn, seq=2)]) == {}

    row = await stage.row(claim.session_id)
    assert (row["lease_epoch"], row["lease_worker"], row["open_turns"]) == (claim.epoch, None, 1)
    naive = await stage.hand.execute(
        "UPDATE sessions SET open_turns = open_turns - 1 WHERE id = %s AND lease_epoch = %s",
        (claim.session_id, claim.epoch),
    )
    assert naive.rowcount == 1, "the epoch alone does not tell a holder from one who gave the lease back"


async def test_a_lost_tail_is_seen_before_anything_is_written_behind_it(stage: Stage) -> None:
    """A failover to a lagging replica: the worker stands at 4, the log ends at 2."""
    claim, turn = await stage.running()
    await log.append(stage.db, [append(claim, turn, "a", "b", "c", seq=2)])
    await stage.hand.execute("DELETE FROM events WHERE session_id = %s AND seq > 2", (claim.session_id,))

    standing = (await log.standing(stage.db, [(claim, 4)]))[claim.session_id, claim.epoch]

    assert (standing.held, standing.event_id, standing.last_seq) == (True, None, 2)


@pytest.mark.parametrize("newer_first", [True, False])
async def test_two_leases_of_one_session_in_a_batch_are_told_apart(stage: Stage, newer_first: bool) -> None:
    """A worker that lost a session and claimed it again has both in its journal until the old turn notices."""
    stale, turn = await stage.running()
    claim = await taken_over(stage, stale)
    writes = [start(claim, turn, seq=2), start(stale, turn, seq=3)]

    answers = await log.start(stage.db, writes if newer_first else writes[::-1])

    assert answers.keys() == {(claim.session_id, claim.epoch)}
    assert await stage.log(claim.session_id) == [(1, "turn.started"), (2, "turn.started")]
    naive = text(log.APPEND.text.replace(" AND o.epoch = r.epoch", ""))
    async with stage.db.transaction() as trial:  # matched by session alone, the lost lease would ride along
        rows = log._run([append(claim, turn, "new", seq=3), append(stale, turn, "x", seq=4)])
        assert len((await trial.execute(naive, rows)).all()) == 2
        await trial.rollback()
    both = [append(claim, turn, "new", seq=3), append(stale, turn, "old", seq=3)]
    assert (await log.append(stage.db, both)).keys() == {(claim.session_id, claim.epoch)}
    ends = [finish(stale, turn, seq=5), finish(claim, turn, seq=4)]
    assert (await log.finish(stage.db, ends)).keys() == {(claim.session_id, claim.epoch)}
    assert (await stage.row(claim.session_id))["open_turns"] == 0


async def test_start_writes_nothing_for_a_turn_that_was_cancelled_meanwhile(stage: Stage) -> None:
    """The cancel commits between the snapshot of the start and its locks."""
    session, turn = await stage.submit()
    claim = (await stage.claim(session)).claim
    async with stage.slow() as slow:
        async with stage.stopped(log.start(slow, [start(claim, turn)])) as starting:
            assert await stage.cancel(turn) == []
        assert (await starting)[session, claim.epoch] == log.Done(flag=False)

    assert await stage.log(session) == []
    assert (await stage.turn(turn))["status"] == "cancelled"


async def test_a_cancel_that_waits_for_a_start_becomes_mail(stage: Stage) -> None:
    session, turn = await stage.submit()
    claim = (await stage.claim(session)).claim
    async with stage.db.transaction() as starting:
        await starting.execute(log.START, log._run([start(claim, turn)]) | {"version": ["1"]})
        cancelling = stage.begin(stage.cancel(turn))
        await stage.until_blocked()
    await cancelling

    assert (await stage.turn(turn))["status"] == "running"
    [mail] = await leases.urgent_mail(stage.db, worker_id=claim.worker_id)
    assert (mail.kind, mail.turn_id) == (MailKind.CANCEL, turn)


async def test_finish_keeps_the_lease_only_for_a_queued_turn(stage: Stage) -> None:
    claim, turn = await stage.running()
    _, second = await stage.submit(claim.session_id)

    kept = (await log.finish(stage.db, [finish(claim, turn, seq=2, keep=True)]))[claim.session_id, claim.epoch]
    assert kept == log.Done(flag=True, more=True)
    await log.start(stage.db, [start(claim, second, seq=3)])
    last = (await log.finish(stage.db, [finish(claim, second, seq=4, keep=True)]))[claim.session_id, claim.epoch]

    assert last == log.Done(flag=False, more=False)
    row = await stage.row(claim.session_id)
    assert (row["lease_worker"], row["ready_at"], row["open_turns"]) == (None, None, 0)


async def test_interrupted_turns_are_queued_again_at_once_or_when_asked(stage: Stage) -> None:
    claim, turn = await stage.running()
    later = (await stage.one("SELECT clock_timestamp() AS now"))["now"] + timedelta(hours=1)
    write = leave(claim, turn, seq=2, seen=claim.mail_seq, status=TurnStatus.QUEUED, until=later)

    assert (await log.leave(stage.db, [write]))[write.key] == log.Done(flag=False)

    row = await stage.row(claim.session_id)
    assert (row["ready_at"], row["head_waiting"]) == (later, False)
    assert await leases.claim(stage.db, [claim.session_id], worker_id=await stage.worker()) == []


async def test_an_error_of_a_statement_does_not_tell_what_was_to_be_written(stage: Stage) -> None:
    secret = new_id().hex
    with pytest.raises(InvalidInput) as refused:
        await stage.db.fetch(text("SELECT 1 / 0, CAST(:payload AS text)"), {"payload": secret})

    assert secret not in "".join(traceback.format_exception(refused.value))
