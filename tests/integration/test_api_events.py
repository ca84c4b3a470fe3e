"""The log over HTTP: pages of JSON, and a stream that can be resumed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import text

from longshift.hot import delta_message, log_channel
from longshift.model import Prefix, parse_id
from longshift_api.schemas import EventPage
from tests.support.api import Api, Hand


@dataclass(frozen=True)
class Frame:
    event: str
    id: int | None
    data: Any


@asynccontextmanager
async def streaming(api: Api, path: str, **headers: str) -> AsyncIterator[AsyncIterator[Frame]]:
    async with api.client.stream("GET", path, headers={"Accept": "text/event-stream", **headers}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield frames(answer.aiter_lines())


async def frames(lines: AsyncIterator[str]) -> AsyncIterator[Frame]:
    fields: dict[str, str] = {}
    async for row in lines:
        if row and not row.startswith(":"):
            name, _, value = row.partition(": ")
            fields[name] = value
        elif not row and "event" in fields:
            yield Frame(fields["event"], int(fields["id"]) if "id" in fields else None, json.loads(fields["data"]))
            fields = {}


async def finished(api: Api, steps: int = 3) -> dict[str, Any]:
    turn = await api.submit()
    hand = Hand(api, turn["session_id"])
    await hand.take()
    await hand.start(turn["id"])
    for number in range(steps):
        await hand.append(turn["id"], {"name": f"step {number}", "result": number})
    await hand.succeed(turn["id"], "done")
    return turn


@pytest.mark.parametrize("owner", ["turns", "sessions"])
async def test_events_come_in_pages_that_continue_where_the_last_one_ended(api: Api, owner: str) -> None:
    turn = await finished(api)
    path = f"/v1/{owner}/{turn['id'] if owner == 'turns' else turn['session_id']}/events"

    first = (await api.client.get(path, params={"limit": 2})).json()
    rest = (await api.client.get(path, params={"after": first["next"]})).json()

    EventPage.model_validate(first, extra="forbid")
    assert [event["seq"] for event in first["data"] + rest["data"]] == [1, 2, 3, 4, 5]
    assert (first["has_more"], rest["has_more"], rest["next"]) == (True, False, 5)
    assert first["data"][0]["kind"] == "turn.started"
    assert first["data"][0]["turn_id"] == turn["id"]


async def test_a_stream_of_an_ended_turn_gives_everything_and_then_done(api: Api) -> None:
    turn = await finished(api)

    async with streaming(api, f"/v1/turns/{turn['id']}/events") as stream:
        seen = [frame async for frame in stream]

    assert [frame.event for frame in seen] == [
        "open",
        "turn.started",
        "step.completed",
        "step.completed",
        "step.completed",
        "turn.succeeded",
        "done",
    ]
    assert [frame.id for frame in seen] == [0, 1, 2, 3, 4, 5, None]
    assert seen[-1].data == {"turn_id": turn["id"], "status": "succeeded"}


@pytest.mark.parametrize("how", ["header", "query"])
async def test_a_stream_is_resumed_after_the_last_event_seen(api: Api, how: str) -> None:
    turn = await finished(api)
    path = f"/v1/turns/{turn['id']}/events" + ("?after=3" if how == "query" else "")
    headers = {"Last-Event-ID": "3"} if how == "header" else {}

    async with streaming(api, path, **headers) as stream:
        seen = [frame async for frame in stream]

    assert [frame.id for frame in seen] == [3, 4, 5, None]


async def test_a_stream_follows_a_running_turn_with_its_deltas(api: Api) -> None:
    turn = await api.submit()
    hand = Hand(api, turn["session_id"])
    await hand.take()

    async with streaming(api, f"/v1/turns/{turn['id']}/events") as stream:
        assert (await anext(stream)).event == "open"
        await hand.start(turn["id"])
        assert (await anext(stream)).event == "turn.started"
        turn_id, session_id = parse_id(Prefix.TURN, turn["id"]), parse_id(Prefix.SESSION, turn["session_id"])
        delta_text = delta_message("Once\ud800 upon", turn_id=turn_id, step="write", attempt=1)
        await api.edge.hot.announce([(log_channel(session_id), delta_text)])
        delta = await anext(stream)
        await hand.succeed(turn["id"])
        rest = [frame.event async for frame in stream]

    assert delta == Frame(
        "delta", None, {"text": "Once\ufffd upon", "turn_id": turn["id"], "step": "write", "attempt": 1}
    )
    assert rest == ["turn.succeeded", "done"]


async def test_a_stream_of_a_session_goes_on_with_its_next_turn(api: Api) -> None:
    first = await finished(api, steps=0)
    second = await api.submit(f"/v1/sessions/{first['session_id']}/turns")

    async with streaming(api, f"/v1/sessions/{first['session_id']}/events") as stream:
        seen = [(await anext(stream)).event for _ in range(3)]
        hand = Hand(api, second["session_id"])
        await hand.run(second["id"])
        seen += [(await anext(stream)).event for _ in range(2)]

    assert seen == ["open", "turn.started", "turn.succeeded", "turn.started", "turn.succeeded"]


async def test_a_stream_of_a_turn_that_is_cancelled_before_it_starts_ends(api: Api) -> None:
    turn = await api.submit()

    async with streaming(api, f"/v1/turns/{turn['id']}/events") as stream:
        assert (await anext(stream)).event == "open"
        await api.client.post(f"/v1/turns/{turn['id']}/cancel")
        rest = [frame async for frame in stream]

    assert [(frame.event, frame.data["status"]) for frame in rest] == [("done", "cancelled")]


async def test_a_client_ahead_of_the_log_is_told_to_begin_again(api: Api) -> None:
    turn = await finished(api, steps=0)

    async with streaming(api, f"/v1/sessions/{turn['session_id']}/events", **{"Last-Event-ID": "99"}) as stream:
        seen = [await anext(stream) for _ in range(3)]

    assert seen[0] == Frame("reset", 0, {"last_seq": 2})
    assert [frame.id for frame in seen[1:]] == [1, 2]


async def test_archived_events_are_served_and_streamed_as_if_they_were_in_postgres(api: Api) -> None:
    turn = await finished(api)
    session = f"/v1/sessions/{turn['session_id']}/events"
    before = (await api.client.get(session)).json()
    steps = (await api.client.get(f"/v1/turns/{turn['id']}/steps")).json()

    assert (await api.client.post(f"/v1/sessions/{turn['session_id']}/archive")).json()["events"] == 5
    assert (await api.db.fetch(text("SELECT count(*) AS n FROM events")))[0].n == 0

    assert (await api.client.get(session)).json() == before
    assert (await api.client.get(f"/v1/turns/{turn['id']}/steps")).json() == steps
    assert (await api.client.get(f"{session}?after=3&limit=1")).json()["data"] == before["data"][3:4]
    async with streaming(api, session) as stream:
        seen = [await anext(stream) for _ in range(6)]
    assert [frame.data for frame in seen[1:]] == before["data"]
    async with streaming(api, f"/v1/turns/{turn['id']}/events", **{"Last-Event-ID": "4"}) as stream:
        assert [frame.event async for frame in stream] == ["open", "turn.succeeded", "done"]
