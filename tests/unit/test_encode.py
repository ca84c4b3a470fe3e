"""What is written is what Postgres takes and what is read back: one refused value would abort a whole batch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from uuid import UUID

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from longshift.errors import InvalidInput
from longshift.events import DEEPEST, encode, storable
from longshift.model import Json

# every code point, NUL and lone surrogates included, and what looks like an escape of one
nasty = st.sampled_from(
    ["\0", "\ud800", "\udfff", "\ud83d", "\ude00", "\\", "\\u0000", "\\ud800", '"', "\x1f", "\u2028", "ä", "😀"]
)
texts = st.lists(nasty | st.characters(exclude_categories=()), max_size=8).map("".join)
clean = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
numbers = st.integers() | st.integers(10**30, 10**40) | st.floats(allow_nan=False, allow_infinity=False)


def payloads(strings: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Json]]:
    scalars = st.none() | st.booleans() | numbers | strings
    inner = st.recursive(
        scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(strings, v, max_size=4), max_leaves=12
    )
    return st.dictionaries(strings, inner, max_size=4)


@pytest.fixture
def server(database_url: str) -> Iterator[psycopg.Connection[tuple[Json, ...]]]:
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


on_server = settings(
    max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@on_server
@given(payloads(texts))
@example({"\0": "\ud83d\ude00", "\\u0000": ["\\\\u0000", "\\\0", "\ud800\0"]})
def test_postgres_takes_what_encode_writes_and_gives_it_back(
    server: psycopg.Connection[tuple[Json, ...]], payload: dict[str, Json]
) -> None:
    text = encode(payload)

    row = server.execute("SELECT CAST(%(text)s AS json), CAST(%(text)s AS jsonb)::text", {"text": text}).fetchone()

    assert row is not None
    assert row[0] == json.loads(text)


@on_server
@given(st.lists(texts, min_size=1))
def test_postgres_takes_plain_text_too(server: psycopg.Connection[tuple[Json, ...]], strings: list[str]) -> None:
    kept = [storable(string) for string in strings]

    row = server.execute("SELECT CAST(%s AS text[])", (kept,)).fetchone()

    assert row == (kept,)


@given(payloads(clean))
def test_what_was_clean_is_not_changed(payload: dict[str, Json]) -> None:
    text = encode(payload)

    assert json.loads(text) == payload
    assert storable(text) == text
    assert storable(json.dumps(payload)) == json.dumps(payload)


@given(clean)
@example("a literal \\u0000, six characters")
def test_plain_text_that_only_looks_like_an_escape_is_kept(string: str) -> None:
    assert storable(string) == string


@given(texts)
def test_only_what_cannot_be_stored_is_replaced(string: str) -> None:
    written = json.loads(encode({"value": string}))["value"]

    paired = string.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    assert written == paired.replace("\0", "\u2400")


@given(payloads(texts))
def test_encoding_twice_changes_nothing_more(payload: dict[str, Json]) -> None:
    once = encode(payload)

    assert storable(once) == once


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
        {1, 2},
        b"bytes",
        UUID(int=1),
        pytest.param(10 ** (sys.get_int_max_str_digits() + 1), id="huge"),
    ],
)
def test_what_is_not_json_is_invalid_input(value: Json) -> None:
    with pytest.raises(InvalidInput):
        encode({"value": value})


def nested(depth: int) -> dict[str, Json]:
    value: Json = 0
    for _ in range(depth - 1):
        value = [value]
    return {"value": value}


def test_what_is_nested_too_deep_to_be_read_back_is_invalid_input(
    server: psycopg.Connection[tuple[Json, ...]],
) -> None:
    row = server.execute("SELECT CAST(%s AS json)", (encode(nested(DEEPEST)),)).fetchone()
    assert row == (nested(DEEPEST),)

    for depth in (DEEPEST + 1, 100_000):
        with pytest.raises(InvalidInput):
            encode(nested(depth))


def test_many_shallow_lists_are_not_deep() -> None:
    assert encode({"value": [[]] * 1000})


def test_a_value_over_the_limit_is_invalid_input_and_says_how_large_it_is() -> None:
    assert encode({"a": "ä"}, limit=10)
    with pytest.raises(InvalidInput, match="11 bytes"):
        encode({"a": "äb"}, limit=10)
