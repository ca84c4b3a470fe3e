"""Artifacts: what one costs, and how much memory a large one takes on its way through the API and through a turn.

A gibibyte goes up by HTTP and comes down again, and through a turn that makes an artifact of a stream and reads it back. The
memory is the most that a process has had resident (``VmHWM``) beyond what it had after the same with a mebibyte.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from unittest.mock import patch

import httpx
import psutil

from longshift.cold import Cold
from longshift.model import new_id
from tests.benchmarks.figures import Report
from tests.benchmarks.process import Process
from tests.benchmarks.stack import API_KEY, Site, Stack
from tests.support.local_stack import peak_memory
from tests.support.object_store import ObjectServer

MIB = 1024 * 1024
CHUNK = os.urandom(256 * 1024)
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_EC2_METADATA_DISABLED": "true"}


async def run(stack: Stack, *, short: bool) -> Report:
    report = Report("artifacts", "putting and getting artifacts, and the memory that large ones take")
    sizes = {"folder": 16 if short else 1024, "s3": 8 if short else 256}
    with patch.dict(os.environ, CREDENTIALS), ObjectServer() as server:
        async with stack.site() as site:
            await _puts(site, report, count=20 if short else 500)
            for kind, url in (("folder", None), ("s3", server.url("benchmark"))):
                await _haul(site, report, f"{sizes[kind]:,} MiB, {kind}", mebibytes=sizes[kind], url=url)
    report.notes.append("S3 is moto's server on the same machine, itself slow: its times say nothing of S3.")
    return report


async def _puts(site: Site, report: Report, *, count: int) -> None:
    """One after the other, over a folder, whose disk is asked to keep each of them (fsync)."""
    cold, session = Cold(site.db, site.store), new_id()
    await site.query(
        "INSERT INTO sessions (id, tenant_id, queue) VALUES (%s, %s, 'default') RETURNING id", session, site.tenant
    )
    new = [os.urandom(64 * 1024) for _ in range(count)]
    for name, bodies in (("put 64 KiB, new", new), ("put 64 KiB, known", new)):
        took = []
        for body in bodies:
            begun = time.perf_counter()
            record, _ = await cold.put(
                body, tenant_id=site.tenant, name="n", content_type="text/plain", session_id=session
            )
            took.append((time.perf_counter() - begun) * 1000)
        report.add(name, "ms", took)
    took = []
    for _ in range(count):
        begun = time.perf_counter()
        await cold.read(record.id, tenant_id=site.tenant, session_id=session)
        took.append((time.perf_counter() - begun) * 1000)
    report.add("read 64 KiB, verified", "ms", took)


async def _haul(site: Site, report: Report, what: str, *, mebibytes: int, url: str | None) -> None:
    settings = {} if url is None else {"artifacts_url": url}
    api = await site.start_api(settings=settings)
    await site.start(settings=settings)
    for size, measured in ((1, False), (mebibytes, True)):
        before = _memory(site)
        up, down = await _through_api(api, size)
        turn = await _through_turn(site, size)
        if measured:
            report.add(f"{what}: up through the API", "s", [up])
            report.add(f"{what}: down through the API", "s", [down])
            report.add(f"{what}: up and down in a turn", "s", [turn])
            for name, processes in (("API", site.apis), ("worker", site.workers)):
                grown = max(_memory_of(process) - before[process] for process in processes if process in before)
                report.add(f"{what}: memory of the {name}", "MiB", [grown / MIB])
    await site.end(list(site.workers))


async def _through_api(url: str, mebibytes: int) -> tuple[float, float]:
    headers = {"Authorization": f"Bearer {API_KEY}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=600, trust_env=False) as client:
        begun = time.perf_counter()
        answer = await client.post("/v1/artifacts", content=_source(mebibytes))
        answer.raise_for_status()
        up = time.perf_counter() - begun
        size = 0
        async with client.stream("GET", answer.json()["links"]["content"]) as content:
            async for chunk in content.aiter_bytes(len(CHUNK)):
                size += len(chunk)
        if size != mebibytes * MIB:
            raise RuntimeError(f"{size:,} bytes came back of {mebibytes} MiB")
        return up, time.perf_counter() - begun - up


async def _source(mebibytes: int) -> AsyncIterator[bytes]:
    """Other bytes each time: what is known already is not stored again."""
    yield os.urandom(16) + CHUNK[16:]
    for _ in range(mebibytes * MIB // len(CHUNK) - 1):
        yield CHUNK


async def _through_turn(site: Site, mebibytes: int) -> float:
    begun = time.perf_counter()
    (turn,) = await asyncio.wait_for(site.run("haul", [mebibytes]), timedelta(minutes=10).total_seconds())
    if turn.output != mebibytes * MIB:
        raise RuntimeError(f"the turn has read {turn.output} bytes of {mebibytes} MiB: {turn.error}")
    return time.perf_counter() - begun


def _memory(site: Site) -> dict[Process, int]:
    return {process: _memory_of(process) for process in (*site.apis, *site.workers)}


def _memory_of(process: Process) -> int:
    """Of the largest of a process and its children: a worker is the child of its supervisor."""
    return max(peak_memory(psutil.Process(pid)) for pid in process.members())
