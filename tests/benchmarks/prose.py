"""Text that does not repeat itself, the same in every process: what a conversation of a benchmark is made of."""

from __future__ import annotations

from random import Random

TURNS = 200
ASKED, ANSWERED = 800, 3200
"""Characters of a user's message and of its answer: 1,000 tokens a turn, at four characters each."""
_BEGIN = ("b", "c", "d", "f", "g", "h", "l", "m", "n", "p", "r", "s", "t", "v", "w", "st", "tr", "pl")
_END = ("a", "e", "i", "o", "u", "ai", "ea", "ou", "en", "or")
_SYLLABLES = [begin + end for begin in _BEGIN for end in _END]


def prose(seed: str, characters: int) -> str:
    """Sentences of words of one to four syllables; no phrase comes twice but by chance."""
    random, words = Random(seed), list[str]()
    length = 0
    while length < characters:
        word = "".join(random.choices(_SYLLABLES, k=random.choice((1, 2, 2, 3, 4))))
        word += random.choices((" ", ", ", ". "), (12, 1, 1))[0]
        words.append(word)
        length += len(word)
    return "".join(words)[:characters]


def question(number: int) -> str:
    return prose(f"question {number}", ASKED)


def answer(number: int) -> str:
    return prose(f"answer {number}", ANSWERED)
