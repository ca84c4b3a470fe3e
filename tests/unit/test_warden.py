"""The keeper of a worker's wards."""

from __future__ import annotations

import asyncio
from asyncio.subprocess import PIPE, Process
from typing import cast

import pytest

from longshift import deaths
from longshift.config import Config
from longshift.db.database import Database
from longshift.heartbeat import Load
from longshift.hot import Hot
from longshift.warden import Warden


async def test_a_ward_that_is_just_being_started_when_its_worker_drains_is_told_to_drain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = Load(tick=0.0, suspects=True)
    warden = Warden(cast(Database, None), cast(Hot, None), load=load, leads=lambda: True, config=Config())
    create, codes = asyncio.create_subprocess_exec, asyncio.Queue[int]()

    async def start(*_command: str, **_more: object) -> Process:
        warden.close()
        return await create("cat", stdin=PIPE)

    async def report(*_connections: object, code: int, **_more: object) -> bool:
        codes.put_nowait(code)
        return False

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
    monkeypatch.setattr(deaths, "report", report)
    running = asyncio.create_task(warden.run())
    try:
        assert await asyncio.wait_for(codes.get(), timeout=10) == 0, "it saw the end of its input"
    finally:
        running.cancel()
        await warden.closed()
