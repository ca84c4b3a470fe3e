"""Text that does not repeat itself, the same in every process: what a conversation of a benchmark is made of.

Words come as often as in a language (Zipf's law), in an order that never comes again; ``zlib`` makes such text as small as it
makes English.
"""

from __future__ import annotations

from itertools import accumulate
from random import Random

TURNS = 200
ASKED, ANSWERED = 800, 3200
"""Characters of a user's message and of its answer: 1,000 tokens a turn, at four characters each."""
VOCABULARY = 30_000
_BEGIN = ("b", "c", "d", "f", "g", "h", "l", "m", "n", "p", "r", "s", "t", "v", "w", "st", "tr", "pl")
_END = ("a", "e", "i", "o", "u", "ai", "ea", "ou", "en", "or")


def _words() -> list[str]:
    """The frequent ones are short."""
    random, words = Random("words"), dict[str, None]()
    while len(words) < VOCABULARY:
        syllables = 1 + (len(words) > 30) + (len(words) > 1500) * random.choice((0, 1, 1, 2))
        words["".join(random.choice(_BEGIN) + random.choice(_END) for _ in range(syllables))] = None
    return list(words)


_WORDS = _words()
_WEIGHTS = list(accumulate(1 / (rank + 2.7) for rank in range(VOCABULARY)))


def prose(seed: str, characters: int) -> str:
    """Sentences of so many characters."""
    random = Random(seed)
    words = random.choices(_WORDS, cum_weights=_WEIGHTS, k=characters // 2)
    ends = random.choices((" ", ", ", ". "), (12, 1, 1), k=len(words))
    return "".join(word + end for word, end in zip(words, ends, strict=True))[:characters]


def question(number: int) -> str:
    return prose(f"question {number}", ASKED)


def answer(number: int) -> str:
    return prose(f"answer {number}", ANSWERED)
