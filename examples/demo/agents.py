"""The research agent again, step by step, with two additions: each step leaves a line in a file when its function runs,
and takes as long as if it had to read. The file is what the checker holds against the log.

The steps are those of ``longshift.agents.research``: called inside another step, a step is a plain function.
"""

from __future__ import annotations

import asyncio
import json
import os

from longshift import Artifact, Passage, Turn, agent, step
from longshift.agents import research
from longshift.agents.research import Citation, Ingested, Inline, Linked, Question, Report, Stored
from longshift.clock import SYSTEM

READING = (0.4, 1.2)  # seconds that a step takes on top of its work


async def effect(turn: Turn, step_name: str, subject: str = "") -> None:
    """Leave one line for this run of a step's function, then take some time: long enough to be killed in."""
    line = {
        "at": SYSTEM.now().isoformat(),
        "pid": os.getpid(),
        "turn": turn.id,
        "attempt": turn.attempt,
        "step": step_name,
        "subject": subject,
    }
    _append(turn.metadata["effects"], json.dumps(line) + "\n")
    await asyncio.sleep(turn.random.uniform(*READING))


def _append(path: str, text: str) -> None:
    """One write to a file opened for appending: lines of many processes do not mix."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)


@step
async def ingest(turn: Turn, source: Stored | Inline | Linked) -> Ingested:
    await effect(turn, "ingest", source.label)
    return await research.take(turn, source)


@step
async def plan(turn: Turn, question: str) -> list[str]:
    await effect(turn, "plan")
    return await research.plan(question)


@step
async def search(turn: Turn, queries: list[str], sources: list[Ingested]) -> list[Passage]:
    await effect(turn, "search")
    return await research.search(turn, queries, sources)


@step
async def read(turn: Turn, question: Question, passages: list[Passage], sources: list[Ingested]) -> list[Citation]:
    await effect(turn, "read")
    return await research.read(question.question, passages, sources, limit=question.max_quotes)


@step
async def write(turn: Turn, question: str, sources: list[Ingested], citations: list[Citation]) -> Artifact:
    await effect(turn, "write")
    return await research.write(turn, question, sources, citations)


@agent("demo-research", version="1")
async def demo_research(turn: Turn, question: Question) -> Report:
    """Answers a question from documents, by quotation, slowly and leaving traces."""
    sources = await turn.gather(*(ingest(turn, source) for source in question.sources))
    queries = await plan(turn, question.question)
    passages = await search(turn, queries, sources)
    citations = await read(turn, question, passages, sources)
    report = await write(turn, question.question, sources, citations)
    return Report(answer=research.answer(citations), citations=citations, report=report)
