"""After the run: everything that can be read from outside, written into the evidence."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import psycopg
import redis

from longshift.context import DRIFT
from longshift.model import Json
from longshift.testing.waiting import wait_until
from tests.chaos.edge import Edge
from tests.chaos.evidence import Death, Evidence, Key
from tests.support.fleet import Fleet

AT_ONCE = 8
SETTLED = 20.0
"""Seconds after the end of the last turn in which leases are given back and the last wake-ups taken."""
MEANT = "tests.chaos.agents.Strange"
"""In a traceback: an agent raised it because it was told to."""
CHAINED = re.compile(r"\n\n(?:The above exception was|During handling of)[^\n]*\n\n")
HELD = "SELECT count(*) FROM sessions WHERE lease_worker IS NOT NULL"
ARCHIVED = "SELECT count(*) FROM archives"
HELD_BY_THE_DEAD = "SELECT count(*) FROM sessions s JOIN workers w ON w.id = s.lease_worker WHERE w.dead_at IS NOT NULL"


class Stage(Protocol):
    """Where it happened: ``tests.chaos.stage``, or another one."""

    fleet: Fleet
    database_url: str
    deaths: list[Death]

    @property
    def redis_url(self) -> str: ...


async def gather_api(edge: Edge, found: Evidence) -> None:
    """All turns, and the log of every session that has one."""
    cursor: dict[str, str] = {}
    while True:
        page = await edge.get("/v1/turns", limit=100, **cursor)
        found.listed += [turn["id"] for turn in page["data"]]
        found.turns |= {turn["id"]: turn for turn in page["data"]}
        if not page["has_more"]:
            break
        cursor = {"cursor": page["next"]}
    sessions = {turn["session_id"] for turn in found.turns.values()} | {asked.session for asked in found.asked}
    gate = asyncio.Semaphore(AT_ONCE)

    async def read(session: str) -> None:
        async with gate:
            found.events[session] = await _log(edge, session)

    await asyncio.gather(*map(read, sorted(sessions)))


async def _log(edge: Edge, session: str) -> list[Json]:
    events: list[Json] = []
    while True:
        after = events[-1]["seq"] if events else 0
        page = await edge.get(f"/v1/sessions/{session}/events", after=after, limit=1000)
        events += page["data"]
        if not page["has_more"]:
            return events


async def gather_servers(stage: Stage, found: Evidence) -> None:
    """Redis and the leases, when they have come to rest, or after ``SETTLED`` seconds."""

    def look() -> bool:
        found.redis_keys = list(_keys(stage.redis_url))
        with psycopg.connect(stage.database_url, autocommit=True) as connection:
            found.leases_held = _count(connection, HELD)
            found.archived = _count(connection, ARCHIVED)
            found.leases_of_the_dead = _count(connection, HELD_BY_THE_DEAD)
        return not found.leases_held and not any(key.length for key in found.redis_keys)

    async def settled() -> bool:
        return await asyncio.to_thread(look)

    try:
        await wait_until(settled, description="everything is at rest", limit=SETTLED)
    except AssertionError:
        return  # what is left is in the evidence


async def look_at_redis(stage: Stage, found: Evidence) -> None:
    """Now, while everything goes on; nothing if Redis does not answer."""
    with suppress(redis.RedisError, OSError):
        found.redis_keys_during += await asyncio.to_thread(lambda: list(_keys(stage.redis_url)))


def gather_files(stage: Stage, found: Evidence) -> None:
    """What agents wrote down, and what processes were surprised by."""
    found.effects = stage.fleet.effects()
    found.deaths = stage.deaths
    for log in sorted(stage.fleet.folder.glob("*.log")):
        found.logs += 1
        found.tracebacks += tracebacks(log)
        found.drift += [
            f"{log.name}: {line[:600]}" for line in log.read_text(errors="replace").splitlines() if DRIFT in line
        ]


def _keys(url: str) -> Iterator[Key]:
    with redis.Redis.from_url(url, decode_responses=True, socket_timeout=2) as client:
        for name in client.scan_iter(count=1000):
            kind = str(client.type(name))
            ttl = client.pttl(name)
            if ttl != -2:  # gone meanwhile
                length = client.llen(name) if kind == "list" else None
                yield Key(name, kind, ttl / 1000 if ttl >= 0 else -1, length)


def _count(connection: psycopg.Connection, statement: str) -> int:
    row = connection.execute(statement.encode()).fetchone()
    assert row is not None
    return int(row[0])


def tracebacks(log: Path) -> Iterator[str]:
    """Those in a log that nobody has injected, a line for each, with where it stands and what it came from."""
    lines = log.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines):
        if "Traceback (most recent call last)" not in line or MEANT in line:
            continue
        try:
            entry = json.loads(line)
            causes = [part.strip().splitlines()[-1][:200] for part in CHAINED.split(entry["trace"])]
            text = f"{entry['message'].strip()}: {', because of '.join(reversed(causes))}"
        except (ValueError, KeyError, TypeError):
            rest = lines[number + 1 :]
            text = next((other for other in rest if other and not other[0].isspace()), "a torn traceback")
        yield f"{log.name}, line {number + 1}: {text[:600]}"
