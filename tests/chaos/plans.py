"""What clients and agents agree on: the input of an agent, the answer it must give, and the digest of a context."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel

Part = Literal[
    "step", "effect", "gather", "nap", "sleep", "state", "say", "artifact", "thread", "retry", "values", "send", "large"
]
WORTH: Mapping[Part, int] = {
    "step": 1,
    "effect": 1,
    "gather": 3,
    "nap": 0,
    "sleep": 0,
    "state": 0,
    "say": 0,
    "artifact": 1,
    "thread": 1,
    "retry": 1,
    "values": 0,
    "send": 1,
    "large": 1,
}
"""What each part adds to the result: a client knows the answer beforehand."""
PLAIN: tuple[Part, ...] = ("step", "effect", "sleep", "state")
"""Parts that are given to the agent which is not async."""
Mischief = Literal["raises", "spins", "returns no JSON", "exits", "crashes", "blocks"]
POISON: tuple[Mischief, ...] = ("exits", "crashes", "blocks")
"""Mischief that ends the process; a ``crash_loop``."""
FAULTY: Mapping[Mischief, str] = {"raises": "internal", "spins": "step_timeout", "returns no JSON": "usage"}
"""Mischief that fails its turn only, with this code."""


class Plan(BaseModel):
    """The input of ``chaos`` and ``chaos-plain``."""

    n: int
    parts: list[Part]

    @property
    def answer(self) -> int:
        return self.n + sum(WORTH[part] for part in self.parts)


def context_of(history: object, state: object) -> str:
    """The same for the same context, whoever computes it."""
    return hashlib.sha256(json.dumps([history, state], sort_keys=True).encode()).hexdigest()[:24]
