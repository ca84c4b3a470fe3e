"""Approvals: of two answers the first counts, and an answer wakes its turn as mail does."""

from __future__ import annotations

from uuid import UUID

import pytest

from longshift.db import approvals
from longshift.db.database import Database
from longshift.errors import AlreadyAnswered, InvalidInput, NotFound
from longshift.model import new_id
from tests.integration.protocol.stage import Stage


async def asked(stage: Stage, session: UUID, turn: UUID, *, name: str = "publish") -> UUID:
    approval = new_id()
    await stage.hand.execute(
        "INSERT INTO approvals (id, tenant_id, session_id, turn_id, name) VALUES (%s, %s, %s, %s, %s)",
        (approval, stage.tenant, session, turn, name),
    )
    return approval


async def test_an_answer_is_kept_and_makes_the_session_ready(stage: Stage) -> None:
    claim, turn = await stage.running()
    approval, key = await asked(stage, claim.session_id, turn), new_id()

    record, ring = await approvals.answer(
        stage.db, approval, tenant_id=stage.tenant, answer={"granted": True, "comment": "fine"}, by=key
    )

    assert (record.answer, record.answered_by) == ({"granted": True, "comment": "fine"}, key)
    assert ring == [(claim.session_id, "default")]
    row = await stage.row(claim.session_id)
    assert (row["ready"], row["mail_seq"]) == (True, claim.mail_seq + 1)


async def test_of_two_answers_at_once_one_is_taken_and_the_other_is_told_who_was_first(stage: Stage) -> None:
    claim, turn = await stage.running()
    approval = await asked(stage, claim.session_id, turn)
    other = Database(stage.url)
    async with stage.locked(claim.session_id):
        yes = stage.begin(approvals.answer(stage.db, approval, tenant_id=stage.tenant, answer=True, by=new_id()))
        no = stage.begin(approvals.answer(other, approval, tenant_id=stage.tenant, answer=False, by=new_id()))
        await stage.until_blocked(2)
    outcomes = []
    for task in (yes, no):
        try:
            outcomes.append((await task)[0])
        except AlreadyAnswered as error:
            refusal = str(error)
    await other.close()

    [won] = outcomes
    assert won.answer is not None
    assert ("granted" if won.answer["granted"] else "denied") in refusal
    assert won.answered_by is not None
    assert won.answered_by.hex in refusal
    assert await approvals.find(stage.db, approval, tenant_id=stage.tenant) == won
    assert (await stage.row(claim.session_id))["mail_seq"] == claim.mail_seq + 1


async def test_a_closed_approval_takes_no_answer(stage: Stage) -> None:
    claim, turn = await stage.running()
    approval = await asked(stage, claim.session_id, turn)
    await stage.hand.execute("UPDATE approvals SET closed_at = now()")

    with pytest.raises(AlreadyAnswered, match="closed"):
        await approvals.answer(stage.db, approval, tenant_id=stage.tenant, answer=True)

    assert (await stage.row(claim.session_id))["mail_seq"] == claim.mail_seq


async def test_an_answer_must_say_whether_and_come_from_the_tenant(stage: Stage) -> None:
    claim, turn = await stage.running()
    approval = await asked(stage, claim.session_id, turn)

    for misfit in ("yes", None, {"comment": "?"}, {"granted": 1}, {"granted": True, "comment": 5}):
        with pytest.raises(InvalidInput, match="granted"):
            await approvals.answer(stage.db, approval, tenant_id=stage.tenant, answer=misfit)
    with pytest.raises(NotFound):
        await approvals.answer(stage.db, approval, tenant_id=new_id(), answer=True)


async def test_approvals_are_listed_newest_first_and_page_by_page(stage: Stage) -> None:
    claim, turn = await stage.running()
    ids = [await asked(stage, claim.session_id, turn) for _ in range(4)]
    await approvals.answer(stage.db, ids[1], tenant_id=stage.tenant, answer=False)

    first = await approvals.listed(stage.db, tenant_id=stage.tenant, limit=2)
    rest = await approvals.listed(stage.db, tenant_id=stage.tenant, before=first[-1].id)

    assert [a.id for a in (*first, *rest)] == [ids[3], ids[2], ids[0]]
    assert len(await approvals.listed(stage.db, tenant_id=stage.tenant, open_only=False)) == 4
    assert await approvals.listed(stage.db, tenant_id=new_id()) == []


async def test_a_signal_of_its_name_answers_the_oldest_open_approval_and_is_consumed(stage: Stage) -> None:
    claim, turn = await stage.running()
    first, second = [await asked(stage, claim.session_id, turn, name="go") for _ in range(2)]

    with pytest.raises(InvalidInput, match="granted"):
        await stage.signal(claim.session_id, payload="?")
    await stage.signal(claim.session_id, payload=False)
    await stage.signal(claim.session_id, payload={"granted": True, "more": 1})
    await stage.signal(claim.session_id, payload=True)

    answers = [await approvals.find(stage.db, each, tenant_id=stage.tenant) for each in (first, second)]
    assert [each.answer["granted"] for each in answers if each and each.answer] == [False, True]
    left = await stage.one("SELECT count(*) AS n FROM mail WHERE consumed_at IS NULL")
    assert left == {"n": 1}, "the third found nobody who waits for it"
