"""The fold of the log as properties (P5): the same whatever is cached, whoever wrote, whatever is not known yet."""

from __future__ import annotations

from copy import deepcopy
from datetime import UTC, datetime
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from longshift.events import Context, Event, Kind, fold
from longshift.model import Json

SESSION = UUID(int=1)
AT = datetime(2026, 1, 1, tzinfo=UTC)
names = st.sampled_from(["a", "b", "c", ""])
scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3))

started = st.fixed_dictionaries({"attempt": st.integers(1, 3), "input": values})
succeeded = st.fixed_dictionaries({"output": values})
said = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool"]), "content": values})
changed = st.fixed_dictionaries(
    {}, optional={"set": st.dictionaries(names, values, max_size=3), "unset": st.lists(names, max_size=3)}
)
summarized = st.fixed_dictionaries({"replaces": st.integers(1, 4), "role": st.just("system"), "content": values})
anything = st.dictionaries(names, values, max_size=3)
PAYLOADS: dict[str, st.SearchStrategy[dict[str, Json]]] = {
    Kind.TURN_STARTED: started,
    Kind.TURN_SUCCEEDED: succeeded,
    Kind.MESSAGE_SAID: said,
    Kind.STATE_CHANGED: changed,
    Kind.CONTEXT_SUMMARIZED: summarized,
}
UNKNOWN = ("turn.dreamt", "step.begun", "")


@st.composite
def facts(draw: st.DrawFn) -> tuple[str, dict[str, Json], UUID | None]:
    kind = draw(st.sampled_from([*Kind, *UNKNOWN]))
    turn = draw(st.none() | st.integers(1, 3).map(lambda n: UUID(int=n)))
    return str(kind), draw(PAYLOADS.get(kind, anything)), turn


def log_of(facts: list[tuple[str, dict[str, Json], UUID | None]]) -> list[Event]:
    return [
        Event(SESSION, seq, UUID(int=1000 + seq), 1, turn, kind, None, payload, AT)
        for seq, (kind, payload, turn) in enumerate(facts, start=1)
    ]


logs = st.lists(facts(), max_size=12).map(log_of)


@given(logs, st.integers(0, 12))
def test_folding_in_two_parts_is_folding_at_once(events: list[Event], cut: int) -> None:
    assert fold(events[cut:], start=fold(events[:cut])) == fold(events)


@given(logs, st.lists(st.integers(0, 12), max_size=4))
def test_checkpoints_anywhere_make_no_difference(events: list[Event], cuts: list[int]) -> None:
    context, done = Context(), 0
    for cut in sorted(cuts):
        context, done = fold(events[done:cut], start=context), max(done, min(cut, len(events)))

    assert fold(events[done:], start=context) == fold(events)


@given(logs)
def test_folding_twice_gives_the_same_and_changes_no_event(events: list[Event]) -> None:
    before = deepcopy(events)

    assert fold(events) == fold(iter(events))
    assert events == before


@given(logs, logs)
def test_a_context_that_is_folded_further_stays_as_it_was(first: list[Event], more: list[Event]) -> None:
    start = fold(first)
    before = deepcopy(start)

    fold(more, start=start)

    assert start == before


@given(logs)
def test_what_is_not_known_is_passed_over_and_counted(events: list[Event]) -> None:
    known = [event for event in events if event.kind in PAYLOADS]

    assert fold(events).history == fold(known).history
    assert fold(events).state == fold(known).state
    assert fold(events).seq == len(events)
    assert fold(events).event_id == (events[-1].id if events else None)


def test_a_resumed_turn_asks_its_question_once() -> None:
    turn = UUID(int=7)
    events = log_of(
        [
            (Kind.TURN_STARTED, {"attempt": 1, "input": "why?"}, turn),
            (Kind.TURN_STARTED, {"attempt": 2, "input": "why?"}, turn),
            (Kind.TURN_SUCCEEDED, {"output": "because"}, turn),
        ]
    )

    assert [message["content"] for message in fold(events).history] == ["why?", "because"]


def test_a_summary_stands_for_the_oldest_messages() -> None:
    events = log_of(
        [
            (Kind.MESSAGE_SAID, {"role": "user", "content": "one"}, None),
            (Kind.MESSAGE_SAID, {"role": "user", "content": "two"}, None),
            (Kind.MESSAGE_SAID, {"role": "user", "content": "three"}, None),
            (Kind.CONTEXT_SUMMARIZED, {"replaces": 2, "role": "system", "content": "one and two"}, None),
            (Kind.MESSAGE_SAID, {"role": "user", "content": "four"}, None),
        ]
    )

    assert [message["content"] for message in fold(events).history] == ["one and two", "three", "four"]


def test_a_value_in_the_cold_tier_is_shown_as_a_pointer() -> None:
    artifact = {"id": "ab" * 16, "size": 5_000_000, "sha256": "00", "preview": "It was"}
    events = log_of([(Kind.TURN_SUCCEEDED, {"artifact": artifact}, None)])

    shown = {"$artifact": "art_" + "ab" * 16, "size": 5_000_000, "preview": "It was"}
    assert [message["content"] for message in fold(events).history] == [shown]
