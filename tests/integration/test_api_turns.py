"""Turns over HTTP: submit, poll, wait, list, cancel."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text

from longshift import wakeup
from longshift.testing.waiting import wait_until
from longshift_api.schemas import TurnPage, TurnView
from tests.support.api import Api, Hand

HELLO = {"agent": "echo", "input": {"text": "hello"}}


async def test_a_submitted_turn_is_answered_with_202_and_where_to_poll_it(api: Api) -> None:
    answer = await api.client.post("/v1/turns", json=HELLO | {"metadata": {"customer": "42"}})

    turn = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/v1/turns/{turn['id']}"
    assert answer.headers["retry-after"] == "1"
    assert answer.headers["request-id"].startswith("req_")
    assert (turn["status"], turn["position"], turn["metadata"]) == ("queued", 1, {"customer": "42"})
    TurnView.model_validate(turn, extra="forbid")
    assert (await api.client.get(answer.headers["location"])).json() == turn


async def test_a_submitted_turn_is_rung_after_it_is_committed(api: Api) -> None:
    await api.submit()

    async def rung() -> bool:
        backlog = await api.edge.hot.backlog(["default"])
        return backlog == {"default": 1}

    assert await wait_until(rung, description="a wake-up is in the queue")
    assert wakeup.queue_key("default") == "longshift.wake.default"


async def test_a_hundred_concurrent_submits_to_one_session_take_positions_1_to_100(api: Api) -> None:
    session = await api.session()

    turns = await asyncio.gather(*(api.submit(f"/v1/sessions/{session}/turns") for _ in range(100)))

    assert sorted(turn["position"] for turn in turns) == list(range(1, 101))
    assert (await api.client.get(f"/v1/sessions/{session}")).json()["open_turns"] == 100


async def test_a_turn_behind_another_says_what_blocks_it(api: Api) -> None:
    first = await api.submit()
    second = await api.submit(f"/v1/sessions/{first['session_id']}/turns")

    assert first["blocked_by"] is None
    assert second["blocked_by"] == first["id"]


async def test_a_turn_for_later_is_scheduled_without_a_position(api: Api) -> None:
    later = datetime.now(UTC) + timedelta(hours=1)

    turn = await api.submit(run_after=later.isoformat())

    assert (turn["status"], turn["position"]) == ("scheduled", None)


async def test_a_busy_session_rejects_with_423_when_asked_to(api: Api) -> None:
    first = await api.submit()

    answer = await api.client.post(f"/v1/sessions/{first['session_id']}/turns", json=HELLO | {"on_busy": "reject"})

    assert answer.status_code == 423
    assert (answer.json()["code"], answer.json()["retryable"]) == ("session_busy", True)


async def test_a_replacing_turn_cancels_those_before_it_and_only_those(api: Api) -> None:
    first = await api.submit()
    path = f"/v1/sessions/{first['session_id']}/turns"

    answers = await asyncio.gather(*(api.submit(path, on_busy="replace") for _ in range(8)))

    states = {t["position"]: t["status"] for t in (await api.client.get("/v1/turns?limit=100")).json()["data"]}
    assert {position: status for position, status in states.items() if position < 9} == dict.fromkeys(
        range(1, 9), "cancelled"
    )
    assert states[9] == "queued"
    assert len(answers) == 8


async def test_polling_with_the_etag_is_304_until_the_turn_changes(api: Api) -> None:
    turn = await api.submit()
    path = f"/v1/turns/{turn['id']}"
    tag = (await api.client.get(path)).headers["etag"]

    unchanged = await api.client.get(path, headers={"If-None-Match": tag})
    await Hand(api, turn["session_id"]).run(turn["id"], {"said": "hello"})
    changed = await api.client.get(path, headers={"If-None-Match": tag})

    assert (unchanged.status_code, unchanged.content) == (304, b"")
    assert unchanged.headers["etag"] == tag
    assert (changed.status_code, changed.json()["status"]) == (200, "succeeded")
    assert changed.json()["output"] == {"said": "hello"}
    assert "retry-after" not in changed.headers
    assert changed.headers["etag"] != tag


@pytest.mark.parametrize("how", [{"params": {"wait": "20"}}, {"headers": {"Prefer": "respond-async, wait=20"}}])
async def test_a_waiting_poll_answers_as_soon_as_the_turn_changes(api: Api, how: dict[str, Any]) -> None:
    turn = await api.submit()
    hand = Hand(api, turn["session_id"])
    await hand.take()
    began = time.monotonic()
    polling = asyncio.create_task(api.client.get(f"/v1/turns/{turn['id']}", **how))
    await wait_until(api.edge.hot.listeners, description="the poll listens")

    await hand.start(turn["id"])

    answer = await polling
    assert (answer.json()["status"], answer.headers["preference-applied"]) == ("running", "wait=20")
    assert time.monotonic() - began < 4  # sooner than the next look at Postgres


async def test_a_waiting_poll_ends_unchanged_after_its_time(api: Api) -> None:
    turn = await api.submit()

    answer = await api.client.get(f"/v1/turns/{turn['id']}?wait=1", headers={"If-None-Match": 'W/"1"'})

    assert answer.status_code == 304


async def test_a_waiting_poll_on_an_outdated_etag_answers_at_once(api: Api) -> None:
    turn = await api.submit()

    answer = await api.client.get(f"/v1/turns/{turn['id']}?wait=60", headers={"If-None-Match": 'W/"0"'})

    assert answer.status_code == 200


async def test_a_cancelled_turn_that_never_started_ends_at_once_and_wakes_who_waits(api: Api) -> None:
    turn = await api.submit()
    polling = asyncio.create_task(api.client.get(f"/v1/turns/{turn['id']}?wait=20"))
    await wait_until(api.edge.hot.listeners, description="the poll listens")

    answer = await api.client.post(f"/v1/turns/{turn['id']}/cancel", json={"reason": "a typo"})
    again = await api.client.post(f"/v1/turns/{turn['id']}/cancel")

    assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    assert answer.json()["error"] == {"code": "cancelled", "message": "a typo"}
    assert (again.status_code, again.json()) == (200, answer.json())
    assert (await polling).json()["status"] == "cancelled"


async def test_cancelling_a_running_turn_leaves_mail_for_its_worker(api: Api) -> None:
    turn = await api.submit()
    hand = Hand(api, turn["session_id"])
    await hand.take()
    await hand.start(turn["id"])

    answer = await api.client.post(f"/v1/turns/{turn['id']}/cancel")

    mail = await api.db.fetch(text("SELECT kind FROM mail"))
    assert (answer.status_code, answer.json()["status"]) == (202, "running")
    assert [row.kind for row in mail] == ["cancel"]


async def test_a_list_goes_back_page_by_page_without_repeating_or_losing(api: Api) -> None:
    made = [(await api.submit())["id"] for _ in range(7)]

    seen: list[str] = []
    query = "/v1/turns?limit=3"
    while True:
        page = (await api.client.get(query)).json()
        TurnPage.model_validate(page, extra="forbid")
        seen += [turn["id"] for turn in page["data"]]
        assert page["has_more"] == (page["next"] is not None)
        if not page["has_more"]:
            break
        query = f"/v1/turns?limit=3&cursor={page['next']}"

    assert seen == made[::-1]


async def test_a_list_is_narrowed_by_each_filter(api: Api) -> None:
    first = await api.submit(metadata={"team": "red", "n": "1"})
    second = await api.submit(metadata={"team": "blue"})
    await Hand(api, first["session_id"]).run(first["id"])
    future = (datetime.now(UTC) + timedelta(hours=1)).isoformat()

    async def ids(**params: Any) -> set[str]:
        answer = await api.client.get("/v1/turns", params=params)
        assert answer.status_code == 200, answer.text
        return {turn["id"] for turn in answer.json()["data"]}

    assert await ids(status="succeeded") == {first["id"]}
    assert await ids(status=["queued", "succeeded"]) == {first["id"], second["id"]}
    assert await ids(session_id=second["session_id"]) == {second["id"]}
    assert await ids(**{"metadata[team]": "red", "metadata[n]": "1"}) == {first["id"]}
    assert await ids(agent="nobody") == set()
    assert await ids(batch_id="bat_" + "0" * 32) == set()
    assert await ids(**{"created_at[gte]": future}) == set()


async def test_a_turn_keeps_the_traceparent_of_its_request(api: Api) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

    await api.client.post("/v1/turns", json=HELLO, headers={"traceparent": parent})

    assert (await api.db.fetch(text("SELECT traceparent FROM turns")))[0].traceparent == parent
