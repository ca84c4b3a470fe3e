"""Plain text for the research agent: decoding, passages, sentences, words. Pure; spans are offsets into the text."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from longshift import InvalidInput

PASSAGE = 700  # characters of a passage, about; long enough to hold a thought, short enough to rank
LONGEST = 1_000  # characters of a sentence; what has no full stop is cut between words
LARGEST = 16 * 1024 * 1024  # bytes of one source


def decode(raw: bytes, *, name: str) -> str:
    """``raw`` as text.

    Raises:
        InvalidInput: it is empty, too large, or not UTF-8 text; the message names the source.
    """
    if len(raw) > LARGEST:
        raise InvalidInput(f"source {name!r} has {len(raw):,} bytes, more than {LARGEST:,}: split it")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InvalidInput(f"source {name!r} is not UTF-8 text: convert it to plain text first") from None
    if "\0" in text:
        raise InvalidInput(f"source {name!r} is binary: convert it to plain text first")
    if not text.strip():
        raise InvalidInput(f"source {name!r} is empty: leave it out, or upload it again")
    return text


_BREAK = re.compile(
    r"""\n[ \t\r]*\n\s*"""  # a blank line
    r"""|(?<=[.!?])["')\]*]*\s+(?=["'(\[*]*[A-Z0-9])"""  # the end of a sentence
    r"""|\n(?=\s*(?:[-*+•#]|\d+[.)])\s)""",  # the next item of a list, the next heading
)


def sentence_spans(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of each sentence, without the white space around it."""
    start = 0
    for match in [*_BREAK.finditer(text), None]:
        end = match.start() if match else len(text)
        yield from _cut(text, start, end)
        start = match.end() if match else end


def _cut(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The span without white space at its ends, in pieces of at most ``LONGEST``, cut between words where possible."""
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    if end - start <= LONGEST:
        if start < end:
            yield start, end
        return
    space = max(text.rfind(" ", start, start + LONGEST), text.rfind("\n", start, start + LONGEST))
    middle = space if space > start else start + LONGEST
    yield from _cut(text, start, middle)
    yield from _cut(text, middle, end)


def passage_spans(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of each passage: sentences that follow each other, about ``PASSAGE`` characters of them."""
    first: int | None = None
    last = 0
    for start, end in sentence_spans(text):
        if first is not None and end - first > PASSAGE:
            yield first, last
            first = None
        first = start if first is None else first
        last = end
    if first is not None:
        yield first, last


def sentences_of(text: str) -> list[str]:
    return [text[start:end] for start, end in sentence_spans(text)]


_WORD = re.compile(r"\w+(?:[.'-]\w+)*")
_ENDING = re.compile(r"(?:ations?|ings?|ies|ed|es|s|e|y)$")
_COMMON = frozenset(
    _WORD.findall(
        """a about all an and any are as at be been but by can could did do does for from had has have how i if in into
        is it its may me my no not of on one or our should so than that the their them then there these they this those
        to under use used uses using was we were what when where which who why will with would you your"""
    )
)


def word_runs(text: str) -> Iterator[list[str]]:
    """Key words that follow each other without a common word between: often a noun phrase."""
    run: list[str] = []
    for word in _WORD.findall(text):
        if word.lower() not in _COMMON:
            run.append(word)
        elif run:
            yield run
            run = []
    if run:
        yield run


def keywords(text: str) -> list[str]:
    """Its words without the common ones, each once."""
    return list(dict.fromkeys(word.lower() for run in word_runs(text) for word in run))


def stem(word: str) -> str:
    """The word without its ending, roughly; short words stay as they are."""
    bare = _ENDING.sub("", word.lower())
    return bare if len(bare) >= 3 else word.lower()


def rarity(sentences: Sequence[str], wanted: set[str]) -> dict[str, float]:
    """For each wanted stem how much it tells: the logarithm of how seldom it is among the sentences."""
    present = Counter(s for text in sentences for s in {stem(w) for w in _WORD.findall(text)} & wanted)
    return {word: math.log(1 + len(sentences) / (1 + present[word])) for word in sorted(wanted)}


def relevance(sentence: str, weights: dict[str, float]) -> float:
    """The weights of the wanted words in it; less for fragments, for markup, and for what is very long."""
    words = [stem(word) for word in _WORD.findall(sentence)]
    told = sum(weights.get(word, 0.0) for word in set(words))
    letters = sum(map(str.isalpha, sentence)) / max(1, len("".join(sentence.split())))
    whole = 1.0 if sentence.endswith((".", "!", "?")) else 0.6
    return told * letters**2 * whole * min(1.0, len(words) / 6) / (1 + max(0, len(words) - 40) / 40)


def squeeze(text: str) -> str:
    """``text`` on one line."""
    return " ".join(text.split())
