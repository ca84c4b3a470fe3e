"""The bytes of a wake-up, without a broker."""

from __future__ import annotations

import base64
import json
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longshift import wakeup
from longshift.errors import InvalidInput

sessions = st.lists(st.uuids(), min_size=1, max_size=wakeup.MAX_SESSIONS)
ONE = UUID(int=1)


def arguments(message: bytes) -> Any:
    _args, kwargs, _embed = json.loads(base64.b64decode(json.loads(message)["body"]))
    return kwargs


@given(sessions)
def test_a_message_carries_its_sessions_in_order(session_ids: list[UUID]) -> None:
    assert wakeup.decode(arguments(wakeup.encode(session_ids, queue="default"))) == session_ids


@given(st.lists(st.uuids(), max_size=100))
def test_any_number_of_sessions_fits_into_as_few_messages_as_possible(session_ids: list[UUID]) -> None:
    messages = [wakeup.decode(arguments(message)) for message in wakeup.encode_all(session_ids, queue="default")]

    assert [session for message in messages for session in message] == session_ids
    assert len(messages) == -(-len(session_ids) // wakeup.MAX_SESSIONS)


def test_each_message_has_an_id_of_its_own() -> None:
    first, second = (json.loads(wakeup.encode([ONE], queue="default"))["headers"]["id"] for _ in range(2))

    assert first != second


@pytest.mark.parametrize("count", [0, wakeup.MAX_SESSIONS + 1])
def test_a_message_without_sessions_or_with_too_many_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="1 to 16 sessions"):
        wakeup.encode([ONE] * count, queue="default")


@pytest.mark.parametrize("queue", ["default", "gpu-2", "a", "A.b_c", "0", "q" * 63])
def test_the_key_of_a_queue_shows_its_name(queue: str) -> None:
    assert wakeup.queue_key(queue) == f"longshift.wake.{queue}"


@pytest.mark.parametrize("queue", ["", " ", "a b", "a\n", "-a", ".a", "q" * 64, "é", "a\x06\x163", "a:b", "a*"])
def test_a_name_that_could_be_mistaken_is_no_queue(queue: str) -> None:
    with pytest.raises(InvalidInput, match="not the name of a queue"):
        wakeup.queue_key(queue)


@pytest.mark.parametrize(
    "kwargs",
    [
        None,
        [],
        {},
        {"sessions": None},
        {"sessions": []},
        {"sessions": ONE.hex},
        {"sessions": [None]},
        {"sessions": [1]},
        {"sessions": ["x"]},
        {"sessions": [ONE.hex] * 17},
        {"sessions": [ONE.hex], "state": {}},
    ],
)
def test_arguments_of_another_shape_are_no_wake_up(kwargs: object) -> None:
    with pytest.raises(ValueError, match=r"wake-up|hexadecimal UUID"):
        wakeup.decode(kwargs)
