"""What a turn has produced so far, what it waits for, and retries, over HTTP."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
from sqlalchemy import text

from longshift.events import Kind
from longshift.model import Prefix, parse_id
from longshift_api.schemas import TurnView
from longshift_api.schemas_tools import StepPage
from tests.support.api import Api, Hand

AT = "2026-01-31T12:00:00+00:00"
BROKEN = {"code": "step_failed", "message": "no such luck"}


async def running(api: Api) -> tuple[Hand, dict[str, Any]]:
    """A turn that runs, and the hand that holds its session."""
    turn = await api.submit()
    hand = Hand(api, turn["session_id"])
    await hand.take()
    await hand.start(turn["id"])
    return hand, turn


async def record(hand: Hand, turn_id: str, name: str, **payload: Any) -> None:
    kind = Kind.STEP_FAILED if "error" in payload else Kind.STEP_COMPLETED
    await hand.append(turn_id, {"name": name, "digest": "d", "at": AT, **payload}, kind=kind, key=f"{name}#0")


async def steps(api: Api, turn_id: str, **params: Any) -> list[dict[str, Any]]:
    answer = await api.client.get(f"/v1/turns/{turn_id}/steps", params=params)
    assert answer.status_code == 200, answer.text
    StepPage.model_validate(answer.json(), extra="forbid")
    return list(answer.json()["data"])


async def test_a_running_turn_shows_each_step_it_has_recorded_and_nothing_else(api: Api) -> None:
    hand, turn = await running(api)
    await record(hand, turn["id"], "search", result={"hits": 3}, ms=12)
    await hand.append(turn["id"], {"value": 1}, kind=Kind.VALUE_RECORDED, key="$now#0")
    call = "call_" + "1" * 32
    await record(hand, turn["id"], "pay", result=None, ms=1500, attempts=3, call=call)
    await record(hand, turn["id"], "mail", error={"type": "OSError", "message": "no route"})

    shown = await steps(api, turn["id"])

    assert shown[0] == {
        "seq": 2,
        "turn_id": turn["id"],
        "key": "search#0",
        "name": "search",
        "status": "completed",
        "result": {"hits": 3},
        "artifact": None,
        "error": None,
        "attempts": 1,
        "ms": 12,
        "at": "2026-01-31T12:00:00Z",
        "tool_call_id": None,
    }
    assert [(s["name"], s["attempts"], s["tool_call_id"]) for s in shown[1:]] == [
        ("pay", 3, call),
        ("mail", None, None),
    ]
    assert (shown[2]["status"], shown[2]["error"]) == ("failed", {"type": "OSError", "message": "no route"})


async def test_steps_go_on_page_by_page_and_later(api: Api) -> None:
    hand, turn = await running(api)
    for number in range(5):
        await record(hand, turn["id"], f"s{number}", result=number)
    path = f"/v1/turns/{turn['id']}/steps"

    first = (await api.client.get(f"{path}?limit=2")).json()
    rest = (await api.client.get(f"{path}?after={first['next']}")).json()
    await record(hand, turn["id"], "late", result=9)

    assert ([s["result"] for s in first["data"]], first["has_more"]) == ([0, 1], True)
    assert ([s["result"] for s in rest["data"]], rest["has_more"]) == ([2, 3, 4], False)
    assert [s["name"] for s in await steps(api, turn["id"], after=rest["next"])] == ["late"]


async def test_a_turn_that_has_not_started_and_one_of_nobody_have_no_steps(api: Api) -> None:
    turn = await api.submit()
    path = f"/v1/turns/{turn['id']}/steps"

    assert await steps(api, turn["id"]) == []
    assert (await api.client.get(path, headers=await api.key())).status_code == 404
    assert (await api.client.get("/v1/turns/turn_" + "0" * 32 + "/steps")).status_code == 404
    for query in ("limit=0", "limit=1001", "after=-1", "cursor=x"):
        assert (await api.client.get(f"{path}?{query}")).status_code == 422, query


async def test_the_steps_of_a_neighbour_in_the_session_are_not_shown(api: Api) -> None:
    hand, first = await running(api)
    second = await api.submit(f"/v1/sessions/{first['session_id']}/turns")
    await record(hand, first["id"], "one", result=1)
    await hand.succeed(first["id"])
    await hand.start(second["id"])
    await record(hand, second["id"], "two", result=2)

    assert [step["name"] for step in await steps(api, first["id"])] == ["one"]
    assert [step["name"] for step in await steps(api, second["id"])] == ["two"]


async def test_a_waiting_turn_says_what_it_waits_for(api: Api) -> None:
    hand, turn = await running(api)
    soon = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    approval, child, call = f"apr_{'9' * 32}", f"turn_{'8' * 32}", f"call_{'7' * 32}"
    waits: dict[str, dict[str, Any]] = {
        "$sleep#0": {"until": soon.isoformat()},
        "go#0": {"until": None, "signal": "go"},
        "seen#0": {"until": soon.isoformat(), "signal": "seen"},
        "$approval#0": {"until": None, "approval": "publish", "id": approval, "show": 1},
        "$child#0": {"until": None, "child": child},
        "$settled#0": {"until": None, "call": call},
        "$sleep#1": {"until": AT},  # long over: a timer has no other end
    }
    for key, payload in waits.items():
        await hand.append(turn["id"], payload, kind=Kind.WAIT_BEGUN, key=key)
    await hand.append(turn["id"], {"reason": "signal"}, kind=Kind.WAIT_ENDED, key="seen#0")
    again = {"name": "fetch", "attempt": 2, "until": soon.isoformat(), "error": {"type": "OSError", "message": "busy"}}
    for key in ("fetch#0", "fetch#1"):
        await hand.append(turn["id"], again, kind=Kind.STEP_RETRYING, key=key)
    await hand.append(turn["id"], {"name": "fetch", "result": 1}, key="fetch#0")
    path = f"/v1/turns/{turn['id']}"
    assert (await api.client.get(path)).json()["waiting_for"] is None  # it runs

    await hand.wait(turn["id"], soon)

    shown = (await api.client.get(path)).json()
    TurnView.model_validate(shown, extra="forbid")
    until = soon.isoformat().replace("+00:00", "Z")
    assert shown["status"] == "waiting"
    assert shown["waiting_for"] == [
        {"kind": "timer", "name": None, "id": None, "until": until},
        {"kind": "signal", "name": "go", "id": None, "until": None},
        {"kind": "approval", "name": "publish", "id": approval, "until": None},
        {"kind": "child", "name": None, "id": child, "until": None},
        {"kind": "call", "name": None, "id": call, "until": None},
        {"kind": "retry", "name": "fetch", "id": None, "until": until},
    ]
    (listed,) = (await api.client.get("/v1/turns?status=waiting")).json()["data"]
    assert listed["waiting_for"] is None


async def test_what_lost_a_race_is_not_waited_for_any_more(api: Api) -> None:
    hand, turn = await running(api)
    for key in ("0.0/$wait_for#0", "1.0/$wait_for#0", "1.1/0.0/$wait_for#0"):
        await hand.append(turn["id"], {"until": None, "signal": key}, kind=Kind.WAIT_BEGUN, key=key)
    for key, payload in (("0.0/$race#0", {"winner": 1}), ("$race#0", {"winner": 1}), ("2.0/$race#0", {"winner": 0})):
        await hand.append(turn["id"], payload, kind=Kind.VALUE_RECORDED, key=key)
    for key in ("2.0/$wait_for#0", "2.1/$wait_for#0"):
        await hand.append(turn["id"], {"until": None, "signal": key}, kind=Kind.WAIT_BEGUN, key=key)
    await hand.wait(turn["id"])

    shown = (await api.client.get(f"/v1/turns/{turn['id']}")).json()

    assert [wait["name"] for wait in shown["waiting_for"]] == ["2.0/$wait_for#0", "2.1/$wait_for#0"]


async def failed(api: Api) -> tuple[Hand, dict[str, Any]]:
    """A turn that has done a step and then failed, and the hand that still holds its session."""
    turn = await api.submit(metadata={"customer": "42"})
    await api.submit(f"/v1/sessions/{turn['session_id']}/turns")  # for which the hand keeps the session
    hand = Hand(api, turn["session_id"])
    await hand.take()
    await hand.start(turn["id"])
    await record(hand, turn["id"], "search", result=3)
    await record(hand, turn["id"], "mail", error={"type": "OSError", "message": "no route"})
    await hand.fail(turn["id"], BROKEN)
    return hand, turn


async def retry(api: Api, turn: dict[str, Any], *, key: str | None = None, **body: Any) -> httpx.Response:
    headers = {"Idempotency-Key": key} if key is not None else {}
    return await api.client.post(f"/v1/turns/{turn['id']}/retry", json=body or None, headers=headers)


async def test_a_retry_is_a_new_turn_with_the_steps_of_those_before_it(api: Api) -> None:
    hand, turn = await failed(api)

    answer = await retry(api, turn)

    again = answer.json()
    TurnView.model_validate(again, extra="forbid")
    assert (answer.status_code, answer.headers["location"]) == (202, f"/v1/turns/{again['id']}")
    assert (again["status"], again["retry_of"], again["root_turn_id"]) == ("queued", turn["id"], turn["id"])
    assert (again["session_id"], again["input"], again["metadata"]) == (
        turn["session_id"],
        turn["input"],
        {"customer": "42"},
    )
    assert [step["turn_id"] for step in await steps(api, again["id"])] == [turn["id"]] * 2
    await hand.start(again["id"])
    await record(hand, again["id"], "mail", result="sent")
    told = [(step["name"], step["status"], step["turn_id"]) for step in await steps(api, again["id"])]
    assert told == [
        ("search", "completed", turn["id"]),
        ("mail", "failed", turn["id"]),
        ("mail", "completed", again["id"]),
    ]
    assert len(await steps(api, turn["id"])) == 2


async def test_a_retry_of_a_retry_shows_the_steps_of_all_and_each_only_those_before_it(api: Api) -> None:
    hand, first = await failed(api)
    second = (await retry(api, first)).json()
    await hand.start(second["id"])
    await record(hand, second["id"], "two", result=2)
    await hand.fail(second["id"], BROKEN)
    third = (await retry(api, first)).json()  # of the first, by somebody who does not know of the second
    await hand.start(third["id"])
    await record(hand, third["id"], "three", result=3)

    assert [step["name"] for step in await steps(api, third["id"])] == ["search", "mail", "two", "three"]
    assert [step["name"] for step in await steps(api, second["id"])] == ["search", "mail", "two"]
    assert [step["name"] for step in await steps(api, first["id"])] == ["search", "mail"]


async def test_only_a_turn_that_ended_without_success_can_be_retried_and_once_at_a_time(api: Api) -> None:
    _, turn = await failed(api)
    queued = await api.submit()
    done = await api.submit()
    await Hand(api, done["session_id"]).run(done["id"])

    answers = await asyncio.gather(*(retry(api, turn) for _ in range(5)))

    assert sorted(answer.status_code for answer in answers) == [202, 409, 409, 409, 409]
    assert {answer.json()["code"] for answer in answers if answer.status_code == 409} == {"retried"}
    for other, code in ((queued, "not_ended"), (done, "succeeded")):
        refused = await retry(api, other)
        assert (refused.status_code, refused.json()["code"]) == (409, code)
        assert other["id"] in refused.json()["detail"]


async def test_the_same_retry_again_with_its_key_is_the_same_turn(api: Api) -> None:
    _, turn = await failed(api)

    answers = await asyncio.gather(*(retry(api, turn, key="again") for _ in range(5)))

    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("idempotent-replayed" in answer.headers for answer in answers) == 4


async def test_a_retry_that_does_not_fit_is_refused_with_the_place(api: Api) -> None:
    _, turn = await failed(api)
    for body, code, path in (
        ({"agent_version": "9"}, "unknown_agent", "agent"),
        ({"agent_version": ""}, "invalid_input", "agent_version"),
        ({"deadline": "2001-01-01T00:00:00Z"}, "invalid_input", "deadline"),
        ({"deadline": "9999-12-31T23:59:59-12:00"}, "invalid_input", "deadline"),
        ({"deadline": "soon"}, "invalid_input", "deadline"),
        ({"input": {"text": "other"}}, "invalid_input", "input"),
    ):
        refused = await retry(api, turn, **body)
        assert (refused.status_code, refused.json()["code"]) == (422, code), refused.text
        assert refused.json()["errors"][0]["path"] == path
    deadline = (datetime.now(UTC) + timedelta(hours=1)).replace(microsecond=0)

    accepted = (await retry(api, turn, agent_version="1", deadline=deadline.isoformat())).json()

    assert (accepted["agent_version"], datetime.fromisoformat(accepted["deadline"])) == ("1", deadline)


async def test_a_turn_names_the_turns_it_comes_from(api: Api) -> None:
    parent, turn = await api.submit(), await api.submit()
    await api.db.execute(
        text("UPDATE turns SET parent_turn_id = :parent WHERE id = :id"),
        {"parent": parse_id(Prefix.TURN, parent["id"]), "id": parse_id(Prefix.TURN, turn["id"])},
    )

    shown = (await api.client.get(f"/v1/turns/{turn['id']}")).json()

    assert (shown["parent_turn_id"], shown["root_turn_id"], shown["retry_of"]) == (parent["id"], turn["id"], None)
