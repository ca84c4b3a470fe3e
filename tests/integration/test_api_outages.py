"""The API while Postgres or Redis hangs: they accept, and never answer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from longshift.db import migrations
from longshift.embedded import Guardian, LocalPostgres, LocalRedis
from longshift.hot import log_channel
from longshift.model import Prefix, parse_id
from longshift.testing.waiting import wait_until
from tests.support.api import Api, Hand, api_config, running_api
from tests.support.hanging import hanging

SOON = 15.0
"""Seconds until a client gives up, which fails the test: far more than an answer takes, far less than for ever."""


@pytest.fixture
def postgres(tmp_path: Path, guardian: Guardian) -> Iterator[LocalPostgres]:
    server = LocalPostgres(tmp_path / "postgres", guardian=guardian)
    server.start()
    migrations.upgrade(server.url)
    yield server
    server.stop()


@pytest.fixture
def own_redis(tmp_path: Path, guardian: Guardian) -> Iterator[LocalRedis]:
    server = LocalRedis(tmp_path / "redis", guardian=guardian)
    server.start()
    yield server
    server.stop()


async def test_while_postgres_hangs_every_request_is_told_to_come_back_and_it_serves_again(
    postgres: LocalPostgres, redis_url: str, tmp_path: Path
) -> None:
    async with running_api(api_config(postgres.url, redis_url, tmp_path, database_timeout=1)) as api:
        turn = await api.submit()
        body = {"agent": "echo", "input": {"text": "hello"}}
        with hanging(postgres.pid):
            answers = await asyncio.gather(
                *(api.client.get(f"/v1/turns/{turn['id']}", timeout=SOON) for _ in range(20)),
                *(api.client.post("/v1/turns", json=body, timeout=SOON) for _ in range(20)),
                api.client.post("/v1/artifacts", content=b"bytes", timeout=SOON),
            )
            ready = await asyncio.gather(*(api.client.get("/readyz", timeout=SOON) for _ in range(5)))
            alive = await api.client.get("/livez", timeout=SOON)
        assert {(a.status_code, a.headers["content-type"], a.json()["retryable"]) for a in answers} == {
            (503, "application/problem+json", True)
        }
        assert all("Retry-After" in answer.headers for answer in answers)
        for answer in ready:
            checks = {name: check["status"] for name, check in answer.json()["checks"].items()}
            assert (answer.status_code, checks) == (503, {"postgres": "failed", "redis": "ok", "artifacts": "ok"})
        assert alive.status_code == 200

        await _serves(api)


async def _serves(api: Api) -> None:
    async def again() -> bool:
        return bool((await api.client.get("/readyz")).json()["status"] == "ok")

    _: bool = await wait_until(again, description="the API is ready again")
    await api.submit()


async def test_while_redis_hangs_work_is_accepted_and_polls_are_answered(
    database_url: str, own_redis: LocalRedis, tmp_path: Path
) -> None:
    async with running_api(api_config(database_url, own_redis.url, tmp_path)) as api:
        session = await api.session()
        first = await api.submit(f"/v1/sessions/{session}/turns")
        with hanging(own_redis.pid):
            body = {"agent": "echo", "input": {"text": "hello"}}
            accepted = await asyncio.gather(
                *(api.client.post("/v1/turns", json=body, timeout=SOON) for _ in range(100))
            )
            turns = [answer.json() for answer in accepted]
            polls = await asyncio.gather(
                *(api.client.get(f"/v1/turns/{turn['id']}?wait=1", timeout=SOON) for turn in turns)
            )
            waiting = asyncio.create_task(api.client.get(f"/v1/turns/{first['id']}?wait=30", timeout=40))
            ready = await api.client.get("/readyz", timeout=SOON)
            await Hand(api, session).run(first["id"])
            ended = await waiting
        assert [answer.status_code for answer in accepted] == [202] * 100
        assert [poll.json()["status"] for poll in polls] == ["queued"] * 100
        assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
        assert ready.json()["checks"]["redis"]["status"] == "failed"
        assert ended.json()["status"] in ("running", "succeeded")
        await _serves(api)


async def test_readiness_is_known_long_before_a_statement_to_a_postgres_that_hangs_is_given_up(
    postgres: LocalPostgres, redis_url: str, tmp_path: Path
) -> None:
    """Nor does the question end by a cancellation, which would wait for the very server that hangs."""
    async with running_api(api_config(postgres.url, redis_url, tmp_path, database_timeout=30)) as api:
        with hanging(postgres.pid):
            ready = await asyncio.gather(*(api.client.get("/readyz", timeout=SOON) for _ in range(20)))
        assert {answer.status_code for answer in ready} == {503}
        await _serves(api)


async def test_a_stream_that_postgres_leaves_in_the_middle_is_cut_without_a_traceback_and_can_be_resumed(
    postgres: LocalPostgres, redis_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_api(api_config(postgres.url, redis_url, tmp_path)) as api:
        turn = await api.submit()
        hand = Hand(api, turn["session_id"])
        await hand.take()
        await hand.start(turn["id"])
        path = f"/v1/turns/{turn['id']}/events"

        async def follow() -> None:
            async with api.client.stream("GET", path, headers={"Accept": "text/event-stream"}, timeout=SOON) as stream:
                lines = stream.aiter_lines()
                while "turn.started" not in await anext(lines):
                    pass
                await asyncio.to_thread(postgres.kill)
                await api.edge.hot.announce([(log_channel(parse_id(Prefix.SESSION, turn["session_id"])), '{"seq":9}')])
                async for _ in lines:
                    pass

        with pytest.raises(httpx.RemoteProtocolError):
            await follow()
        await asyncio.to_thread(postgres.restart)

        async def answers() -> bool:
            return (await api.client.get(path)).is_success

        assert await wait_until(answers, description="Postgres is back")
        await hand.succeed(turn["id"])
        rest = await api.client.get(path, params={"after": 1})

    assert [event["kind"] for event in rest.json()["data"]][-1] == "turn.succeeded"
    assert "response cut off" in caplog.text
    assert "Traceback" not in caplog.text
