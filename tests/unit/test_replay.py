"""Replay keys: which recorded result belongs to which call."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from longshift.errors import UsageError
from longshift.events import Event, Kind
from longshift.model import new_id
from longshift.replay import Replay, Scope, check_name, digest_of

START = datetime(2026, 1, 1, tzinfo=UTC)
SESSION = UUID(int=1)
TURN = UUID(int=2)

calls = st.tuples(st.sampled_from("abc"), st.sampled_from("123"))  # (name, digest)
branches = st.lists(st.lists(calls, max_size=6), min_size=1, max_size=4)


def root() -> Scope:
    return Scope(path="", now=START, seed="seed")


def completed(key: str, *, digest: str, seq: int = 1, result: Any = None) -> Event:
    payload = {"digest": digest, "result": result}
    return Event(SESSION, seq, new_id(), 1, TURN, Kind.STEP_COMPLETED, key, payload, START)


def interleaved(data: st.DataObject, lengths: list[int]) -> Iterator[tuple[int, int]]:
    """(branch, place) of calls in some order that keeps the order within each branch."""
    done = [0] * len(lengths)
    while open_ := [b for b, n in enumerate(lengths) if done[b] < n]:
        branch = data.draw(st.sampled_from(open_))
        yield branch, done[branch]
        done[branch] += 1


@given(branches, st.data())
def test_keys_are_unique(program: list[list[tuple[str, str]]], data: st.DataObject) -> None:
    replay, scopes = Replay([]), root().fork_branches(len(program))
    keys = [
        replay.call(scopes[b], program[b][n][0], digest=program[b][n][1]).key
        for b, n in interleaved(data, [len(branch) for branch in program])
    ]
    assert len(set(keys)) == len(keys)


@given(branches, st.data())
def test_each_call_gets_its_own_record_in_any_interleaving(
    program: list[list[tuple[str, str]]], data: st.DataObject
) -> None:
    lengths = [len(branch) for branch in program]
    first, scopes = Replay([]), root().fork_branches(len(program))
    keys = {
        (b, n): first.call(scopes[b], program[b][n][0], digest=program[b][n][1]).key
        for b, n in interleaved(data, lengths)
    }
    durable = [data.draw(st.integers(0, n)) for n in lengths]  # of each branch a prefix
    events = [
        completed(key, digest=program[b][n][1], seq=seq)
        for seq, ((b, n), key) in enumerate(keys.items(), start=1)
        if n < durable[b]
    ]

    again, scopes = Replay(events), root().fork_branches(len(program))
    seen = {}
    for b, n in interleaved(data, lengths):
        call = again.call(scopes[b], program[b][n][0], digest=program[b][n][1])
        seen[b, n] = call.key
        assert not call.diverged
        assert (call.recorded is not None) == (n < durable[b])
        if call.recorded is not None:
            assert call.recorded.digest == program[b][n][1]

    assert len(set(seen.values())) == len(seen)
    assert again.unused == []


def test_calls_that_changed_places_are_recognised_by_their_arguments() -> None:
    replay = Replay([completed("read#0", digest="x"), completed("read#1", digest="y")])
    scope = root()
    assert replay.call(scope, "read", digest="y").key == "read#1"
    assert replay.call(scope, "read", digest="x").key == "read#0"


def test_a_recorded_call_wins_over_changed_arguments_and_is_reported_once() -> None:
    events = [completed("read#0", digest="old")]
    call = Replay(events).call(root(), "read", digest="new")
    assert call.recorded is not None
    assert call.diverged

    events.append(Event(SESSION, 2, new_id(), 1, TURN, Kind.TURN_DIVERGED, "read#0", {}, START))
    assert not Replay(events).call(root(), "read", digest="new").diverged


def test_what_was_handed_out_by_its_place_is_not_found_by_its_arguments_again() -> None:
    replay = Replay([completed("read#0", digest="x"), completed("read#1", digest="x")])
    scope = root()
    calls = [replay.call(scope, "read", digest=digest) for digest in ("new", "x", "x")]
    assert [(call.key, call.recorded is not None) for call in calls] == [
        ("read#0", True),
        ("read#1", True),
        ("read#2", False),
    ]


def test_strangers_that_changed_their_order_keep_their_results() -> None:
    replay = Replay([completed("~~0/read#0", digest="x"), completed("~~1/read#0", digest="y")])
    scope = root()
    first, second = scope.fork_stranger(owner=None), scope.fork_stranger(owner=None)
    swapped = [replay.call(first, "read", digest="y"), replay.call(second, "read", digest="x")]
    assert [(call.key, call.diverged) for call in swapped] == [("~~1/read#0", False), ("~~0/read#0", False)]


def test_gathers_and_tasks_are_numbered_apart() -> None:
    scope = root()
    scope.fork_task()
    assert [branch.path for branch in scope.fork_branches(2)] == ["0.0/", "0.1/"]


def test_records_that_nobody_asks_for_are_told() -> None:
    replay = Replay([completed("read#0", digest="x"), completed("gone#0", digest="")])
    replay.call(root(), "read", digest="x")
    assert replay.unused == ["gone#0"]


def test_a_scope_has_the_same_random_numbers_on_every_replay() -> None:
    assert root().random.random() == root().random.random()
    left, right = root().fork_branches(2)
    assert left.random.random() != right.random.random()


@pytest.mark.parametrize("name", ["", "a/b", "a#1", "~x", "$say", "a\nb", "x" * 129])
def test_a_name_that_would_break_keys_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a step"):
        check_name(name)


class Model(BaseModel):
    tags: set[str]


@dataclass
class Record:
    tags: frozenset[str]


DIGESTS = """
from tests.unit.test_replay import Model, Record
from longshift.replay import digest_of
words = {"alpha", "beta", "gamma", "delta"}
tags = [Model(tags=words), {"d": Record(frozenset(words))}]
print(digest_of("f", {"a": words, "b": tags, "e": {(1, "x"), (2, "y")}}))
"""


def test_a_digest_does_not_depend_on_the_process() -> None:
    found = {
        subprocess.run(
            [sys.executable, "-c", DIGESTS],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(), st.lists))
def test_any_argument_has_a_digest(value: object) -> None:
    assert digest_of("f", {"x": value}) == digest_of("f", {"x": value})


def test_what_is_not_json_counts_by_its_type() -> None:
    assert digest_of("f", {"x": object()}) == digest_of("f", {"x": object()})
    assert digest_of("f", {"x": object()}) != digest_of("f", {"x": Scope})
