"""Texts cut into pieces that can be searched: bounded, at the ends of paragraphs, sentences or words where there are any."""

from __future__ import annotations

from collections.abc import Iterator

PIECE = 1500
"""Characters of a piece, at most, of a text of usual length."""
MOST = 1000
"""Pieces of one text, at most: those of longer texts are larger."""
_BORDERS = ("\n\n", "\n", ". ", "! ", "? ", "; ", ", ", " ")
"""Where to cut, best first."""


def pieces(text: str) -> list[str]:
    """All of ``text``, in its order, without the white space where it is cut; nothing of an empty one."""
    longest = max(PIECE, -(-len(text) * 2 // MOST))  # a cut takes half of that at least
    return [piece for start, end in _spans(text, longest) if (piece := text[start:end].strip())]


def _spans(text: str, longest: int) -> Iterator[tuple[int, int]]:
    start = 0
    while len(text) - start > longest:
        end = _border(text, start, start + longest)
        yield start, end
        start = end
    yield start, len(text)


def _border(text: str, start: int, end: int) -> int:
    """The last good place to cut in the second half of what may be taken."""
    for border in _BORDERS:
        place = text.rfind(border, start + (end - start) // 2, end)
        if place >= 0:
            return place + len(border)
    return end
