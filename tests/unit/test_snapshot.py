"""A context as text: what was written is what is read, and nothing else passes for it."""

from __future__ import annotations

import pytest
from hypothesis import given

from longshift import snapshot
from longshift.errors import InvalidInput
from longshift.events import Event, fold
from tests.unit.test_fold import logs


@given(logs)
def test_what_is_read_is_what_was_written(events: list[Event]) -> None:
    context = fold(events)

    assert snapshot.read(snapshot.write(context)) == context


@given(logs)
def test_a_snapshot_that_is_cut_off_is_refused(events: list[Event]) -> None:
    whole = snapshot.write(fold(events))

    with pytest.raises(InvalidInput):
        snapshot.read(whole + "\n1")


@pytest.mark.parametrize("text", ["", "null", "{}", '{"v":2,"seq":0,"event_id":null,"messages":0,"state":[]}', "[1]"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        snapshot.read(text)
