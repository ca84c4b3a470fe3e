"""What a turn waits for, in the database: signals consumed with their record, approvals, children, and stopped clocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import TextClause, text

from longshift.db import approvals, children, deletions, leases, log, mail, retries, upkeep, views
from longshift.db.database import Params
from longshift.db.mail import Wanted
from longshift.errors import AlreadyAnswered, LeaseLost, NotFound
from longshift.events import Kind, NewEvent
from longshift.model import Claim, NewTurn, Prefix, TurnStatus, new_id, show_id
from tests.integration.protocol.stage import Stage, append, finish, leave, start

HOUR = timedelta(hours=1)


async def look(stage: Stage, claim: Claim, name: str = "go", *, most: int = 1) -> mail.Seen:
    return (await mail.look(stage.db, [Wanted(claim.session_id, "signal", name, None, most)]))[0]


def heard(claim: Claim, turn: UUID, *signals: UUID, seq: int) -> log.Append:
    events = [NewEvent(Kind.WAIT_ENDED, turn, "{}", f"$wait_for#{n}", consumes=s) for n, s in enumerate(signals)]
    return log.Append(claim, seq, tuple(events))


async def unread(stage: Stage) -> int:
    return int((await stage.one("SELECT count(*) AS n FROM mail WHERE consumed_at IS NULL"))["n"])


async def taken_over(stage: Stage, claim: Claim) -> Claim:
    await stage.kill(claim.worker_id)
    await upkeep.rescue(stage.db)
    return (await stage.claim(claim.session_id)).claim


# ------------------------------------------------------------------------------------------------------------ signals


async def test_a_look_finds_the_oldest_signals_of_a_name_as_of_one_moment(stage: Stage) -> None:
    claim, _ = await stage.running()
    first, second, _third = [await stage.signal(claim.session_id, n) for n in range(3)]

    seen = await look(stage, claim, most=2)

    assert [identity for identity, _ in seen.found] == [first, second]
    assert [value["payload"] for _, value in seen.found] == [0, 1]
    assert (seen.mail_seq, seen.urgent) == (claim.mail_seq + 3, False)
    assert (await look(stage, claim, "other")).found == []


async def test_a_look_reads_no_more_signals_than_it_wants(stage: Stage) -> None:
    """Thousands may have come first: to read all of them for each would be quadratic."""
    claim, _ = await stage.running()
    await stage.hand.execute(
        "INSERT INTO mail (id, session_id, kind, name) SELECT gen_random_uuid(), %s, 'signal', 'go'"
        " FROM generate_series(1, 2000)",
        (claim.session_id,),
    )
    await stage.hand.execute("ANALYZE mail")

    wanted = {"session": [claim.session_id], "kind": ["signal"], "name": ["go"], "ref": [None], "most": [2]}
    assert await rows_of(stage, mail.LOOK, wanted, table="mail") == 2
    held = {"worker": claim.worker_id, "session": claim.session_id}
    assert await rows_of(stage, leases.MAIL_OF_SESSION, held, table="mail") == 0


async def rows_of(stage: Stage, statement: TextClause, params: Params, *, table: str) -> int:
    """The rows of ``table`` that a statement reads."""
    [row] = await stage.db.fetch(text(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}"), params)

    def read(node: Mapping[str, Any]) -> int:
        own: int = (
            node["Actual Rows"] + node.get("Rows Removed by Filter", 0) if node.get("Relation Name") == table else 0
        )
        return round(own * float(node["Actual Loops"])) + sum(read(child) for child in node.get("Plans", ()))

    return read(row[0][0]["Plan"])


async def test_a_look_says_that_somebody_wants_the_turn_to_end(stage: Stage) -> None:
    claim, turn = await stage.running()
    await stage.cancel(turn)

    assert (await look(stage, claim)).urgent


async def test_a_signal_is_consumed_by_the_statement_that_records_it(stage: Stage) -> None:
    claim, turn = await stage.running()
    first, _second = [await stage.signal(claim.session_id, n) for n in range(2)]
    write = heard(claim, turn, first, seq=2)

    assert await log.append(stage.db, [write, append(claim, turn, "a", seq=3)]) != {}
    assert await unread(stage) == 1
    assert await log.append(stage.db, [write]) == {}, "sent again, it finds its row"
    assert await unread(stage) == 1
    assert [value["payload"] for _, value in (await look(stage, claim)).found] == [1]


async def test_a_stale_holder_consumes_nothing(stage: Stage) -> None:
    claim, turn = await stage.running()
    signal = await stage.signal(claim.session_id)
    await taken_over(stage, claim)

    assert await log.append(stage.db, [heard(claim, turn, signal, seq=2)]) == {}

    assert await unread(stage) == 1


async def test_a_stale_holder_whose_row_is_taken_consumes_nothing_of_its_successor(stage: Stage) -> None:
    """The successor's row stands at that place: nothing is inserted, so nothing is consumed."""
    claim, turn = await stage.running()
    signal = await stage.signal(claim.session_id)
    await log.append(stage.db, [append(claim, turn, "a", seq=2)])

    assert await log.append(stage.db, [heard(claim, turn, signal, seq=2)]) == {}

    assert await unread(stage) == 1


async def test_a_signal_that_commits_after_the_look_makes_the_session_ready_when_its_turn_leaves(stage: Stage) -> None:
    """The signal has the row locked while the worker looks: the look must not see it, nor its number."""
    claim, turn = await stage.running()
    async with stage.locked(claim.session_id) as sending:
        await sending.execute("UPDATE sessions SET mail_seq = mail_seq + 1 WHERE id = %s", (claim.session_id,))
        seen = await look(stage, claim)
        write = leave(claim, turn, seq=2, seen=seen.mail_seq)
        assert await log.leave(stage.db, [write]) == {}, "locked: the journal sends it again"

    assert (await log.leave(stage.db, [write]))[write.key] == log.Done(flag=True)


async def test_a_turn_that_has_taken_its_mail_leaves_without_coming_back_at_once(stage: Stage) -> None:
    """With the number as of its claim it would."""
    claim, turn = await stage.running()
    signal = await stage.signal(claim.session_id)
    await log.append(stage.db, [heard(claim, turn, signal, seq=2)])
    seen = await look(stage, claim)
    write = leave(claim, turn, seq=3, seen=seen.mail_seq)

    assert (await log.leave(stage.db, [write]))[write.key] == log.Done(flag=False)


# ---------------------------------------------------------------------------------------------------------- approvals


async def ask(stage: Stage, claim: Claim, turn: UUID, approval: UUID) -> bool:
    return await approvals.ask(
        stage.db, approval, claim=claim, turn_id=turn, name="publish", show={"b": 1, "a": 2}, expires_at=None
    )


async def test_an_approval_is_opened_once_and_by_the_holder_only(stage: Stage) -> None:
    claim, turn = await stage.running()
    approval = new_id()

    assert await ask(stage, claim, turn, approval)
    assert await ask(stage, claim, turn, approval)
    successor = await taken_over(stage, claim)
    assert not await ask(stage, claim, turn, new_id())
    assert not await approvals.close(stage.db, [approval], claim=claim)

    [found] = await approvals.listed(stage.db, tenant_id=stage.tenant)
    assert (found.id, list(found.show)) == (approval, ["b", "a"])
    assert await approvals.close(stage.db, [approval], claim=successor)


@pytest.mark.parametrize("first", ["answer", "close"])
async def test_of_an_answer_and_the_end_of_the_time_one_counts(stage: Stage, first: str) -> None:
    claim, turn = await stage.running()
    approval = new_id()
    await ask(stage, claim, turn, approval)
    answering = approvals.answer(stage.db, approval, tenant_id=stage.tenant, answer=True)
    closing = approvals.close(stage.db, [approval], claim=claim)
    order: Sequence[object] = ("answer", "close") if first == "answer" else ("close", "answer")
    refused = False
    for what in order:
        try:
            await (answering if what == "answer" else closing)
        except AlreadyAnswered:
            refused = True

    seen = (await mail.look(stage.db, [Wanted(claim.session_id, "approval", "", approval, 1)]))[0]

    assert [value["reason"] for _, value in seen.found] == ["answer" if first == "answer" else "timeout"]
    assert refused == (first == "close")


async def test_an_answer_names_the_key_behind_it_as_the_api_does(stage: Stage) -> None:
    claim, turn = await stage.running()
    by, keyless = new_id(), new_id()
    approval = new_id()
    for each, key in ((approval, by), (keyless, None)):
        await ask(stage, claim, turn, each)
        await approvals.answer(stage.db, each, tenant_id=stage.tenant, answer=True, by=key)

    wanted = [Wanted(claim.session_id, "approval", "", each, 1) for each in (approval, keyless)]
    seen = await mail.look(stage.db, wanted)

    assert [value["by"] for n in (0, 1) for _, value in seen[n].found] == [show_id(Prefix.KEY, by), None]


async def test_an_answer_that_waits_for_the_closing_statement_is_refused(stage: Stage) -> None:
    claim, turn = await stage.running()
    approval = new_id()
    await ask(stage, claim, turn, approval)
    params = {"ids": [approval], "session": claim.session_id, "epoch": claim.epoch, "worker": claim.worker_id}
    async with stage.db.transaction() as closing:
        await closing.execute(approvals.CLOSE, params)
        answering = stage.begin(approvals.answer(stage.db, approval, tenant_id=stage.tenant, answer=True))
        await stage.until_blocked()

    with pytest.raises(AlreadyAnswered, match="was closed at"):
        await answering


async def test_the_end_of_a_turn_closes_what_it_asked(stage: Stage) -> None:
    claim, turn = await stage.running()
    other, others_turn = await stage.running()
    mine, theirs, answered = new_id(), new_id(), new_id()
    await ask(stage, claim, turn, mine)
    await ask(stage, claim, turn, answered)
    await ask(stage, other, others_turn, theirs)
    await approvals.answer(stage.db, answered, tenant_id=stage.tenant, answer=True)

    await log.finish(stage.db, [finish(claim, turn, seq=2)])

    assert [a.id for a in await approvals.listed(stage.db, tenant_id=stage.tenant)] == [theirs]
    found = await approvals.find(stage.db, answered, tenant_id=stage.tenant)
    assert found is not None
    assert found.closed_at is None


# ----------------------------------------------------------------------------------------------------- stopped clocks


async def test_a_deadline_moves_by_the_time_for_which_the_clock_was_stopped(stage: Stage) -> None:
    claim, turn = await stage.running()
    before = (await stage.turn(turn))["deadline"]
    write = replace(leave(claim, turn, seq=2, seen=claim.mail_seq), stops_clock=True)
    await log.leave(stage.db, [write])
    await stage.hand.execute("UPDATE turns SET clock_stopped_at = clock_stopped_at - interval '1 hour'")

    shown = await views.turn(stage.db, turn, tenant_id=stage.tenant)
    assert shown is not None
    assert HOUR <= shown.deadline - before < HOUR + timedelta(minutes=1)
    await stage.signal(claim.session_id)
    won = await stage.claim(claim.session_id)
    assert won.turn is not None
    assert won.turn.deadline >= shown.deadline, "the runner sets its timer by this"
    await log.start(stage.db, [start(won.claim, turn)])

    row = await stage.turn(turn)
    assert HOUR <= row["deadline"] - before < HOUR + timedelta(minutes=1)
    assert row["clock_stopped_at"] is None


async def test_a_turn_whose_clock_is_stopped_is_not_overdue(stage: Stage) -> None:
    turns = []
    for stops in (True, False):
        claim, turn = await stage.running()
        await log.leave(stage.db, [replace(leave(claim, turn, seq=2, seen=claim.mail_seq), stops_clock=stops)])
        turns.append(turn)
    await stage.hand.execute("UPDATE turns SET deadline = now()")

    assert await upkeep.overdue(stage.db) == turns[1:]


async def test_a_stopped_clock_goes_on_when_nobody_has_the_agent(stage: Stage) -> None:
    """Its wait may be over, but only its agent could tell: without a deadline it would come and go for ever."""
    claim, turn = await stage.running()
    before = (await stage.turn(turn))["deadline"]
    await log.leave(stage.db, [replace(leave(claim, turn, seq=2, seen=claim.mail_seq), stops_clock=True)])
    await stage.hand.execute("UPDATE turns SET clock_stopped_at = clock_stopped_at - interval '1 hour'")
    await stage.signal(claim.session_id)
    won = await stage.claim(claim.session_id)

    assert await leases.release(stage.db, won.claim, delay=timedelta(seconds=5))

    row = await stage.turn(turn)
    assert (row["status"], row["clock_stopped_at"]) == ("waiting", None)
    assert HOUR <= row["deadline"] - before < HOUR + timedelta(minutes=1)
    await stage.hand.execute("UPDATE turns SET deadline = now()")
    assert await upkeep.overdue(stage.db) == [turn]


# ----------------------------------------------------------------------------------------------------------- children


async def spawned(stage: Stage, claim: Claim, parent: UUID, *, session: UUID | None = None) -> tuple[UUID, UUID]:
    turn = NewTurn(agent="echo", input={}, queue="default", deadline=datetime.now(UTC) + HOUR, parent_turn_id=parent)
    session = session or new_id()
    assert await children.spawn(stage.db, turn, session_id=session, holder=claim) == [(session, "default")]
    assert await children.spawn(stage.db, turn, session_id=session, holder=claim) == [], "it is there"
    return session, turn.id


async def ended(stage: Stage, session: UUID, turn: UUID) -> None:
    won = await stage.claim(session)
    await log.start(stage.db, [start(won.claim, turn)])
    await log.finish(stage.db, [finish(won.claim, turn, seq=2)])


async def test_a_child_is_a_turn_like_any_other_and_started_once(stage: Stage) -> None:
    claim, parent = await stage.running()

    session, turn = await spawned(stage, claim, parent)

    record = await views.turn(stage.db, turn, tenant_id=stage.tenant)
    assert record is not None
    assert (record.parent_turn_id, record.root_turn_id, record.position) == (parent, turn, 1)
    row = await stage.row(session)
    assert (row["open_turns"], row["next_position"], row["ready"]) == (1, 1, True)
    await ended(stage, session, turn)


async def test_a_stale_holder_starts_no_child_and_ends_none(stage: Stage) -> None:
    claim, parent = await stage.running()
    _, turn = await spawned(stage, claim, parent)
    await taken_over(stage, claim)
    late = NewTurn(agent="echo", input={}, queue="default", deadline=datetime.now(UTC) + HOUR, parent_turn_id=parent)

    with pytest.raises(LeaseLost):
        await children.spawn(stage.db, late, session_id=new_id(), holder=claim)
    with pytest.raises(LeaseLost):
        await children.cancel(stage.db, parent, holder=claim)

    assert (await stage.turn(turn))["status"] == "queued"
    assert (await stage.one("SELECT count(*) AS n FROM turns")) == {"n": 2}


@pytest.mark.parametrize("by", ["worker", "sweeper"])
async def test_the_end_of_a_child_wakes_its_parent_once(stage: Stage, by: str) -> None:
    claim, parent = await stage.running()
    session, turn = await spawned(stage, claim, parent)
    await log.leave(stage.db, [leave(claim, parent, seq=2, seen=claim.mail_seq)])

    async def tell() -> children.Rung:
        return await (children.tell(stage.db, [turn]) if by == "worker" else children.tell_oldest(stage.db))

    assert await tell() == [], "it has not ended"
    await ended(stage, session, turn)

    assert await tell() == [(claim.session_id, "default")]
    assert await tell() == []

    row = await stage.row(claim.session_id)
    assert (row["ready"], row["mail_seq"]) == (True, claim.mail_seq + 1)


async def failed(stage: Stage, claim: Claim, turn: UUID, *, seq: int) -> None:
    end = replace(finish(claim, turn, seq=seq), status=TurnStatus.FAILED, output=None, error='{"code":"x"}')
    assert await log.finish(stage.db, [end])


async def retried(stage: Stage, turn: UUID) -> UUID:
    now = datetime.now(UTC)
    accepted = await retries.retry(stage.db, turn, tenant_id=stage.tenant, now=now, lifetime=HOUR)
    return accepted.resource_id


async def test_the_retry_of_a_parent_waits_for_the_retry_of_its_child(stage: Stage) -> None:
    """Which is never started a second time: what it has done would be done twice."""
    claim, parent = await stage.running()
    session, child = await spawned(stage, claim, parent)
    won = await stage.claim(session)
    await log.start(stage.db, [start(won.claim, child)])
    await failed(stage, won.claim, child, seq=2)
    await failed(stage, claim, parent, seq=2)
    again, child_again = await retried(stage, parent), await retried(stage, child)
    wanted = [Wanted(claim.session_id, "child", "", child, 1)]

    assert not (await mail.look(stage.db, wanted))[0].found
    won = await stage.claim(session)
    await log.start(stage.db, [start(won.claim, child_again)])
    await log.finish(stage.db, [finish(won.claim, child_again, seq=won.claim.last_seq + 2)])

    assert await children.tell_oldest(stage.db) == [(claim.session_id, "default")]
    [(_, value)] = (await mail.look(stage.db, wanted))[0].found
    assert value["status"] == "succeeded"
    assert (await stage.turn(child_again))["parent_turn_id"] == parent
    assert (await stage.turn(again))["status"] == "queued"


async def test_a_child_that_never_started_is_waited_for_in_its_retry(stage: Stage) -> None:
    """As most are whose parent fails at once; the retry of such a turn has a root of its own."""
    claim, parent = await stage.running()
    session, child = await spawned(stage, claim, parent)
    await children.cancel(stage.db, parent, holder=claim)
    await failed(stage, claim, parent, seq=2)
    await retried(stage, parent)
    again = await retried(stage, child)
    wanted = [Wanted(claim.session_id, "child", "", child, 1)]

    assert not (await mail.look(stage.db, wanted))[0].found
    await ended(stage, session, again)

    assert [value["status"] for _, value in (await mail.look(stage.db, wanted))[0].found] == ["succeeded"]


async def test_the_retry_of_a_parent_does_not_adopt_a_child_that_has_yet_to_hear_that_it_ends(stage: Stage) -> None:
    claim, parent = await stage.running()
    session, child = await spawned(stage, claim, parent)
    won = await stage.claim(session)
    await log.start(stage.db, [start(won.claim, child)])
    await children.cancel(stage.db, parent, holder=claim)
    now = datetime.now(UTC)
    new = NewTurn(agent="echo", input={}, queue="default", deadline=now + HOUR, parent_turn_id=parent)

    for _ in range(2):
        assert (await children.retry(stage.db, new, child, session_id=session, holder=claim, now=now))[0] == new.id

    assert [(await stage.turn(turn))["status"] for turn in (child, new.id)] == ["running", "queued"]


async def test_the_retry_of_a_parent_adopts_the_retry_of_a_child_that_never_started(stage: Stage) -> None:
    claim, parent = await stage.running()
    session, child = await spawned(stage, claim, parent)
    await children.cancel(stage.db, parent, holder=claim)
    by_hand = await retried(stage, child)
    now = datetime.now(UTC)
    new = NewTurn(agent="echo", input={}, queue="default", deadline=now + HOUR, parent_turn_id=parent)

    assert await children.retry(stage.db, new, child, session_id=session, holder=claim, now=now) == (by_hand, [])
    await ended(stage, session, by_hand)
    assert await children.retry(stage.db, new, child, session_id=session, holder=claim, now=now) == (by_hand, [])


async def test_the_children_of_a_turn_end_with_the_retry_that_has_taken_them_over(stage: Stage) -> None:
    claim, parent = await stage.running()
    session, child = await spawned(stage, claim, parent)
    await failed(stage, claim, parent, seq=2)
    again = await retried(stage, parent)
    won = await stage.claim(claim.session_id)

    assert await children.cancel(stage.db, again, holder=won.claim) == []
    assert (await stage.turn(child))["status"] == "cancelled"
    assert (await stage.row(session))["open_turns"] == 0


async def test_a_parent_whose_row_is_locked_is_told_later(stage: Stage) -> None:
    claim, parent = await stage.running()
    session, turn = await spawned(stage, claim, parent)
    await ended(stage, session, turn)

    async with stage.locked(claim.session_id):
        assert await children.tell(stage.db, [turn]) == []

    assert await children.tell_oldest(stage.db) == [(claim.session_id, "default")]


async def test_two_that_tell_at_once_wake_the_parent_once(stage: Stage) -> None:
    claim, parent = await stage.running()
    session, turn = await spawned(stage, claim, parent)
    await ended(stage, session, turn)
    async with stage.slow() as slow:
        async with stage.stopped(children.tell(slow, [turn])) as telling:
            assert await children.tell_oldest(stage.db) == []
        assert await telling == [(claim.session_id, "default")]

    assert (await stage.row(claim.session_id))["mail_seq"] == claim.mail_seq + 1


async def test_a_parent_that_has_ended_is_not_woken(stage: Stage) -> None:
    claim, parent = await stage.running()
    session, turn = await spawned(stage, claim, parent)
    await log.finish(stage.db, [finish(claim, parent, seq=2)])
    await ended(stage, session, turn)

    assert await children.tell_oldest(stage.db) == []

    assert (await stage.turn(turn))["parent_told"]
    assert (await stage.row(claim.session_id))["ready_at"] is None


async def test_a_child_that_ends_between_the_look_and_the_leave_makes_the_session_ready(stage: Stage) -> None:
    claim, parent = await stage.running()
    session, turn = await spawned(stage, claim, parent)
    wanted = [Wanted(claim.session_id, "child", "", turn, 1)]
    seen = (await mail.look(stage.db, wanted))[0]
    assert seen.found == []
    await ended(stage, session, turn)
    await children.tell(stage.db, [turn])

    write = leave(claim, parent, seq=2, seen=seen.mail_seq)
    assert (await log.leave(stage.db, [write]))[write.key] == log.Done(flag=True)

    [(_, value)] = (await mail.look(stage.db, wanted))[0].found
    assert (value["reason"], value["status"]) == ("child", "succeeded")


async def test_a_child_of_a_retried_turn_is_retried_unless_it_stands(stage: Stage) -> None:
    claim, parent = await stage.running()
    session, turn = await spawned(stage, claim, parent)

    async def again() -> tuple[UUID, children.Rung]:
        now = datetime.now(UTC)
        new = NewTurn("echo", "other", "default", parent_turn_id=parent, deadline=now + HOUR)
        return await children.retry(stage.db, new, turn, session_id=session, holder=claim, now=now)

    assert await again() == (turn, []), "it is open"
    won = await stage.claim(session)
    await log.start(stage.db, [start(won.claim, turn)])
    failed = replace(finish(won.claim, turn, seq=2), status=TurnStatus.FAILED, output=None)
    await log.finish(stage.db, [failed])
    retried, ring = await again()

    assert ring == [(session, "default")]
    row = await stage.turn(retried)
    assert (row["retry_of"], row["root_turn_id"], row["parent_turn_id"], row["input"]) == (turn, turn, parent, {})
    assert (row["status"], row["position"]) == ("queued", 2)
    assert await again() == (retried, []), "one of them is enough"
    await taken_over(stage, claim)
    with pytest.raises(LeaseLost):
        await again()


async def test_the_children_of_a_turn_that_ends_without_success_are_asked_to_end(stage: Stage) -> None:
    claim, parent = await stage.running()
    _, unstarted = await spawned(stage, claim, parent)
    session, started = await spawned(stage, claim, parent)
    over_session, over = await spawned(stage, claim, parent)
    won = await stage.claim(session)
    await log.start(stage.db, [start(won.claim, started)])
    await ended(stage, over_session, over)

    assert await children.cancel(stage.db, parent, holder=claim) == [(session, "default")]

    assert [(await stage.turn(t))["status"] for t in (unstarted, started, over)] == [
        "cancelled",
        "running",
        "succeeded",
    ]
    [letter] = await leases.urgent_mail(stage.db, worker_id=won.claim.worker_id)
    assert letter.turn_id == started
    assert await children.cancel(stage.db, parent, holder=claim) == [], "told once"


async def test_a_turn_left_by_its_status_alone_keeps_its_clock(stage: Stage) -> None:
    claim, turn = await stage.running()
    await log.leave(stage.db, [leave(claim, turn, seq=2, seen=claim.mail_seq, status=TurnStatus.QUEUED)])

    assert (await stage.turn(turn))["clock_stopped_at"] is None


async def test_a_child_that_was_deleted_cannot_go_on_and_says_so(stage: Stage) -> None:
    claim, parent = await stage.running()
    session, child = await spawned(stage, claim, parent)
    await ended(stage, session, child)
    await failed(stage, claim, parent, seq=2)
    await deletions.bury(stage.db, session, again=HOUR)
    await deletions.purge(stage.db, session, limit=10)
    again = await retried(stage, parent)
    won = await stage.claim(claim.session_id)
    now = datetime.now(UTC)
    new = NewTurn(agent="echo", input={}, queue="default", deadline=now + HOUR, parent_turn_id=again)

    with pytest.raises(NotFound, match="deleted"):
        await children.retry(stage.db, new, child, session_id=session, holder=won.claim, now=now)
