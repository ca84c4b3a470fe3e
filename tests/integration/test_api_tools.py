"""Tool calls over HTTP: the audit trail of a session, and settling what is in doubt."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from sqlalchemy import text

from longshift.db import tool_calls
from longshift.db.keys import Scope
from longshift.db.tool_calls import Ending
from longshift.model import CallOutcome, CallStatus, Prefix, new_id, show_id
from longshift.testing.waiting import wait_until
from longshift_api.schemas_tools import ToolCallPage, ToolCallView
from tests.support.api import Api, Hand

NOBODY = "call_" + "0" * 32
SETTLEMENTS: list[tuple[dict[str, Any], str, object]] = [
    ({"outcome": "done", "result": {"payment": "p-17"}}, "done", {"payment": "p-17"}),
    ({"outcome": "done"}, "done", None),
    ({"outcome": "not_done", "note": "asked the bank"}, "failed", None),
    ({"outcome": "give_up"}, "given_up", None),
]
MISFITS: list[tuple[object, str]] = [
    ({}, "outcome"),
    ({"outcome": "maybe"}, "outcome"),
    ({"outcome": "not_done", "result": 1}, "result"),
    ({"outcome": "give_up", "result": None}, "result"),
    ({"outcome": "done", "note": "x" * 2001}, "note"),
    ({"outcome": "done", "because": "x"}, "because"),
    ([], ""),
]


async def running(api: Api) -> tuple[Hand, dict[str, Any]]:
    """A turn that runs, and the hand that holds its session."""
    turn = await api.submit()
    hand = Hand(api, turn["session_id"])
    await hand.take()
    await hand.start(turn["id"])
    return hand, turn


async def in_doubt(api: Api) -> str:
    """The id of a call that is in doubt."""
    hand, turn = await running(api)
    return await hand.doubt(turn["id"], amount=120)


async def settle(api: Api, call: str, outcome: str = "done", *, key: str | None = None, **body: Any) -> httpx.Response:
    headers = {"Idempotency-Key": key} if key is not None else {}
    return await api.client.post(f"/v1/tool-calls/{call}/settle", json={"outcome": outcome, **body}, headers=headers)


async def test_the_audit_trail_says_who_called_what_how_often_and_what_came_of_it(api: Api) -> None:
    hand, turn = await running(api)
    start = await hand.call(turn["id"], amount=120)
    await tool_calls.end(
        api.db, [Ending(start.claim, start.call, CallOutcome(CallStatus.DONE, result='{"payment": "p-17"}'))]
    )

    page = (await api.client.get(f"/v1/sessions/{turn['session_id']}/tool-calls")).json()

    ToolCallPage.model_validate(page, extra="forbid")
    (call,) = page["data"]
    assert call["id"] == f"call_{start.call.id.hex}"
    assert (call["tool"], call["effect"], call["dedupe"], call["status"]) == ("pay", "irreversible", "turn", "done")
    assert (call["input"], call["result"], call["key"]) == ({"amount": 120}, {"payment": "p-17"}, "pay#0")
    assert (call["turn_id"], call["attempts"], call["timeout_s"]) == (turn["id"], 1, 60.0)
    assert call["worker_id"] == show_id(Prefix.WORKER, start.claim.worker_id)
    assert call["created_at"] <= call["started_at"] <= call["ended_at"]
    assert (await api.client.get(call["links"]["self"])).json() == call
    assert "settle" not in call["links"]


async def test_a_large_result_is_linked(api: Api) -> None:
    hand, turn = await running(api)
    start, artifact = await hand.call(turn["id"]), new_id()
    await tool_calls.end(api.db, [Ending(start.claim, start.call, CallOutcome(CallStatus.DONE, artifact_id=artifact))])

    call = (await api.client.get(f"/v1/tool-calls/call_{start.call.id.hex}")).json()

    assert (call["result"], call["artifact_id"]) == (None, f"art_{artifact.hex}")
    assert call["links"]["artifact"] == f"/v1/artifacts/art_{artifact.hex}"


async def test_the_trail_is_narrowed_by_each_filter_and_goes_back_page_by_page(api: Api) -> None:
    hand, turn = await running(api)
    doubtful = await hand.doubt(turn["id"], "pay")
    others = [f"call_{(await hand.call(turn['id'], 'mail')).call.id.hex}" for _ in range(4)]
    path = f"/v1/sessions/{turn['session_id']}/tool-calls"

    async def ids(**params: Any) -> list[str]:
        answer = await api.client.get(path, params=params)
        assert answer.status_code == 200, answer.text
        return [call["id"] for call in answer.json()["data"]]

    assert await ids(tool="pay") == await ids(status="unknown") == [doubtful]
    assert await ids(tool="mail", status="started") == others[::-1]
    assert await ids(turn_id=turn["id"]) == [*others[::-1], doubtful]
    assert await ids(turn_id="turn_" + "0" * 32) == []
    first = (await api.client.get(path, params={"limit": 3})).json()
    assert first["has_more"] is True
    assert await ids(limit=3, cursor=first["next"]) == [others[0], doubtful]


async def test_open_items_are_those_of_all_sessions_and_of_one_tenant(api: Api) -> None:
    doubtful = [await in_doubt(api) for _ in range(3)]
    hand, turn = await running(api)
    await hand.call(turn["id"])

    page = (await api.client.get("/v1/tool-calls?limit=2")).json()
    rest = (await api.client.get(f"/v1/tool-calls?status=unknown&cursor={page['next']}")).json()
    foreign = (await api.client.get("/v1/tool-calls", headers=await api.key())).json()

    assert [call["id"] for call in page["data"] + rest["data"]] == doubtful[::-1]
    assert foreign == {"has_more": False, "next": None, "data": []}
    assert page["data"][0]["links"]["settle"] == f"/v1/tool-calls/{doubtful[-1]}/settle"


async def test_an_operator_says_what_became_of_a_call(api: Api) -> None:
    for body, status, result in SETTLEMENTS:
        call = await in_doubt(api)

        answer = await api.client.post(f"/v1/tool-calls/{call}/settle", json=body)

        settled = answer.json()
        ToolCallView.model_validate(settled, extra="forbid")
        assert (answer.status_code, settled["status"], settled["result"]) == (200, status, result)
        assert (settled["note"], settled["settled_by"][:4]) == (body.get("note"), "key_")
        assert (await api.client.get(f"/v1/tool-calls/{call}")).json() == settled
    assert (await api.client.get("/v1/tool-calls")).json()["data"] == []


async def test_settling_wakes_the_session(api: Api) -> None:
    hand, turn = await running(api)
    call = await hand.doubt(turn["id"])
    await hand.wait(turn["id"])

    await settle(api, call)

    async def rung() -> bool:
        return await api.edge.hot.backlog(["default"]) == {"default": 2}  # one for the submit

    assert await wait_until(rung, description="a wake-up is in the queue")


async def test_of_two_operators_who_settle_at_once_one_wins_and_the_other_learns_who_did(api: Api) -> None:
    for _ in range(5):
        call = await in_doubt(api)

        answers = await asyncio.gather(settle(api, call, "done", result=1), settle(api, call, "not_done"))

        won, lost = sorted(answers, key=lambda answer: answer.status_code)
        assert (won.status_code, lost.status_code, lost.json()["code"]) == (200, 409, "already_settled")
        now = (await api.client.get(f"/v1/tool-calls/{call}")).json()
        assert now == won.json()
        assert now["settled_by"] in lost.json()["detail"]
        assert f"it is {now['status']}" in lost.json()["detail"]


async def test_the_same_request_again_is_answered_alike_and_another_with_its_key_is_refused(api: Api) -> None:
    call = await in_doubt(api)

    first = await settle(api, call, key="mine", result=1)
    again = await settle(api, call, key="mine", result=1)
    other = await settle(api, call, "give_up", key="mine")

    assert (first.status_code, again.status_code, again.json()) == (200, 200, first.json())
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")


async def test_what_was_refused_is_not_remembered_as_granted(api: Api) -> None:
    call = await in_doubt(api)
    await settle(api, call)

    refusals = [await settle(api, call, "give_up", key="late") for _ in range(2)]

    assert [answer.status_code for answer in refusals] == [409, 409]


async def test_only_what_is_in_doubt_can_be_settled(api: Api) -> None:
    hand, turn = await running(api)
    start = await hand.call(turn["id"])

    answer = await settle(api, f"call_{start.call.id.hex}")

    assert (answer.status_code, answer.json()["code"]) == (409, "not_in_doubt")
    assert "under way since" in answer.json()["detail"]


async def test_a_settlement_that_does_not_fit_is_refused_with_the_place(api: Api) -> None:
    call = await in_doubt(api)
    for body, path in MISFITS:
        answer = await api.client.post(f"/v1/tool-calls/{call}/settle", json=body)

        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_input")
        assert answer.json()["errors"][0]["path"] == path
    assert (await api.client.get(f"/v1/tool-calls/{call}")).json()["status"] == "unknown"


async def test_settling_needs_an_operator_and_looking_a_reader(api: Api) -> None:
    call = await in_doubt(api)
    submitter = await api.key(tenant="default", scopes=frozenset({Scope.SUBMIT, Scope.READ}))
    operator = await api.key(tenant="default", scopes=frozenset({Scope.ADMIN}))
    path = f"/v1/tool-calls/{call}/settle"

    refused = await api.client.post(path, json={"outcome": "not_done"}, headers=submitter)
    seen = await api.client.get(f"/v1/tool-calls/{call}", headers=submitter)
    settled = await api.client.post(path, json={"outcome": "not_done"}, headers=operator)

    assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
    assert "'admin'" in refused.json()["detail"]
    assert (seen.status_code, settled.status_code) == (200, 200)


async def test_a_call_of_another_tenant_or_of_none_is_404(api: Api) -> None:
    call = await in_doubt(api)
    session = (await api.client.get(f"/v1/tool-calls/{call}")).json()["session_id"]
    stranger = await api.key()

    answers = [
        await api.client.get(f"/v1/tool-calls/{call}", headers=stranger),
        await api.client.get(f"/v1/sessions/{session}/tool-calls", headers=stranger),
        await api.client.post(f"/v1/tool-calls/{call}/settle", json={"outcome": "done"}, headers=stranger),
        await api.client.get(f"/v1/tool-calls/{NOBODY}"),
        await api.client.get("/v1/tool-calls/turn_" + "0" * 32),
        await settle(api, NOBODY),
        await settle(api, NOBODY, key="k"),
        await settle(api, NOBODY, key="k"),
    ]

    assert {answer.status_code for answer in answers} == {404}
    assert (await api.db.fetch(text("SELECT count(*) AS n FROM idempotency")))[0].n == 0


async def test_a_filter_of_calls_that_does_not_fit_is_refused(api: Api) -> None:
    session = await api.session()
    queries = ("status=done", "status=maybe", "limit=0", "cursor=abc", "tool=pay", "session_id=" + "0" * 32)
    paths = [f"/v1/tool-calls?{query}" for query in queries]
    paths += [f"/v1/sessions/{session}/tool-calls?{query}" for query in ("status=maybe", "turn_id=1", "agent=echo")]

    for path in paths:
        assert (await api.client.get(path)).status_code == 422, path
