"""The same request twice, at once or later, is one request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from datetime import UTC, datetime, timedelta

import httpx
from sqlalchemy import text

from longshift.model import new_id
from longshift.testing.waiting import wait_until
from tests.support.api import Api

HELLO = {"agent": "echo", "input": {"text": "hello"}}


async def count(api: Api, table: str) -> int:
    return int((await api.db.fetch(text(f"SELECT count(*) AS n FROM {table}")))[0].n)


async def test_twenty_parallel_submits_with_one_key_make_one_turn(api: Api) -> None:
    headers = {"Idempotency-Key": "order-42"}

    answers = await asyncio.gather(*(api.client.post("/v1/turns", json=HELLO, headers=headers) for _ in range(20)))

    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1
    assert await count(api, "turns") == 1


async def test_the_same_key_with_another_body_is_refused(api: Api) -> None:
    headers = {"Idempotency-Key": "order-42"}
    await api.client.post("/v1/turns", json=HELLO, headers=headers)

    answer = await api.client.post("/v1/turns", json=HELLO | {"metadata": {"a": "b"}}, headers=headers)

    assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_mismatch")


async def test_a_key_belongs_to_its_tenant_and_its_route(api: Api) -> None:
    headers = {"Idempotency-Key": "order-42"}
    session = await api.session()

    await api.client.post("/v1/turns", json=HELLO, headers=headers)
    elsewhere = await api.client.post(f"/v1/sessions/{session}/turns", json=HELLO, headers=headers)
    other = await api.client.post("/v1/turns", json=HELLO, headers=headers | await api.key())

    assert "idempotent-replayed" not in elsewhere.headers
    assert "idempotent-replayed" not in other.headers
    assert await count(api, "turns") == 3


async def test_a_repeat_is_answered_although_its_deadline_has_passed_meanwhile(api: Api) -> None:
    soon = datetime.now(UTC) + timedelta(milliseconds=700)
    body = HELLO | {"deadline": soon.isoformat()}
    headers = {"Idempotency-Key": "order-42"}
    first = await api.client.post("/v1/turns", json=body, headers=headers)
    await wait_until(lambda: datetime.now(UTC) > soon, description="the deadline has passed")

    again = await api.client.post("/v1/turns", json=body, headers=headers)

    assert (first.status_code, again.status_code) == (202, 202)
    assert again.json()["id"] == first.json()["id"]


async def test_a_repeat_that_a_client_library_marks_without_a_key_is_the_same_request(api: Api) -> None:
    def sent(count: int) -> Awaitable[httpx.Response]:
        return api.client.post("/v1/turns", json=HELLO, headers={"x-stainless-retry-count": str(count)})

    first, *repeats = await asyncio.gather(sent(0), *(sent(n) for n in (1, 2)))
    second, again = await sent(0), await sent(1)

    assert second.json()["id"] not in {answer.json()["id"] for answer in (first, *repeats)}
    assert again.json()["id"] == second.json()["id"]
    assert again.headers["idempotent-replayed"] == "true"


async def test_a_repeated_batch_is_the_same_batch(api: Api) -> None:
    headers = {"Idempotency-Key": "night-run"}

    answers = await asyncio.gather(
        *(api.client.post("/v1/batches", json=[HELLO] * 5, headers=headers) for _ in range(5))
    )

    assert len({answer.json()["id"] for answer in answers}) == 1
    assert await count(api, "turns") == 5


async def test_a_repeated_signal_session_and_upload_are_one_each(api: Api) -> None:
    session = await api.session()
    headers = {"Idempotency-Key": "once"}
    for _ in range(2):
        signal = await api.client.post(f"/v1/sessions/{session}/signals", json={"name": "go"}, headers=headers)
        made = await api.client.post("/v1/sessions", json={"metadata": {"a": "b"}}, headers=headers)
        upload = await api.client.post("/v1/artifacts?name=a.txt", content=b"bytes", headers=headers)

    assert [a.headers.get("idempotent-replayed") for a in (signal, made, upload)] == ["true"] * 3
    assert [a.status_code for a in (signal, made, upload)] == [202, 201, 201]
    assert [await count(api, table) for table in ("mail", "sessions", "artifacts")] == [1, 2, 1]


async def test_a_session_whose_id_the_client_chose_is_created_once(api: Api) -> None:
    chosen = f"ses_{new_id().hex}"

    answers = await asyncio.gather(*(api.client.post("/v1/sessions", json={"id": chosen}) for _ in range(5)))

    assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 200, 201]
    assert {answer.json()["id"] for answer in answers} == {chosen}
