"""One trace from the request to the steps: through the API, Postgres and a worker."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import text

from longshift import Turn, agent, step
from longshift.agent import Agents
from longshift.client import Client
from longshift.model import Prefix, parse_id
from longshift.telemetry import About
from longshift.testing.waiting import wait_until
from longshift.tracing import traces_to
from longshift.worker import Worker
from tests.support.api import KEY, Api, api_config, running_api
from tests.support.collector import Spans, spans_of

CALLER = "0af7651916cd43dd8448eb211c80319c"
PARENT = {"traceparent": f"00-{CALLER}-b7ad6b7169203331-01"}
broken: list[bool] = []
gate: asyncio.Event


@step
async def fetch(word: str) -> str:
    logging.getLogger("a.users.agent").info("fetching")
    return word


@step
async def ship() -> None:
    if broken:
        raise OSError("no carrier")


@step
async def pass_gate() -> None:
    await gate.wait()


@agent("child")
async def child(turn: Turn, word: Any) -> str:
    return await fetch(word)


@agent("order")
async def order(turn: Turn, word: str) -> str:
    done = await (await turn.spawn(child, word))
    await ship()
    return str(done)


@agent("gated")
async def gated(turn: Turn, word: str) -> str:
    await fetch(word)
    await pass_gate()
    return word


@dataclass
class Site:
    """An API and a worker, in this process, whose spans are kept."""

    api: Api
    worker: Worker
    exporter: InMemorySpanExporter

    async def post(self, path: str, **more: Any) -> dict[str, Any]:
        answer = await self.api.client.post(path, **more)
        assert answer.status_code == 202, answer.text
        return dict(answer.json())

    async def submit(self, agent: str, **more: Any) -> dict[str, Any]:
        return await self.post("/v1/turns", json={"agent": agent, "input": "x"}, **more)

    async def run(self, *turn_ids: str) -> list[dict[str, Any]]:
        """Let the worker have them, and whatever they start; the turns when they have ended."""
        ringing = asyncio.create_task(self._ring())
        try:
            async with Client(self.api.url, KEY) as client:
                return [dict(await client.wait(turn_id)) for turn_id in turn_ids]
        finally:
            ringing.cancel()

    async def _ring(self) -> None:
        while True:
            turns = (
                await self.api.client.get("/v1/turns", params={"status": ["queued", "running", "waiting"]})
            ).json()["data"]
            await self.worker.wake([parse_id(Prefix.SESSION, turn["session_id"]) for turn in turns])
            await asyncio.sleep(0.02)

    @property
    def spans(self) -> Spans:
        return spans_of(self.exporter.get_finished_spans())


@pytest.fixture
async def site(database_url: str, redis_url: str, tmp_path: Path) -> AsyncIterator[Site]:
    global gate
    gate = asyncio.Event()
    broken.clear()
    exporter = InMemorySpanExporter()
    config = api_config(database_url, redis_url, tmp_path)
    async with running_api(config, traces=traces_to(exporter, service="longshift-api")) as api:
        worker = Worker(config, Agents([child, order, gated]), traces=traces_to(exporter, service="longshift-worker"))
        await worker.start()
        yield Site(api, worker, exporter)
        await worker.stop()


async def test_a_turn_its_children_and_its_retries_continue_the_trace_of_the_caller(site: Site) -> None:
    broken.append(True)
    first = await site.submit("order", headers=PARENT)
    [failed] = await site.run(first["id"])
    broken.clear()
    retry = await site.post(f"/v1/turns/{failed['id']}/retry")
    [ended] = await site.run(retry["id"])

    assert (failed["status"], ended["status"]) == ("failed", "succeeded")
    spans = site.spans
    request = spans.one("POST /v1/turns")
    assert (request.trace, request.parent, request.service) == (CALLER, "b7ad6b7169203331", "longshift-api")
    assert request.attributes["http.response.status_code"] == 202
    assert request.attributes["longshift.turn.id"] == first["id"]
    assert set(spans.below(request)) == {"claim", "turn order"}
    for each in ("turn order", "turn child", "step fetch", "step ship", "claim"):
        assert {span.trace for span in spans.named(each)} == {CALLER}
    attempts = spans.named("turn order", longshift__turn__id=first["id"])  # one if the child was quick, else two
    assert [name for each in attempts for name in spans.below(each) if name != "claim"] == ["turn child", "step ship"]
    assert all(each.attributes["longshift.epoch"] > 0 for each in attempts)
    again = spans.one("POST /v1/turns/{turn_id}/retry")
    assert (again.trace != CALLER, again.links) == (True, (CALLER,))
    assert (
        spans.named("turn order", longshift__turn__id=retry["id"])[-1].attributes["longshift.turn.status"]
        == "succeeded"
    )


async def test_the_turns_of_a_batch_hang_below_its_request(site: Site) -> None:
    lines = "\n".join(f'{{"agent": "child", "input": "{n}"}}' for n in range(3))
    batch = await site.post("/v1/batches", content=lines, headers={"Content-Type": "application/jsonl"})
    turns = (await site.api.client.get("/v1/turns", params={"batch_id": batch["id"]})).json()["data"]
    await site.run(*(turn["id"] for turn in turns))

    request = site.spans.one("POST /v1/batches")
    assert request.attributes["longshift.batch.id"] == batch["id"]
    assert site.spans.below(request).count("turn child") == 3
    assert {span.attributes["longshift.batch.id"] for span in site.spans.named("turn child")} == {batch["id"]}


async def test_a_client_cannot_name_spans_by_making_up_methods(site: Site) -> None:
    await site.api.client.request("BREW", "/v1/turns")

    assert site.spans.one("HTTP").attributes["http.request.method"] == "_OTHER"


async def test_the_attempts_at_a_turn_that_lost_its_worker_stand_side_by_side(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="a.users.agent")
    caplog.handler.addFilter(About())
    turn = await site.submit("gated", headers={"X-Request-Id": "my-request"})
    waiting = asyncio.create_task(site.run(turn["id"]))
    _: bool = await wait_until(lambda: bool(site.spans.named("step fetch")), description="the first step is recorded")
    [(session, _epoch)] = site.worker._runs
    await _lose(site, session)
    gate.set()
    [ended] = await waiting

    assert ended["status"] == "succeeded"
    spans = site.spans
    lost, second = spans.named("turn gated")
    request = spans.one("POST /v1/turns", longshift__request__id="my-request")
    assert (lost.parent, second.parent) == (request.id, request.id)
    assert (lost.attributes["longshift.attempt.outcome"], second.attributes["longshift.attempt"]) == ("lost", 2)
    assert lost.attributes["longshift.epoch"] < second.attributes["longshift.epoch"]
    assert (spans.below(lost), spans.below(second)) == (["step fetch", "step pass_gate"], ["step pass_gate"])
    assert spans.one("step pass_gate", longshift__step__outcome="interrupted").parent == lost.id
    [line] = [record.__dict__ for record in caplog.records if record.message == "fetching"]
    assert (line["turn_id"], line["session_id"], line["attempt"]) == (turn["id"], turn["session_id"], 1)
    assert (line["trace_id"], line["span_id"]) == (lost.trace, spans.one("step fetch").id)


async def _lose(site: Site, session: UUID) -> None:
    """As if another worker had taken the session over."""
    await site.api.db.execute(
        text(
            "UPDATE sessions SET lease_worker = NULL, lease_epoch = nextval('epochs'), ready_at = clock_timestamp()"
            " WHERE id = :session"
        ),
        {"session": session},
    )
    [run] = [run for run, _ in site.worker._runs.values()]
    site.worker._journal.lose(run.lease)
    await wait_until(lambda: run.execution is None, description="the turn is dropped")
