"""What an agent's author writes: nothing here may need a cast or an ignore."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import assert_type

from pydantic import BaseModel

from longshift import Absent, Agent, Artifact, Done, Passage, Retry, Tool, ToolCall, Turn, agent, emit, step, tool
from longshift.testing import Result, run


class Question(BaseModel):
    urls: list[str]


class Page(BaseModel):
    url: str
    text: str


class Report(BaseModel):
    title: str
    body: Artifact


@step(retry=Retry(attempts=4), timeout=timedelta(minutes=2))
async def read(url: str) -> Page:
    emit(f"reading {url}\n")
    return Page(url=url, text="...")


@step
async def title(pages: Sequence[Page]) -> str:
    return pages[0].text


@step
def shorten(text: str, *, to: int = 10) -> str:
    return text[:to]


def count(text: str) -> int:
    return len(text)


async def find_ticket(call: ToolCall, title: str) -> Done[str] | Absent:
    return Absent()


@tool(effect="irreversible", reconcile=find_ticket, approval=timedelta(days=1))
async def file_ticket(call: ToolCall, title: str) -> str:
    return call.key


@tool(effect="read")
def look_up(word: str, *, limit: int = 3) -> list[str]:
    return [word]


@agent("triage", version="3")
async def triage(turn: Turn, question: Question) -> Report:
    pages = assert_type(await turn.gather(*(read(u) for u in question.urls)), list[Page])
    heading = assert_type(await title(pages), str)
    heading = assert_type(await turn.step("shorten", shorten, heading, to=5), str)
    assert_type(await turn.step("count", count, heading), int)
    assert_type(await turn.step("read-again", read, "x"), Page)
    assert_type(await turn.recall("what?", limit=3), list[Passage])
    assert_type(await file_ticket(title=heading), str)
    assert_type(await turn.step("file again", file_ticket, heading), str)
    assert_type(await turn.step("look up", look_up, "a", limit=1), list[str])
    tools: list[Tool[..., object]] = [file_ticket, look_up]
    await tools[0].call({"title": heading}, "call-1")
    await turn.sleep(timedelta(days=2))
    await turn.state.set("title", heading)
    return Report(title=heading, body=await turn.artifact("body.md", pages[0].text))


@agent("plain")
def plain(turn: Turn, text: str) -> str:
    turn.sync(turn.say("hello"))
    return assert_type(shorten(text), str)


assert_type(triage, Agent[Question, Report])
assert_type(plain, Agent[str, str])


def check_result() -> None:
    result = run(
        triage, Question(urls=["a"]), fake={read: Page(url="a", text="b")}, crash_after=3, approve={"file_ticket": True}
    )
    assert_type(result, Result[Report])
    assert_type(result.output, Report)
