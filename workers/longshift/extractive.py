"""The summarizer that needs no model: who said what, in short form. The same messages always give the same text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence

from longshift.model import Json

LENGTHS = (400, 240, 120, 60, 30)
"""Characters that each message gets, at most: the first of these with which everything fits."""
ENOUGH = 2
"""Times its length in the summary: so much of a message is looked at, however long it is. The event loop waits."""
KEPT_IDS = 20
"""Artifacts that are named, the newest ones."""
POINT = "- "
ARTIFACTS = "Artifacts: "
_ARTIFACT = re.compile(r"\bart_[0-9A-Za-z-]{8,}")
_SENTENCE = re.compile(r"[.!?](?=\s)")


def summarize(messages: Sequence[Mapping[str, Json]], *, tokens: int, count: Callable[[str], int], of: int) -> str:
    """What is left of ``messages``, oldest first, an earlier summary perhaps the first of them.

    Each becomes a line with its role and how it begins. If that is too much even with the shortest lines, the first line
    and the newest ones stay: they say what it was about, and where it stands.

    Args:
        messages: as in ``turn.history``.
        tokens: that the text may have.
        count: counts them.
        of: how many messages of the session the text stands for, those of the earlier summary included.
    """
    head = f"Summary of the first {of:,} messages of this session. turn.recall(query) finds what they said."
    texts = (text for message in messages if "art_" in (text := _text(message["content"])))
    found = dict.fromkeys(each for text in texts for each in _ARTIFACT.findall(text))
    tail = [f"{ARTIFACTS}{', '.join(list(found)[-KEPT_IDS:])}"] if found else []
    lines: list[str] = []
    for length in LENGTHS:
        lines = [line for message in messages for line in _lines(message, length)]
        text = "\n".join((head, *lines, *tail))
        if count(text) <= tokens:
            return text
    return _fitted(head, lines, tail, tokens=tokens, count=count)


def _lines(message: Mapping[str, Json], length: int) -> list[str]:
    """A message as one line; an earlier summary as its own lines."""
    text = _text(message["content"])
    if "summary_of" in message:
        points = [line for line in text.splitlines() if line.startswith(POINT)]
        if points:
            return [_short(point, length + len(POINT)) for point in points]
        return [f"{POINT}before: {_short(text, 2 * length)}"]
    return [f"{POINT}{message['role']}: {_short(text, length)}"]


def _fitted(head: str, lines: Sequence[str], tail: Sequence[str], *, tokens: int, count: Callable[[str], int]) -> str:
    """The first line and as many of the newest as fit; of a text that is too long even so, the beginning."""
    left = tokens - count("\n".join((head, *lines[:1], "- (left out: 1,000,000)", *tail))) - 1
    newest: list[str] = []
    for line in reversed(lines[1:]):
        left -= count(f"{line}\n") + 1
        if left < 0:
            break
        newest.insert(0, line)
    out = len(lines) - 1 - len(newest)
    text = "\n".join((head, *lines[:1], f"{POINT}(left out: {out:,})", *newest, *tail))
    while text and count(text) > tokens:
        text = text[: len(text) * 9 // 10]
    return text


def _short(text: str, length: int) -> str:
    """One line of at most so many characters: whole sentences if one fits, else whole words."""
    start = text[: ENOUGH * length]
    line = " ".join(start.split())
    if len(line) <= length and len(start) == len(text):
        return line
    ends = [match.end() for match in _SENTENCE.finditer(line, 0, length)]
    if ends and ends[-1] > length // 3:
        return line[: ends[-1]]
    cut = line.rfind(" ", length // 2, length - 2)
    return f"{line[: cut if cut > 0 else length - 2]} …"


def _text(content: Json) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, dict) and "$artifact" in content:
        return f"{content['$artifact']} ({content.get('size', 0):,} bytes): {content.get('preview', '')}"
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))
