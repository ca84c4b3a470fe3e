"""A long session: does its context keep its budget, what does a restore cost as it grows, and how many bytes does it take?

Bytes: ``pg_total_relation_size`` of all tables, with indexes and TOAST, after VACUUM, less what they have when empty. The
peer is LangGraph with its Postgres saver and the same conversation.
"""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Sequence
from uuid import UUID

import psycopg

from longshift.catalogue import Draft
from longshift.context import events, restore
from longshift.db import views
from longshift.events import Context, apply
from longshift.model import Json, TurnRecord
from longshift.tokens import Gauge
from tests.benchmarks.agents import BUDGET
from tests.benchmarks.figures import Report
from tests.benchmarks.prose import ANSWERED, ASKED, TURNS, question
from tests.benchmarks.stack import PATIENCE, ROOT, Site, Stack, until
from tests.support.databases import execute

SIZES = """
SELECT CAST(c.oid AS regclass)::text AS name, pg_total_relation_size(c.oid) AS bytes
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind = 'r' AND n.nspname IN ('public', 'peer')"""
PEER = "peer"
PEERS = ROOT / ".venv-peers" / "bin" / "python"
PASSAGES = ("passages", "passage_vectors")
PARTS = 4
"""Between two of so many parts of the long session its restore is measured."""


async def run(stack: Stack, *, short: bool) -> Report:
    report = Report("long_session", "sessions of many turns: tokens in the context, restore, bytes in Postgres")
    await _grow(stack, report, turns=24 if short else 1000, repetitions=3 if short else 25)
    await _weigh(stack, report, kinds=KINDS[:1] if short else KINDS, turns=20 if short else TURNS)
    return report


# -- a session that grows


async def _grow(stack: Stack, report: Report, *, turns: int, repetitions: int) -> None:
    async with stack.site() as site:
        await site.start()
        session: UUID | None = None
        for part in range(1, PARTS + 1):
            first, last = turns * (part - 1) // PARTS, turns * part // PARTS
            session = await _converse(site, "budgeted", session, first=first, last=last)
            await _restored(site, session, report, turns=last, repetitions=repetitions)
        assert session is not None
        await _check_budget(site, session, report)


async def _restored(site: Site, session: UUID, report: Report, *, turns: int, repetitions: int) -> None:
    [row] = await site.query("SELECT max(seq) AS seq FROM events WHERE session_id = %s", session)
    took, rows = [], 0
    for _ in range(repetitions):
        begun = time.perf_counter()
        restored = await restore(site.db, session, through=row.seq)
        took.append((time.perf_counter() - begun) * 1000)
        rows = restored.rows
    report.add(f"cold restore after {turns:,} turns, {row.seq:,} events ({rows} after the checkpoint)", "ms", took)


async def _check_budget(site: Site, session: UUID, report: Report) -> None:
    """The context after every turn, by folding the whole log."""
    gauge, context, tokens, summaries = Gauge(None), Context(), [], 0
    async for event in events(site.db, session, after=0):
        apply(context, event)
        summaries += event.kind == "context.summarized"
        if event.kind == "turn.succeeded":
            tokens.append(float(sum(await gauge.count(context.messages))))
    report.add(f"context after each turn, of a budget of {BUDGET.tokens:,}; {summaries} summaries", "tokens", tokens)
    report.require(max(tokens) <= BUDGET.tokens, f"a context of {max(tokens):,.0f} tokens is over its budget")
    total = sum(len(question(0)) + ANSWERED for _ in tokens) // 4
    report.notes.append(f"The log of that session has {total:,} tokens of text.")


# -- what it weighs


KINDS = (
    ("talk", "Longshift"),
    ("talk_by_steps", "Longshift, each answer also the result of a step"),
    ("budgeted", f"Longshift, with a budget of {BUDGET.tokens:,} tokens"),
)


async def _weigh(stack: Stack, report: Report, *, kinds: Sequence[tuple[str, str]], turns: int) -> None:
    text = turns * (ASKED + ANSWERED)
    for agent, what in kinds:
        async with stack.site() as site:
            await site.start()
            before = await _sizes(site)
            await _converse(site, agent, None, first=0, last=turns)
            await site.end(list(site.workers))
            _report(report, what, before, await _sizes(site), text=text)
    await _weigh_peer(stack, report, turns=turns, text=text)
    report.notes.append(
        f"{turns} turns of {ASKED} and {ANSWERED} characters: {text:,} bytes of text that does not repeat."
    )


async def _weigh_peer(stack: Stack, report: Report, *, turns: int, text: int) -> None:
    if not PEERS.exists():
        report.notes.append("LangGraph is left out: `make peers` installs it, in an environment of its own.")
        return
    async with stack.site() as site:
        before = await _sizes(site)
        await asyncio.to_thread(execute, site.database_url, "CREATE SCHEMA {name}", name=PEER)  # names meet
        separator = "&" if "?" in site.database_url else "?"
        url = f"{site.database_url}{separator}options=-csearch_path%3D{PEER}"
        command = [str(PEERS), "-m", "tests.benchmarks.langgraph_peer", url, str(turns)]
        await asyncio.to_thread(lambda: subprocess.run(command, cwd=ROOT, check=True))
        _report(report, "LangGraph with its Postgres saver", before, await _sizes(site), text=text)


async def _sizes(site: Site) -> dict[str, int]:
    def vacuum() -> None:
        with psycopg.connect(site.database_url, autocommit=True) as connection:
            connection.execute("VACUUM")

    await asyncio.to_thread(vacuum)
    return {row.name: row.bytes for row in await site.query(SIZES)}


def _report(report: Report, what: str, before: dict[str, int], after: dict[str, int], *, text: int) -> None:
    grown = {name: size - before.get(name, 0) for name, size in after.items()}
    apart = sum(grown.get(name, 0) for name in PASSAGES)
    total = sum(grown.values()) - apart
    report.add(f"{what}: bytes / text", "x", [total / text])
    if apart > 0:
        report.add(f"{what}: passages / text", "x", [apart / text])
    largest = sorted(grown.items(), key=lambda each: -each[1])[:4]
    report.notes.append(f"{what}: {total:,} bytes ({', '.join(f'{name} {size:,}' for name, size in largest if size)})")


# -- turns


async def _converse(site: Site, agent: str, session: UUID | None, *, first: int, last: int) -> UUID:
    """Turns ``first`` to ``last`` of one session, all submitted before the first one has ended; its id."""
    turn: TurnRecord | None = None
    for number in range(first, last):
        value: Json = {"number": number, "text": question(number)}
        accepted = await site.mailbox.submit(Draft(agent, value, session_id=session), tenant_id=site.tenant)
        turn = await views.turn(site.db, accepted.resource_id, tenant_id=site.tenant)
        assert turn is not None
        session = turn.session_id
    assert turn is not None
    assert session is not None
    newest = turn

    async def ended() -> bool:
        now = await views.turn(site.db, newest.id, tenant_id=site.tenant)
        return now is not None and now.status.terminal

    await until(ended, description="the session's last turn ends", limit=PATIENCE)
    [row] = await site.query("SELECT count(*) AS n FROM turns WHERE session_id = %s AND status <> 'succeeded'", session)
    if row.n:
        raise RuntimeError(f"{row.n} turns of the long session did not succeed")
    return session
