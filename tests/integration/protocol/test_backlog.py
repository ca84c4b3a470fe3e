"""What the exporter says of a fleet, by what stands in its database."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

from pydantic import SecretStr

from longshift.config import Config
from longshift.db import backlog, log
from longshift.exporter import Exporter
from longshift.metrics import Figures
from longshift.model import new_id
from tests.integration.protocol.stage import Stage, leave

TTL = timedelta(seconds=15)


async def look(stage: Stage) -> Figures:
    return await backlog.figures(stage.db, lease_ttl=TTL)


async def serving(stage: Stage, *serves: tuple[str, str], **columns: object) -> UUID:
    """A live worker of the queue ``default`` with 10 slots."""
    worker = await stage.worker()
    columns = {"serves": json.dumps(serves), "revision": "0005", **columns}
    for name, value in columns.items():
        await stage.hand.execute(f"UPDATE workers SET {name} = %s WHERE id = %s".encode(), (value, worker))
    return worker


async def test_an_empty_fleet_has_its_zeros(stage: Stage) -> None:
    found = await look(stage)

    assert (found.queues, found.unserved) == ({}, {})
    assert found.turns == {"scheduled": 0, "queued": 0, "running": 0, "waiting": 0}
    assert found.workers == {"ok": 0, "unready": 0, "stuck": 0, "draining": 0}
    assert (found.suspects, found.approvals, found.in_doubt) == (0, 0, 0)


async def test_queues_have_what_is_ready_what_runs_what_waits_and_who_works(stage: Stage) -> None:
    worker = await serving(stage, ("echo", "1"))
    await stage.running(worker)
    claim, turn = await stage.running(worker)
    until = datetime.now(UTC) + timedelta(hours=1)
    assert await log.leave(stage.db, [leave(claim, turn, seq=2, seen=claim.mail_seq, until=until)])
    old, _ = await stage.submit()
    await stage.hand.execute(
        "UPDATE sessions SET ready_at = clock_timestamp() - interval '90 seconds' WHERE id = %s", (old,)
    )
    await stage.submit(run_after=until)
    await stage.submit(queue="gpu")

    found = await look(stage)
    default, gpu = found.queues["default"], found.queues["gpu"]
    assert (default.runnable, default.running, default.waiting) == (1, 1, 1)
    assert (default.slots, default.workers) == (10, 1)
    assert 90 <= default.oldest_seconds < 120
    assert (gpu.runnable, gpu.running, gpu.waiting, gpu.slots, gpu.workers) == (1, 0, 0, 0, 0)
    assert found.turns == {"scheduled": 1, "queued": 2, "running": 1, "waiting": 1}


async def test_workers_are_counted_by_what_they_say_of_themselves(stage: Stage) -> None:
    now = datetime.now(UTC)
    await serving(stage)
    await serving(stage, condition="ok")
    await serving(stage, condition="stuck")
    await serving(stage, condition="stuck", draining_since=now)
    await serving(stage, condition="unready", drain_asked_at=now)
    await serving(stage, condition="unready", isolated=True)
    await serving(stage, condition="stuck", isolated=True)
    await serving(stage, condition="asleep")  # of newer software
    await serving(stage, condition="unready", dead_at=now)
    await stage.worker(heartbeat_age=20)

    assert (await look(stage)).workers == {"ok": 2, "unready": 0, "stuck": 2, "draining": 2, "asleep": 1}


async def test_turns_are_unserved_whose_agent_nobody_has_in_their_version_and_queue(stage: Stage) -> None:
    await serving(stage, ("echo", "1"), ("echo", "2"))
    await serving(stage, ("echo", "3"), draining_since=datetime.now(UTC))
    for agent, version, queue in (
        ("echo", "1", "default"),
        ("echo", None, "default"),
        ("echo", "3", "default"),
        ("echo", "1", "gpu"),
        ("other", None, "default"),
        ("other", None, "default"),
    ):
        _, turn = await stage.submit(queue=queue)
        await stage.hand.execute(
            "UPDATE turns SET agent = %s, agent_version = %s WHERE id = %s", (agent, version, turn)
        )

    assert (await look(stage)).unserved == {("echo", "3"): 1, ("echo", "1"): 1, ("other", ""): 2}

    await serving(stage, revision=None)
    assert (await look(stage)).unserved == {}, "software of before does not say what it serves"


async def test_what_waits_for_people_and_what_is_suspect_is_counted(stage: Stage) -> None:
    claim, turn = await stage.running()
    await stage.hand.execute("UPDATE sessions SET suspect = 4 WHERE id = %s", (claim.session_id,))
    free, _ = await stage.submit()
    await stage.hand.execute("UPDATE sessions SET suspect = 1 WHERE id = %s", (free,))
    for answered in (None, None, datetime.now(UTC)):
        await stage.hand.execute(
            "INSERT INTO approvals (id, tenant_id, session_id, turn_id, name, answered_at) VALUES (%s, %s, %s, %s, 'x', %s)",
            (new_id(), stage.tenant, claim.session_id, turn, answered),
        )
    for status in ("unknown", "done"):
        await stage.hand.execute(
            "INSERT INTO tool_calls (id, tenant_id, session_id, turn_id, tool, effect, dedupe, place, input, status,"
            " worker_id, epoch, timeout) VALUES (%s, %s, %s, %s, 'pay', 'irreversible', 'call', '0', '{}', %s, %s, 1, '1s')",
            (new_id(), stage.tenant, claim.session_id, turn, status, claim.worker_id),
        )

    found = await look(stage)
    assert (found.suspects, found.approvals, found.in_doubt) == (2, 2, 1)


async def test_an_exporter_looks_once_for_those_who_ask_together_or_soon(stage: Stage) -> None:
    exporter = Exporter(Config(database_url=SecretStr(stage.url)))
    first, second = await asyncio.gather(exporter.look(), exporter.look())
    await stage.submit()

    assert first is second is await exporter.look()
    assert first is not None
    await exporter._db.close()


async def test_an_exporter_that_finds_no_postgres_says_so(tmp_path: Path) -> None:
    exporter = Exporter(Config(database_url=SecretStr(f"postgresql://nobody@/nothing?host={tmp_path}")))

    assert await exporter.look() is None
    await exporter._db.close()
