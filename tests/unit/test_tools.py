"""Tools as their authors and models see them: hidden parameters, schemas, checks of arguments, keys."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from longshift import Absent, InvalidInput, Tool, ToolCall, Turn, UsageError, agent, step, tool
from longshift.model import Dedupe, Effect, new_id
from longshift.testing import run
from longshift.tooling import ToolSpec, canonical


class Money(BaseModel):
    amount: int
    currency: str = "EUR"


@tool(effect="write")
async def pay(
    call: ToolCall, to: Annotated[str, Field(description="IBAN")], price: Money, when: datetime | None = None
) -> str:
    """Send money.

    At once.
    """
    return f"{call.key} {to} {price.amount}"


@tool(effect="read", name="look-up")
def look_up(word: str, *, limit: int = 3) -> list[str]:
    return [word] * limit


# -- how it is written


def test_a_tool_knows_what_a_model_must_know_of_it_and_hides_its_call() -> None:
    assert (pay.name, pay.effect, pay.description) == ("pay", Effect.WRITE, "Send money.\n\nAt once.")
    assert look_up.name == "look-up"
    assert list(pay.schema["properties"]) == ["to", "price", "when"]
    assert pay.schema["required"] == ["to", "price"]
    assert pay.schema["properties"]["to"]["description"] == "IBAN"
    assert pay.schema["additionalProperties"] is False
    assert pay.schema["$defs"]["Money"]["properties"]["currency"]["default"] == "EUR"


async def test_outside_a_turn_a_tool_is_the_plain_function_with_a_key_of_its_own() -> None:
    first, second = [(await pay("DE", Money(amount=1))).split() for _ in range(2)]
    assert first[0].startswith("call_")
    assert first[0] != second[0]
    assert look_up("a", limit=1) == ["a"]
    assert await pay.call({"to": "DE", "price": {"amount": 2}}) != ""
    assert await look_up.call({"word": "a"}) == ["a", "a", "a"]


def test_inside_a_step_a_tool_is_part_of_it_and_its_key_is_the_same_on_each_try() -> None:
    seen: list[str] = []

    @step
    async def outer() -> str:
        first, second = await pay("a", Money(amount=1)), await pay("a", Money(amount=1))
        seen.append(first)
        assert first != second
        return first

    @agent("nested")
    async def nested(turn: Turn, _: None) -> str:
        return await outer()

    result = run(nested, None, crash_at="before step.completed outer")
    assert [event.kind for event in result.events if event.key] == ["step.completed"]
    assert len(seen) == 2
    assert len(set(seen)) == 1


def test_a_call_gives_its_key_as_a_header() -> None:
    assert ToolCall("call_1", 1, "pay").headers() == {"Idempotency-Key": "call_1"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"price": {"amount": 1}}, "to: Missing required"),
        ({"to": "DE", "price": {"amount": "x"}}, "price/amount: Input should be a valid integer"),
        ({"to": "DE", "price": {"amount": 1}, "call": "mine"}, "call: Unexpected keyword argument"),
        (["DE"], "do not fit tool 'pay'"),
    ],
)
async def test_arguments_that_do_not_fit_are_refused_and_the_model_can_read_why(arguments: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        await pay.call(arguments)


def test_arguments_of_a_model_arrive_as_the_types_of_the_function() -> None:
    found = pay.validate({"to": "DE", "price": {"amount": 1}, "when": "2030-01-01T00:00:00Z"})
    assert found == {"to": "DE", "price": Money(amount=1), "when": datetime(2030, 1, 1, tzinfo=UTC)}


def test_what_cannot_be_a_tool_is_refused_with_a_reason() -> None:
    with pytest.raises(UsageError, match="'words' has no name for a model to use"):

        @tool(effect="read")
        def many(*words: str) -> None: ...

    with pytest.raises(UsageError, match="two parameters of type ToolCall"):

        @tool(effect="read")
        def twice(one: ToolCall, two: ToolCall) -> None: ...

    with pytest.raises(UsageError, match="only an irreversible one is reconciled"):

        @tool(effect="write", reconcile=lambda call: Absent())
        def careful() -> None: ...

    with pytest.raises(ValueError, match="evil"):
        tool(effect="evil")  # type: ignore[arg-type]


def test_a_parameter_without_a_schema_is_told_when_the_schema_is_asked_for() -> None:
    class Client: ...

    def use(client: Any) -> None: ...

    use.__annotations__["client"] = Client
    with pytest.raises(UsageError, match=r"tool 'use': .*Client"):
        _ = tool(effect="read")(use).schema


# -- the key

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
SPEC = ToolSpec("pay", Effect.WRITE, Dedupe.TURN)
SESSION, TURN = new_id(), new_id()


def key(text: str, spec: ToolSpec = SPEC, *, session: UUID = SESSION, root: UUID = TURN, place: str = "pay#0") -> UUID:
    return spec.key(session_id=session, root_turn_id=root, place=place, text=text)


def key_of(value: Any) -> UUID:
    return key(canonical({"value": value}, tool="pay"))


def same(one: Any, two: Any) -> bool:
    """Equal as JSON: numbers by their value, but true is not 1."""
    if isinstance(one, bool) or isinstance(two, bool):
        return one is two
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(same(one[name], two[name]) for name in one)
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


@given(JSON, JSON)
def test_other_input_has_another_key_and_the_same_input_the_same(one: Any, two: Any) -> None:
    assert (key_of(one) == key_of(two)) is same(one, two)


def shuffled(value: Any) -> Any:
    """The same JSON with the members of objects in another order, and whole numbers as floats."""
    match value:
        case dict():
            return {name: shuffled(value[name]) for name in reversed(value)}
        case list():
            return [shuffled(each) for each in value]
        case int() if not isinstance(value, bool) and abs(value) < 2**53:
            return float(value)
        case _:
            return value


@given(JSON)
def test_the_order_of_an_objects_members_and_how_a_number_is_written_do_not_matter(value: Any) -> None:
    assert key_of(value) == key_of(shuffled(value))


@tool(effect="write")
async def send(call: ToolCall, to: str, text: str = "hello", *, urgent: bool = False) -> str:
    return call.key


@given(st.text(), st.sampled_from(["hello", "other"]), st.booleans(), st.data())
def test_how_arguments_are_given_does_not_matter(to: str, text: str, urgent: bool, data: st.DataObject) -> None:
    places = data.draw(st.integers(0, 2))
    named = {"to": to, "text": text, "urgent": urgent}
    args = [named.pop(name) for name in ("to", "text")[:places]]
    left_out = {name for name, default in (("text", "hello"), ("urgent", False)) if named.get(name) == default}
    drop = data.draw(st.sets(st.sampled_from(sorted(left_out)))) if left_out else set()
    given = {name: named[name] for name in data.draw(st.permutations(sorted(named))) if name not in drop}
    assert canonical_of(send, *args, **given) == canonical_of(send, to=to, text=text, urgent=urgent)


def canonical_of(tool: Tool[..., Any], *args: Any, **kwargs: Any) -> str:
    return canonical(tool.__longshift_step__.arguments(args, kwargs), tool=tool.name)


def test_a_model_and_the_agents_code_make_the_same_call() -> None:
    given_by_model = pay.validate({"price": {"currency": "EUR", "amount": 1.0}, "to": "DE"})
    assert canonical_of(pay, **given_by_model) == canonical_of(pay, "DE", price=Money(amount=1))


def test_a_key_belongs_to_session_scope_and_tool() -> None:
    text = canonical({"n": 1}, tool="pay")
    by_place = ToolSpec("pay", Effect.WRITE, Dedupe.CALL)
    by_id = ToolSpec("pay", Effect.WRITE, Dedupe.CALL, call_id="pay#0")
    everywhere = ToolSpec("pay", Effect.WRITE, Dedupe.SESSION)
    keys = [
        *(key(text, spec) for spec in (SPEC, by_place, by_id, everywhere)),
        *(key(text, spec, session=new_id()) for spec in (SPEC, everywhere)),
        *(key(text, spec, root=new_id()) for spec in (SPEC, by_place, by_id)),
        key(text, by_place, place="pay#1"),
        key(text, ToolSpec("Pay", Effect.WRITE, Dedupe.TURN)),
    ]
    assert len(set(keys)) == len(keys)
    assert key(text, place="pay#1") == key(text)
    assert key(text, by_id, place="pay#1") == key(text, by_id)
    assert key(text, everywhere, root=new_id(), place="pay#1") == key(text, everywhere)


def test_input_that_is_no_data_is_refused_because_calls_could_not_be_told_apart() -> None:
    with pytest.raises(UsageError, match=r"argument 'text' of tool 'send' is a Lock .*a Lock is no data"):
        canonical_of(send, "a", asyncio.Lock())
