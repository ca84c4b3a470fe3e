"""The commands by which people decide, and those that show what a turn has done, against an API in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from longshift.events import Kind
from longshift.testing.waiting import wait_until
from tests.support.api import KEY, Api, Hand
from tests.support.local_stack import Said, call_inline

Run = Callable[..., Coroutine[Any, Any, Said]]


@pytest.fixture
def run(api: Api, tmp_path: Path) -> Run:
    """Runs a command in a thread, while the API serves it from here."""

    async def running(*arguments: str, given: str = "", api_key: str = KEY) -> Said:
        return await asyncio.to_thread(
            call_inline, *arguments, folder=tmp_path, given=given, url=api.url, api_key=api_key
        )

    return running


async def running_turn(api: Api) -> tuple[Hand, dict[str, Any]]:
    turn = await api.submit()
    hand = Hand(api, turn["session_id"])
    await hand.take()
    await hand.start(turn["id"])
    return hand, turn


async def test_an_operator_finds_what_is_in_doubt_and_settles_it(api: Api, run: Run) -> None:
    hand, turn = await running_turn(api)
    call = await hand.doubt(turn["id"], amount=120)

    listed = await run("tools", "--open")
    shown = await run("tools", call)
    settled = await run("settle", call, "--done", "--result", '{"payment": 7}', "--note", "in the books", "--json")
    late = await run("settle", call, "--not-done")

    assert call in listed.out
    assert "unknown" in listed.out
    assert '{"amount": 120}' in shown.out
    assert "no result within 60 s" in shown.out
    assert (settled.code, settled.json["status"], settled.json["result"]) == (0, "done", {"payment": 7})
    assert settled.json["note"] == "in the books"
    assert (late.code, late.out) == (6, "")
    assert "settled it at" in late.err
    assert (await run("tools", "--open", "--json")).lines == []
    (promise,) = await api.db.fetch(text("SELECT route FROM idempotency"))  # a lost answer may be asked for again
    assert promise.route == "POST /v1/tool-calls/{call_id}/settle"


async def test_settling_takes_a_result_from_standard_input_and_gives_up_when_told_to(api: Api, run: Run) -> None:
    hand, turn = await running_turn(api)
    first, second = await hand.doubt(turn["id"], n=1), await hand.doubt(turn["id"], n=2)

    done = await run("settle", first, "--done", "--result", "-", given="[1, 2]")
    given_up = await run("settle", second, "--give-up")

    assert (done.code, done.err.strip()) == (0, f"{first} is settled: done")
    assert (given_up.code, given_up.err.strip()) == (0, f"{second} is settled: given_up")
    results = {call["id"]: call["result"] for call in (await run("tools", turn["id"], "--json")).lines}
    assert results == {first: [1, 2], second: None}
    assert len((await run("tools", turn["session_id"])).out.splitlines()) == 3  # with the heading


async def test_an_approval_is_listed_shown_and_answered_once(api: Api, run: Run) -> None:
    hand, turn = await running_turn(api)
    approval = await hand.ask(turn["id"], "publish", show={"title": "Leases"})

    listed = await run("approvals")
    shown = await run("approvals", approval)
    denied = await run("approve", approval, "--deny", "--comment", "not yet")
    late = await run("approve", approval)

    assert approval in listed.out
    assert '{"title": "Leases"}' in listed.out
    assert "open" in shown.out
    assert (denied.code, denied.out) == (0, "")
    assert f"{approval} is denied" in denied.err
    assert late.code == 6
    assert "was denied by key" in late.err
    (after,) = (await run("approvals", turn["id"], "--all", "--json")).lines
    assert (after["granted"], after["comment"]) == (False, "not yet")
    assert (await run("approvals", turn["session_id"], "--json")).lines == []


async def test_a_signal_is_sent_and_says_what_it_answered(api: Api, run: Run) -> None:
    hand, turn = await running_turn(api)
    approval = await hand.ask(turn["id"], "publish")

    plain = await run("signal", turn["session_id"], "reviewed", '{"ok": true}', "--json")
    answer = await run("signal", turn["session_id"], "publish", "true")

    assert (plain.code, plain.json["name"], plain.json["approval_id"]) == (0, "reviewed", None)
    assert answer.code == 0
    assert approval in answer.err


async def test_steps_shows_a_line_for_each(api: Api, run: Run) -> None:
    hand, turn = await running_turn(api)
    await hand.append(turn["id"], {"name": "search", "digest": "d", "result": {"hits": 3}, "ms": 12, "attempts": 2})
    broken = {"name": "mail", "digest": "d", "error": {"type": "OSError", "message": "no route"}}
    await hand.append(turn["id"], broken, kind=Kind.STEP_FAILED, key="mail#0")

    said = await run("steps", turn["id"])

    first, second = said.out.splitlines()
    assert first.split()[2:] == ["completed", "search", "12", "ms", "2", "tries", '{"hits":', "3}"]
    assert "failed     mail" in second
    assert "no route" in second
    assert [step["seq"] for step in (await run("steps", turn["id"], "--after", "2", "--json")).lines] == [3]


async def test_a_failed_turn_is_retried_and_waited_for(api: Api, run: Run) -> None:
    hand, turn = await running_turn(api)
    early = await run("retry", turn["id"])
    await hand.fail(turn["id"], {"code": "step_failed", "message": "no such luck"})

    waiting = asyncio.create_task(run("retry", turn["id"], "--wait", "--json"))

    async def accepted() -> Any:
        return (await api.client.get("/v1/turns?status=queued")).json()["data"]

    assert await wait_until(accepted, description="the retry is accepted")
    (again,) = await accepted()
    late = await run("retry", turn["id"])
    await Hand(api, turn["session_id"]).run(again["id"], "done at last")
    said = await waiting
    assert (said.code, said.json["output"], said.json["retry_of"]) == (0, "done at last", turn["id"])
    assert (early.code, early.out, late.code) == (6, "", 6)
    assert "is running: cancel it first" in early.err
    assert f"is already being retried by {again['id']}" in late.err


async def test_what_does_not_fit_is_one_sentence_and_its_exit_code(run: Run) -> None:
    call, approval, turn = "call_" + "0" * 32, "apr_" + "0" * 32, "turn_" + "0" * 32
    for arguments, code, expected in (
        (("tools",), 2, "or say --open"),
        (("tools", "--open", turn), 2, "or say --open"),
        (("tools", "bat_1"), 2, "not an identifier of the form"),
        (("tools", turn), 3, "there is no turn"),
        (("tools", call), 3, "there is no tool call"),
        (("settle", call), 2, "say one of --done, --not-done and --give-up"),
        (("settle", call, "--done", "--give-up"), 2, "say one of"),
        (("settle", call, "--not-done", "--result", "1"), 2, "with --done only"),
        (("settle", call, "--done", "--result", "x"), 2, "--result is not JSON"),
        (("settle", call, "--done"), 3, "there is no tool call"),
        (("settle", turn, "--done"), 2, "not an identifier of the form call_"),
        (("approve", approval), 3, "there is no approval"),
        (("approvals", "bat_1"), 2, "not an identifier of the form"),
        (("signal", turn, "go"), 2, "not an identifier of the form ses_"),
        (("signal", "ses_" + "0" * 32, "go", "x"), 2, "PAYLOAD is not JSON"),
        (("steps", turn), 3, "there is no turn"),
    ):
        said = await run(*arguments)
        assert (said.code, said.out) == (code, ""), arguments
        assert expected in said.err, arguments
