"""Counting tokens: exactly where a vocabulary is at hand, by characters where none is, and not at all where that will do."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from longshift.tokens import FRAME, Characters, Gauge, TokenCounter, Vocabulary
from tests.support.vocabulary import tiny

texts = st.text(max_size=60)


def message(content: object, *, role: str = "user") -> str:
    text = {"role": role, "content": content, "turn_id": "0" * 32}
    return json.dumps(text, ensure_ascii=False, separators=(",", ":"))


class Watched:
    """A counter that knows what it was asked."""

    def __init__(self, counter: TokenCounter) -> None:
        self._counter, self.asked = counter, list[str]()

    def count(self, text: str) -> int:
        self.asked.append(text)
        return self._counter.count(text)


def test_a_vocabulary_counts_as_its_encoding_encodes() -> None:
    counter = Vocabulary(tiny())
    assert counter.count("abab ab") == 4  # ab, ab, " ", ab
    assert counter.count("") == 0
    assert counter.count("é") == 2


def test_long_text_without_a_space_is_counted_in_parts() -> None:
    assert 50_000 <= Vocabulary(tiny()).count("ab" * 50_000) <= 50_010


def test_characters_are_an_estimate_rounded_up() -> None:
    assert [Characters().count(text) for text in ("", "a", "abcd", "abcde")] == [0, 1, 1, 2]


@given(st.lists(st.one_of(texts, st.dictionaries(texts, st.integers() | texts, max_size=3)), max_size=5), st.booleans())
def test_what_is_proven_to_be_within_is_within(contents: list[object], exact: bool) -> None:
    gauge = Gauge(Vocabulary(tiny()) if exact else None)
    messages = [message(content) for content in contents]
    total = sum(asyncio.run(gauge.count(messages)))
    for tokens in (total - 1, total, 2 * total, 200 * len(contents)):
        assert not gauge.surely_within(messages, tokens) or total <= tokens


async def test_a_message_is_counted_once_in_a_process() -> None:
    counter = Watched(Characters())
    gauge = Gauge(counter)
    assert await gauge.count([message("one"), message({"a": 1})]) == [1 + FRAME, 2 + FRAME]
    assert await gauge.count([message("one"), message({"a": 1}), message("two")]) == [1 + FRAME, 2 + FRAME, 1 + FRAME]
    assert counter.asked == ["one", '{"a":1}', "two"]


async def test_a_vocabulary_is_loaded_when_its_count_is_needed_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def get_encoding(name: str) -> tiktoken.Encoding:
        asked.append(name)
        return tiny()

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    gauge = Gauge("tiny")
    assert gauge.surely_within([message("abab")], 1000)
    assert asked == []
    counts = await asyncio.gather(*(gauge.count([message("abab")]) for _ in range(5)))
    assert counts == [[2 + FRAME]] * 5
    assert asked == ["tiny"]


async def test_a_vocabulary_that_cannot_be_loaded_leaves_the_estimate_with_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(name: str) -> tiktoken.Encoding:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", away)
    gauge = Gauge("o200k_base")
    with caplog.at_level(logging.WARNING):
        counts = await asyncio.gather(*(gauge.count([message("abcdefgh")]) for _ in range(5)))
    assert counts == [[2 + FRAME]] * 5
    assert await gauge.count([message("abcd")]) == [1 + FRAME]
    assert [record.message for record in caplog.records] == [
        "tokens are estimated by characters, since the vocabulary cannot be loaded"
    ]
