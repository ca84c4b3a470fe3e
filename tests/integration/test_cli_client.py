"""The client: what the command line does not use, and what it does when the API goes away for a moment."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta

import pytest

from longshift.cli.exits import ExitCode
from longshift.client import Client
from longshift.embedded import Guardian
from longshift.errors import ConfigError, Denied, InvalidInput, NotFound, SessionBusy, Unavailable, UnknownAgent
from longshift.model import OnBusy
from tests.support.local_stack import LocalStack, peak_memory, running

MIB = 1024 * 1024
KEY = "lsk_for_the_tests_of_the_client"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, guardian: Guardian) -> Iterator[LocalStack]:
    with running(tmp_path_factory.mktemp("stack"), "--workers", "1", guardian=guardian, api_key=KEY) as stack:
        assert stack.ready
        yield stack


@pytest.fixture
async def client(stack: LocalStack) -> AsyncIterator[Client]:
    async with Client(stack.ready["url"], KEY) as client:
        yield client


async def test_wait_ends_with_the_turn_or_with_its_timeout(client: Client) -> None:
    turn = await client.submit("sleepy", 600)
    changes: list[str] = []
    early = await client.wait(turn["id"], timeout=timedelta(seconds=1), on_change=lambda t: changes.append(t["status"]))
    assert early["status"] == "running"
    await client.cancel(turn["id"])
    ended = await client.wait(turn["id"], on_change=lambda t: changes.append(t["status"]))
    assert ended["status"] == changes[-1] == "cancelled"


async def test_a_batch_is_streamed_from_an_iterable_with_characters_that_end_lines_elsewhere(client: Client) -> None:
    lines = ({"agent": "double", "input": n, "metadata": {"note": "a\u2028b\x85c"}} for n in range(200))
    batch = await client.wait_batch((await client.submit_batch(lines, metadata={"of": "tests"}))["id"])
    results = [turn async for turn in client.results(batch["id"])]
    assert [turn["output"] for turn in results] == [2 * n for n in range(200)]
    assert results[0]["metadata"] == {"note": "a\u2028b\x85c"}


async def test_an_artifact_comes_back_as_it_went(client: Client) -> None:
    content = bytes(range(256)) * 1000
    artifact = await client.upload(content, name="bytes.bin")
    assert (artifact["name"], artifact["size"]) == ("bytes.bin", len(content))
    assert b"".join([chunk async for chunk in client.download(artifact["id"])]) == content
    assert (await client.artifact(artifact["id"]))["sha256"] == artifact["sha256"]


async def test_a_file_is_uploaded_by_its_name(client: Client, stack: LocalStack) -> None:
    path = stack.folder / "notes.txt"
    path.write_text("notes")
    artifact = await client.upload(path)
    assert (artifact["name"], artifact["content_type"]) == ("notes.txt", "text/plain")
    with pytest.raises(InvalidInput, match="cannot read"):
        await client.upload(stack.folder / "none.txt")


def test_artifacts_go_up_and_come_down_with_flat_memory(stack: LocalStack) -> None:
    """Through the command line, the API and a worker: none of them ever holds what is large as a whole."""
    assert stack.ready
    small, large, back = (stack.folder / name for name in ("small", "large.bin", "back.bin"))
    small.write_bytes(b"1")
    large.write_bytes(os.urandom(MIB) * 64)
    ours = [process for process in stack.everything() if "python" in process.name()]
    for path in (small, large):
        before = {process: peak_memory(process) for process in ours}
        put = stack.call("artifacts", "put", str(path), "--type", "image/png", "--json", api_key=KEY)
        got = stack.call("artifacts", "get", put.json["id"], "--output", str(back), api_key=KEY)
        hauled = stack.call("submit", "haul", json.dumps(str(path)), "--wait", api_key=KEY)
        assert (put.code, got.code, hauled.code) == (0, 0, 0)
        assert back.read_bytes() == path.read_bytes()
        assert hauled.json == put.json["sha256"]
    grown = max(peak_memory(process) - before[process] for process in ours)
    assert grown < 24 * MIB  # of 64

    shown = stack.call("artifacts", "show", put.json["id"], api_key=KEY)
    link = stack.call("artifacts", "show", put.json["id"], "--url", api_key=KEY)
    absent = stack.call("artifacts", "get", "art_" + "0" * 32, "--output", str(stack.folder / "absent"), api_key=KEY)
    assert "image/png" in shown.out
    assert (link.out.strip(), "needs the API key" in link.err) == (put.json["links"]["content"], True)
    assert (absent.code, (stack.folder / "absent").exists()) == (ExitCode.NOT_FOUND, False)


async def test_problems_come_out_as_typed_errors(client: Client, stack: LocalStack) -> None:
    with pytest.raises(UnknownAgent, match="no worker has registered"):
        await client.submit("nobody", 1)
    with pytest.raises(InvalidInput) as caught:
        await client.submit("double", "x")
    assert caught.value.errors[0]["path"] == "input"
    with pytest.raises(NotFound, match="there is no batch"):
        await client.batch("bat_01936f6e4b7a7c0e8f5d2f6a3b1c0d9e")
    with pytest.raises(InvalidInput, match="not an identifier"):
        await client.turn("bat_01936f6e4b7a7c0e8f5d2f6a3b1c0d9e")
    async with Client(stack.ready["url"], None) as stranger:
        with pytest.raises(Denied, match="Authorization"):
            await stranger.agents()
    with pytest.raises(ConfigError, match="LONGSHIFT_URL"):
        Client("ftp://somewhere", None)
    async with Client("http://127.0.0.1:1", KEY) as nobody:
        with pytest.raises(Unavailable, match="nothing answers at http"):
            await nobody.agents()


async def test_a_busy_session_refuses_if_asked_to(client: Client) -> None:
    session = await client.create_session(metadata={"of": "tests"})
    turn = await client.submit("sleepy", 600, session_id=session["id"])
    with pytest.raises(SessionBusy):
        await client.submit("double", 1, session_id=session["id"], on_busy=OnBusy.REJECT)
    await client.cancel(turn["id"])
    assert (await client.session(session["id"]))["metadata"] == {"of": "tests"}


async def test_those_who_wait_and_follow_survive_a_death_of_the_api(client: Client, stack: LocalStack) -> None:
    turn = await client.submit("sleepy", 4)
    kinds: list[tuple[int, str]] = []
    async for frame in client.follow(turn["id"]):
        if frame.seq is not None:
            kinds.append((frame.seq, frame.kind))
        if frame.kind == "step.completed":
            os.kill(stack.ready["pids"]["api"], signal.SIGKILL)
    assert kinds == [(1, "turn.started"), (2, "step.completed"), (3, "turn.succeeded")]
    assert (await client.wait(turn["id"]))["output"] == "slept"
    assert [event["seq"] async for event in client.events(turn["id"], after=1)] == [2, 3]
