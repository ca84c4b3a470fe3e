"""The proxy before the object store: in each mood the client gets what the mood says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.chaos.objects import FaultyStore, Mood

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.read(65536):
        writer.write(ANSWER)
        await writer.drain()
    writer.close()


@pytest.fixture
async def store() -> AsyncIterator[FaultyStore]:
    server = await asyncio.start_server(_serve, "127.0.0.1", 0)
    async with server, FaultyStore(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as store:
        yield store


@pytest.fixture
async def client(store: FaultyStore) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=store.endpoint, trust_env=False) as client:
        yield client


@pytest.mark.parametrize("mood", [Mood.WELL, Mood.SLOW])
async def test_requests_pass(store: FaultyStore, client: httpx.AsyncClient, mood: Mood) -> None:
    store.mood = mood
    answers = [await client.get("/") for _ in range(3)]
    assert [answer.text for answer in answers] == ["ok"] * 3
    assert store.disturbed[Mood.SLOW] == (3 if mood is Mood.SLOW else 0)


async def test_errors_are_500_and_503_and_end_with_the_mood(store: FaultyStore, client: httpx.AsyncClient) -> None:
    store.mood = Mood.ERRORS
    assert {(await client.get("/")).status_code for _ in range(20)} == {500, 503}
    store.mood = Mood.WELL
    assert (await client.get("/")).status_code == 200


async def test_connections_are_reset_also_those_that_were_open(store: FaultyStore, client: httpx.AsyncClient) -> None:
    assert (await client.get("/")).status_code == 200
    store.mood = Mood.RESETS
    with pytest.raises(httpx.TransportError):
        await client.get("/")
    store.mood = Mood.WELL
    assert (await client.get("/")).status_code == 200


async def test_a_store_that_is_gone_closes_the_connection(client: httpx.AsyncClient, store: FaultyStore) -> None:
    store._port = 1
    with pytest.raises(httpx.TransportError):
        await client.get("/")
