"""A research agent: a question and documents in, a short answer and a report with quotations out.

It is extractive: it ranks passages by full text and quotes the sentences that answer best. Every quotation is a
verbatim piece of its source; nothing is invented. What is fetched is kept, so that a quotation can be looked up even when
the page has changed.

    download, ingest (each source in a branch of its own) -> plan -> search -> read -> write -> publish
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import defaultdict
from collections.abc import Sequence
from datetime import timedelta
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from longshift import (
    Artifact,
    InvalidInput,
    Passage,
    Retry,
    StepFailed,
    ToolCall,
    Turn,
    Unavailable,
    agent,
    emit,
    step,
    tool,
)
from longshift.agents.html import decoded, page_text
from longshift.agents.text import (
    decode,
    keywords,
    passage_spans,
    rarity,
    relevance,
    sentences_of,
    squeeze,
    stem,
    word_runs,
)
from longshift.config import load
from longshift.fetching import Failed, Guard, fetch, post
from longshift.model import Json

PER_QUERY = 12  # passages that each query contributes
FUSION = 60  # the constant of reciprocal rank fusion: Cormack, Clarke, Buettcher, SIGIR 2009
NO_ANSWER = "The sources do not answer this question."

LASTING = Retry(attempts=5, first=timedelta(seconds=1), longest=timedelta(minutes=2), on=(Unavailable,))
"""For other people's servers, which may be away for a while."""

Text = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]
Url = Annotated[str, StringConstraints(max_length=2000, pattern=r"^https?://[^\s/?#@]+([/?#]\S*)?$")]
"""Of the web, without credentials; whether it may be asked is found out when it is."""


class Stored(BaseModel, extra="forbid"):
    """A document that was uploaded before."""

    artifact: str = Field(pattern="^art_[0-9a-f]{32}$")
    name: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = None

    @property
    def label(self) -> str:
        return self.name or self.artifact


class Inline(BaseModel, extra="forbid"):
    """A document that comes with the question."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    text: Text

    @property
    def label(self) -> str:
        return self.name


class Linked(BaseModel, extra="forbid"):
    """A page or a text on the public web."""

    url: Url
    name: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = None

    @property
    def label(self) -> str:
        return self.name or self.url


class Publish(BaseModel, extra="forbid"):
    """Where the report goes: a webhook that takes JSON and an ``Idempotency-Key``; and whether somebody must agree first."""

    webhook: Url
    approval: bool = False


class Question(BaseModel):
    """What to find out, and where to look."""

    question: Annotated[Text, StringConstraints(max_length=2000)]
    sources: list[Stored | Inline | Linked] = Field(min_length=1, max_length=50)
    max_quotes: int = Field(5, ge=1, le=20)
    publish: Publish | None = None

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"question": "What is a lease?", "sources": [{"name": "glossary", "text": "A lease is a right."}]}
            ]
        },
    )


class Citation(BaseModel):
    """A verbatim piece of a source, and the number of the passage it stands in (from 0)."""

    source: str
    quote: str
    passage: int


class Publication(BaseModel):
    """What became of the report at the webhook, and why."""

    status: Literal["delivered", "declined", "failed"]
    reason: str = ""


class Report(BaseModel):
    """The answer in a few sentences of the sources, what they are, and the report as Markdown."""

    answer: str
    citations: list[Citation]
    report: Artifact
    publication: Publication | None = None


class Ingested(BaseModel):
    """A source that can be searched: ``key`` is what its passages are stored under."""

    key: str
    name: str
    passages: int
    characters: int


@agent(
    "research", version="1"
)  # sources and reports of other kinds came later: without them the steps are those of old
async def research(turn: Turn, question: Question) -> Report:
    """Answers a question from documents, by quotation."""
    sources = await turn.gather(*(take(turn, source) for source in question.sources))
    queries = await plan(question.question)
    passages = await search(turn, queries, sources)
    citations = await read(question.question, passages, sources, limit=question.max_quotes)
    report = await write(turn, question.question, sources, citations)
    done = Report(answer=answer(citations), citations=citations, report=report)
    if question.publish is not None:
        done.publication = await publication(turn, question.publish, question.question, done)
    return done


async def take(turn: Turn, source: Stored | Inline | Linked) -> Ingested:
    """Make one source searchable, fetching it first if it is elsewhere."""
    return await ingest(turn, await download(turn, source) if isinstance(source, Linked) else source)


@step(retry=LASTING, timeout=timedelta(minutes=3))
async def download(turn: Turn, source: Linked) -> Stored:
    """Fetch a page and keep its text.

    Raises:
        InvalidInput: it cannot be fetched; the message names it and says what to do.
        Failed: it could not be fetched now.
    """
    emit(f"fetching {source.label}\n")
    try:
        page = await fetch(source.url, guard=Guard(load().fetch_allow))
    except (InvalidInput, Failed) as error:
        raise _about(source, error) from error
    is_html = "html" in page.content_type or page.body[:200].lstrip().lower().startswith((b"<!doctype html", b"<html"))
    text = await asyncio.to_thread(decoded, page.body, charset=page.charset, is_html=is_html)
    if is_html:
        text = await asyncio.to_thread(page_text, text)
    kept = await turn.artifact("source.txt", text)
    return Stored(artifact=kept.id, name=source.label[:200])


def _about(source: Linked, error: InvalidInput | Failed) -> InvalidInput | Failed:
    """``error``, naming the source."""
    told = type(error)(f"source {source.label!r} cannot be fetched: {error}")
    if isinstance(error, Failed) and isinstance(told, Failed):
        told.retry_after = error.retry_after
    return told


@step(retry=Retry(attempts=4, on=(Unavailable,)))
async def ingest(turn: Turn, source: Stored | Inline) -> Ingested:
    """Make one source searchable in this session.

    Raises:
        InvalidInput: it is empty, too large, or not text.
    """
    emit(f"reading {source.label}\n")
    raw = source.text.encode() if isinstance(source, Inline) else await turn.read(source.artifact)
    text = decode(raw, name=source.label)
    key = hashlib.sha256(raw).hexdigest()[:32]  # by content: the same document again has the same passages
    passages = [text[start:end] for start, end in passage_spans(text)]
    return Ingested(key=key, name=source.label, passages=await turn.index(key, passages), characters=len(text))


@step
async def plan(question: str) -> list[str]:
    """Up to five queries, from broad to narrow: all key words, then phrases, then the longest words."""
    words = keywords(question)
    phrases = [run for run in word_runs(question) if len(run) > 1]
    wanted = [words, *sorted(phrases, key=len, reverse=True), sorted(words, key=len, reverse=True)[:2], words[:3]]
    queries = dict.fromkeys(" ".join(each) for each in wanted if each)
    return list(queries)[:5] or [question]


@step(retry=Retry(attempts=4, on=(Unavailable,)))
async def search(turn: Turn, queries: list[str], sources: list[Ingested]) -> list[Passage]:
    """The passages that the queries find, best first: fused by reciprocal rank."""
    keys = sorted({source.key for source in sources})
    scores: dict[tuple[str, int], float] = defaultdict(float)
    found: dict[tuple[str, int], Passage] = {}
    for query in queries:
        emit(f"searching {query}\n")
        for rank, passage in enumerate(await turn.recall(query, sources=keys, limit=PER_QUERY)):
            place = passage.source, passage.ordinal
            scores[place] += 1 / (FUSION + rank)
            found[place] = passage
    best = sorted(found, key=lambda place: (-scores[place], place))[: 2 * PER_QUERY]
    return [found[place].model_copy(update={"score": round(scores[place], 6)}) for place in best]


@step
async def read(question: str, passages: list[Passage], sources: list[Ingested], limit: int) -> list[Citation]:
    """The sentences that answer best: those with most of the question's rarer words, from the better passages."""
    names = {source.key: source.name for source in reversed(sources)}
    wanted = {stem(word) for word in keywords(question)}
    sentences = [(passage, s) for passage in passages for s in sentences_of(passage.text)]
    weights = rarity([text for _, text in sentences], wanted)
    best = passages[0].score if passages else 1.0
    ranked = sorted(
        (
            (relevance(text, weights) * (0.5 + 0.5 * passage.score / best), -i)
            for i, (passage, text) in enumerate(sentences)
        ),
        reverse=True,
    )
    chosen: dict[str, Citation] = {}
    for score, minus_i in ranked:
        passage, text = sentences[-minus_i]
        if score > 0 and len(chosen) < limit:
            citation = Citation(source=names[passage.source], quote=text, passage=passage.ordinal)
            chosen.setdefault(squeeze(text).lower(), citation)
    emit(f"found {len(chosen)} quotations\n")
    return list(chosen.values())


@step(retry=Retry(attempts=4, on=(Unavailable,)))
async def write(turn: Turn, question: str, sources: list[Ingested], citations: list[Citation]) -> Artifact:
    """The report, kept as an artifact."""
    report = markdown(question, sources, citations)
    return await turn.artifact("report.md", report, content_type="text/markdown; charset=utf-8")


async def publication(turn: Turn, where: Publish, question: str, report: Report) -> Publication:
    """Publish the report, if whoever is asked agrees; that it cannot be is told in it, for the work is done."""
    if where.approval:
        verdict = await turn.approval(
            "publish", show={"question": question, **report.model_dump(exclude={"publication"})}
        )
        if not verdict.granted:
            return Publication(status="declined", reason=verdict.comment or "")
    text = (await turn.read(report.report)).decode()
    content: dict[str, Json] = {"turn_id": turn.id, "question": question, "answer": report.answer, "report": text}
    try:
        await publish(where.webhook, content)
    except StepFailed as error:
        return Publication(status="failed", reason=error.error_message)
    return Publication(status="delivered")


@tool(effect="write", retry=LASTING, timeout=timedelta(minutes=1))
async def publish(call: ToolCall, webhook: str, content: dict[str, Json]) -> None:
    """Post a report to a webhook.

    Not irreversible: it is sent again if nobody knows whether it arrived, each time with the same ``Idempotency-Key``, for
    webhooks are delivered at least once everywhere, and a report that never arrives is worse than one that is known by its
    key to have come before.
    """
    await post(webhook, content, key=call.key, guard=Guard(load().fetch_allow))


def answer(citations: Sequence[Citation]) -> str:
    """The best quotations, two at most, on one line each."""
    return " ".join(squeeze(c.quote) for c in citations[:2]) or NO_ANSWER


def markdown(question: str, sources: Sequence[Ingested], citations: Sequence[Citation]) -> str:
    """Quotations with their numbers, then the sources that they are from."""
    lines = [f"# {squeeze(question)}", "", answer(citations), ""]
    lines += ["## Quotations", ""] if citations else []
    for number, citation in enumerate(citations, start=1):
        lines += [f"> {line}".rstrip() for line in citation.quote.splitlines()]
        lines += ["", f"[{number}] {squeeze(citation.source)}, passage {citation.passage}", ""]
    lines += ["## Sources", ""]
    for source in sources:
        cited = [str(n) for n, c in enumerate(citations, start=1) if c.source == source.name]
        uses = f"quoted in {', '.join(f'[{n}]' for n in cited)}" if cited else "not quoted"
        lines.append(f"* {squeeze(source.name)}: {source.characters:,} characters, {source.passages} passages, {uses}")
    return "\n".join(lines) + "\n"
