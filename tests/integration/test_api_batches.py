"""Batches over HTTP: taken in whole or not at all, watched, their results fetched while they run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from longshift.model import new_id
from longshift_api.schemas import BatchView, TurnView
from tests.support.api import Api, Hand

JSONL = {"Content-Type": "application/jsonl"}


def line(number: int, **fields: Any) -> dict[str, Any]:
    return {"custom_id": f"q{number}", "agent": "echo", "input": {"text": str(number)}, **fields}


def lines(items: Sequence[Any]) -> bytes:
    return b"".join((item if isinstance(item, bytes) else json.dumps(item).encode()) + b"\n" for item in items)


async def turns_stored(api: Api) -> int:
    return int((await api.db.fetch(text("SELECT count(*) AS n FROM turns")))[0].n)


def results(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.headers["content-type"].startswith("application/jsonl")
    return [json.loads(row) for row in answer.text.splitlines()]


async def test_a_json_array_becomes_a_batch(api: Api) -> None:
    answer = await api.client.post("/v1/batches?metadata[run]=night", json=[line(n) for n in range(3)])

    batch = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (202, f"/v1/batches/{batch['id']}")
    BatchView.model_validate(batch, extra="forbid")
    assert (batch["total"], batch["counts"]["queued"], batch["progress"]) == (3, 3, 0)
    assert batch["metadata"] == {"run": "night"}
    listed = (await api.client.get("/v1/batches")).json()["data"]
    assert [item["id"] for item in listed] == [batch["id"]]


async def test_json_lines_become_a_batch_in_their_order(api: Api) -> None:
    body = b"\xef\xbb\xbf" + lines([line(1), b"", line(2), b"   ", line(3)]).replace(b"\n", b"\r\n")

    batch = (await api.client.post("/v1/batches", content=body, headers=JSONL)).json()

    found = results(await api.client.get(f"/v1/batches/{batch['id']}/results?all=true"))
    assert [turn["custom_id"] for turn in found] == ["q1", "q2", "q3"]
    assert all(TurnView.model_validate(turn, extra="forbid") for turn in found)


async def test_a_batch_that_names_sessions_keeps_their_order_and_creates_new_ones(api: Api) -> None:
    old, new = await api.session(), f"ses_{new_id().hex}"

    answer = await api.client.post("/v1/batches", json=[line(n, session_id=(old, new)[n % 2]) for n in range(6)])

    found = results(await api.client.get(f"/v1/batches/{answer.json()['id']}/results?all=true"))
    assert [(turn["session_id"], turn["position"]) for turn in found] == [
        ((old, new)[n % 2], n // 2 + 1) for n in range(6)
    ]


async def test_results_stream_while_the_batch_runs_and_progress_follows(api: Api) -> None:
    batch = (await api.client.post("/v1/batches", json=[line(n) for n in range(4)])).json()
    path = f"/v1/batches/{batch['id']}"
    everything = results(await api.client.get(f"{path}/results?all=true"))
    await Hand(api, everything[2]["session_id"]).run(everything[2]["id"], "two")

    ended = results(await api.client.get(f"{path}/results"))
    now = (await api.client.get(path)).json()

    assert [(turn["custom_id"], turn["output"]) for turn in ended] == [("q2", "two")]
    assert (now["counts"]["succeeded"], now["counts"]["queued"], now["progress"]) == (1, 3, 0.25)
    assert now["status"] == "running"
    assert now["eta"] is not None


async def test_a_cancelled_batch_ends(api: Api) -> None:
    batch = (await api.client.post("/v1/batches", json=[line(n) for n in range(4)])).json()

    answer = await api.client.post(f"/v1/batches/{batch['id']}/cancel")

    assert (answer.status_code, answer.json()["status"]) == (202, "ended")
    assert answer.json()["counts"]["cancelled"] == 4
    assert answer.json()["ended_at"] is not None


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (b"{not json", {"line": 2, "path": "", "message": "not JSON"}),
        (b'"text"', {"line": 2, "path": "", "message": "must be a JSON object"}),
        (b"\xff\xfe", {"line": 2, "path": "", "message": "not UTF-8"}),
        (b'{"agent": "echo", "input": NaN}', {"line": 2, "path": "", "message": "NaN is not JSON"}),
        (line(2, agent="nobody"), {"line": 2, "path": "agent", "message": "no worker has registered"}),
        (line(2, input={"text": 3}), {"line": 2, "path": "input.text", "message": "is not of type 'string'"}),
        (line(2, input={}), {"line": 2, "path": "input", "message": "'text' is a required property"}),
        (line(2, urgent=True), {"line": 2, "path": "urgent", "message": "not permitted"}),
        (line(2, session_id="ses_1"), {"line": 2, "path": "session_id", "message": "is not an identifier"}),
        (line(2, deadline="2001-01-01T00:00:00Z"), {"line": 2, "path": "deadline", "message": "in the past"}),
        (line(1), {"line": 2, "path": "custom_id", "message": "is the custom_id of line 1 too"}),
        (line(2, input={"text": "x" * 5000}), {"line": 2, "path": "", "message": "longer than the 4,096 bytes"}),
    ],
)
async def test_one_bad_line_is_named_and_nothing_is_accepted(
    small_api: Api, bad: bytes | dict[str, Any], expected: dict[str, Any]
) -> None:
    answer = await small_api.client.post("/v1/batches", content=lines([line(1), bad, line(3)]), headers=JSONL)

    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (422, "invalid_input")
    assert len(problem["errors"]) == 1
    assert (problem["errors"][0]["line"], problem["errors"][0]["path"]) == (expected["line"], expected["path"])
    assert expected["message"] in problem["errors"][0]["message"]
    assert "line 2" in problem["detail"]
    assert await turns_stored(small_api) == 0


async def test_many_bad_lines_are_reported_together_up_to_twenty(api: Api) -> None:
    answer = await api.client.post("/v1/batches", content=lines([b"{"] * 30), headers=JSONL)

    assert len(answer.json()["errors"]) == 20
    assert "30 of 30 lines" in answer.json()["detail"]


@pytest.mark.parametrize("body", [b"", b"\n\n", b"[]", b'{"agent": "echo"}', b"[1, 2", b"null"])
async def test_a_batch_without_turns_is_refused(api: Api, body: bytes) -> None:
    kind = "application/json" if body[:1] in b"[{n" and body else "application/jsonl"

    answer = await api.client.post("/v1/batches", content=body, headers={"Content-Type": kind})

    assert answer.status_code == 422


async def test_a_batch_that_is_too_large_is_refused_by_length_and_by_content(small_api: Api) -> None:
    body = lines([line(n) for n in range(2000)])

    async def chunks() -> Any:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    announced = await small_api.client.post("/v1/batches", content=body, headers=JSONL)
    streamed = await small_api.client.post("/v1/batches", content=chunks(), headers=JSONL)

    assert (announced.status_code, streamed.status_code) == (413, 413)
    assert await turns_stored(small_api) == 0


async def test_an_array_may_have_a_thousand_items(api: Api) -> None:
    answer = await api.client.post("/v1/batches", json=[line(n) for n in range(1001)])

    assert answer.status_code == 422
    assert "1,000" in answer.json()["detail"]


async def test_another_content_type_is_refused_with_the_right_ones(api: Api) -> None:
    answer = await api.client.post("/v1/batches", content=b"x", headers={"Content-Type": "text/csv"})

    assert answer.status_code == 415
    assert "application/jsonl" in answer.json()["detail"]


async def test_two_batches_over_the_same_sessions_do_not_block_each_other(api: Api) -> None:
    sessions = [await api.session() for _ in range(20)]
    forwards = [line(n, session_id=sessions[n % 20]) for n in range(900)]

    answers = await asyncio.gather(
        *(api.client.post("/v1/batches", json=order) for order in (forwards, forwards[::-1], forwards))
    )

    assert [answer.status_code for answer in answers] == [202, 202, 202]
    listed = (await api.client.get("/v1/sessions?limit=100")).json()["data"]
    assert {session["open_turns"] for session in listed} == {135}
