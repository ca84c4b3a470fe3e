"""The commands that give work and look at it, against a local stack."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterator

import pytest

from longshift.embedded import Guardian
from longshift.testing.waiting import wait_until_sync
from tests.support.local_stack import COMMAND, LocalStack, call, environment, running


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, guardian: Guardian) -> Iterator[LocalStack]:
    with running(tmp_path_factory.mktemp("stack"), "--workers", "2", guardian=guardian) as stack:
        assert stack.ready
        yield stack


def test_submit_with_wait_prints_the_output_and_nothing_else(stack: LocalStack) -> None:
    said = call("submit", "double", "21", "--wait", folder=stack.folder)
    assert (said.code, said.out) == (0, "42\n")
    assert re.fullmatch(r"accepted as turn_[0-9a-f]{32}\n", said.err)


def test_submit_prints_an_id_that_status_result_and_events_understand(stack: LocalStack) -> None:
    turn_id = stack.call("submit", "double", "-", given="4").out.strip()
    assert stack.call("result", turn_id, "--wait").json == 8
    turn = stack.call("status", turn_id, "--json").json
    assert (turn["status"], turn["output"]) == ("succeeded", 8)
    assert "succeeded" in stack.call("status", turn_id).out
    events = stack.call("events", turn_id, "--json").lines
    assert [event["kind"] for event in events] == ["turn.started", "step.completed", "turn.succeeded"]
    assert stack.call("events", turn_id, "--after", "2", "--json").lines == events[2:]


def test_an_input_may_be_a_file_and_a_session_goes_on(stack: LocalStack) -> None:
    (stack.folder / "input.json").write_text("5")
    turn = stack.call("submit", "double", "@input.json", "--wait", "--json").json
    assert turn["output"] == 10
    second = stack.call("submit", "double", "6", "--session", turn["session_id"], "--wait", "--json").json
    assert second["session_id"] == turn["session_id"]
    session = stack.call("status", turn["session_id"], "--json").json
    assert (session["turns"], session["status"]) == (2, "idle")


def test_the_same_idempotency_key_is_the_same_turn(stack: LocalStack) -> None:
    submit = ("submit", "double", "7", "--idempotency-key", "order-7")
    assert stack.call(*submit).out == stack.call(*submit).out
    other = stack.call("submit", "double", "8", "--idempotency-key", "order-7")
    assert other.code == 2
    assert "order-7" in other.err or "idempotency" in other.err.lower()


def test_follow_shows_every_event_in_order_and_ends_with_the_turn(stack: LocalStack) -> None:
    said = stack.call("submit", "double", "9", "--follow", "--json")
    *frames, turn = said.lines
    facts = [frame for frame in frames if frame["seq"] is not None]
    assert [(fact["seq"], fact["event"]) for fact in facts] == [
        (1, "turn.started"),
        (2, "step.completed"),
        (3, "turn.succeeded"),
    ]
    assert frames[-1]["event"] == "done"
    assert (said.code, turn["output"]) == (0, 18)
    again = stack.call("events", turn["id"], "--follow", "--after", "1", "--json").lines
    assert [frame["seq"] for frame in again] == [2, 3, None]


def test_a_turn_that_fails_says_why_and_exits_with_1(stack: LocalStack) -> None:
    said = stack.call("submit", "broken", "1", "--wait")
    assert (said.code, said.out) == (1, "")
    assert "no such luck" in said.err


def test_cancel_ends_a_turn_that_runs(stack: LocalStack) -> None:
    turn_id = stack.call("submit", "sleepy", "600").out.strip()
    early = stack.call("result", turn_id)
    assert early.code == 1
    assert "has not ended" in early.err
    assert stack.call("cancel", turn_id, "--reason", "enough").code == 0
    said = stack.call("result", turn_id, "--wait", "--json")
    assert (said.code, said.json["status"]) == (1, "cancelled")
    assert "enough" in said.err


def test_ctrl_c_ends_the_wait_and_not_the_turn(stack: LocalStack) -> None:
    waiting = subprocess.Popen(
        [*COMMAND, "submit", "sleepy", "600", "--wait"],
        cwd=stack.folder,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert waiting.stderr is not None
    turn_id = waiting.stderr.readline().split()[-1]
    wait_until_sync(
        lambda: stack.call("status", turn_id, "--json").json["status"] == "running", description="the turn runs"
    )
    waiting.send_signal(signal.SIGINT)
    assert waiting.wait(20) == 130
    assert "Traceback" not in waiting.stderr.read()
    waiting.stderr.close()
    assert stack.call("status", turn_id, "--json").json["status"] == "running"
    stack.call("cancel", turn_id)


def test_a_batch_waits_for_all_and_gives_its_results_in_order(stack: LocalStack) -> None:
    lines = [json.dumps({"input": n, "custom_id": f"q{n}"}) for n in range(30)]
    (stack.folder / "batch.jsonl").write_text("\n".join(lines))
    said = stack.call("batch", "batch.jsonl", "--agent", "double", "--wait", "--json")
    assert (said.code, said.json["counts"]["succeeded"]) == (0, 30)
    results = stack.call("result", said.json["id"]).lines
    assert [(turn["custom_id"], turn["output"]) for turn in results] == [(f"q{n}", 2 * n) for n in range(30)]
    assert "30 of 30" in stack.call("status", said.json["id"]).out


def test_a_batch_with_a_turn_that_fails_exits_with_1(stack: LocalStack) -> None:
    lines = '{"agent": "double", "input": 1}\n{"agent": "broken", "input": 2}\n'
    said = stack.call("batch", "-", "--wait", given=lines)
    assert said.code == 1
    assert "1 succeeded, 1 failed" in said.err
    assert stack.call("result", said.out.strip()).code == 1


def test_lines_of_a_batch_that_do_not_fit_are_named_and_none_is_accepted(stack: LocalStack) -> None:
    (stack.folder / "bad.jsonl").write_text(
        '{"agent": "double", "input": 1}\n{"agent": \n\n{"agent": "double", "input": "x"}\n'
    )
    said = stack.call("batch", "bad.jsonl")
    assert (said.code, said.out) == (2, "")
    assert "line 2" in said.err
    assert "line 4: input: 'x' is not of type 'integer'" in said.err
    said = stack.call("batch", "bad.jsonl", "--agent", "double")
    assert said.code == 2
    assert "line 2 is not JSON" in said.err


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (("submit", "nobody", "1"), 3, "no worker has registered an agent 'nobody'"),
        (("submit", "double", '"x"'), 2, "input: 'x' is not of type 'integer'"),
        (("submit", "double", "x"), 2, "INPUT is not JSON"),
        (("submit", "double", "NaN"), 2, "NaN is not JSON"),
        (("submit", "double", '"\\ud800"'), 2, "is not of type 'integer'"),
        (("submit", "double", "@no/such/file"), 2, "cannot read 'no/such/file'"),
        (("submit", "double", "1", "--session", "turn_1"), 2, "'turn_1' is not an identifier"),
        (("batch", "no/such/file"), 2, "cannot read 'no/such/file'"),
        (("batch", "-"), 2, "empty"),
        (("status", "turn_01936f6e4b7a7c0e8f5d2f6a3b1c0d9e"), 3, "there is no turn"),
        (("result", "bat_01936f6e4b7a7c0e8f5d2f6a3b1c0d9e"), 3, "there is no batch"),
        (("events", "ses_01936f6e4b7a7c0e8f5d2f6a3b1c0d9e", "--follow"), 3, "there is no session"),
        (("status", "01936f6e"), 2, "'01936f6e' is not an identifier of the form turn_"),
        (("submit",), 2, "Missing argument"),
        (("keys", "create", "me", "--scope", "root"), 2, "there is no scope 'root'"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    stack: LocalStack, arguments: tuple[str, ...], code: int, expected: str
) -> None:
    said = stack.call(*arguments)
    assert (said.code, said.out) == (code, "")
    assert expected in said.err


def test_a_wrong_key_is_refused(stack: LocalStack) -> None:
    for command in (("agents",), ("submit", "double", "1"), ("batch", "-")):
        said = stack.call(*command, given='{"agent": "double", "input": 1}\n' * 1000, api_key="lsk_wrong_wrong_wrong")
        assert said.code == 5
        assert "longshift keys create" in said.err


def test_without_a_server_the_error_says_where_and_what_to_do(stack: LocalStack) -> None:
    said = stack.call("agents", url="http://127.0.0.1:1")
    assert said.code == 4
    assert said.err == (
        "error: nothing answers at http://127.0.0.1:1: start a local stack with `longshift up`, or set LONGSHIFT_URL\n"
    )
    assert stack.call("agents", url="127.0.0.1").code == 2


def test_keys_are_made_shown_once_limited_and_revoked(stack: LocalStack) -> None:
    made = stack.call("keys", "create", "reader", "--scope", "read", "--days", "1", "--json").json
    assert stack.call("agents", api_key=made["key"]).code == 0
    denied = stack.call("submit", "double", "1", api_key=made["key"])
    assert denied.code == 5
    assert "'submit'" in denied.err
    listed = stack.call("keys", "list")
    assert made["id"] in listed.out
    assert made["key"] not in listed.out
    assert stack.call("keys", "revoke", made["id"]).code == 0
    assert stack.call("keys", "create", "eternal", "--days", "999999999").code == 2
    states = {key["id"]: key["state"] for key in stack.call("keys", "list", "--json").json}
    assert states[made["id"]] == "revoked"
    wait_until_sync(lambda: stack.call("agents", api_key=made["key"]).code == 5, description="the key is refused")


def test_agents_shows_what_workers_have_registered(stack: LocalStack) -> None:
    assert {agent["name"] for agent in stack.call("agents", "--json").json} == {"double", "sleepy", "haul", "broken"}
    assert re.search(r"double +1 +default +Twice the number\.", stack.call("agents").out)
