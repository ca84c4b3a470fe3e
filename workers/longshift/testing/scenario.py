"""What ``torture`` puts an agent through its paces with: its input, its fakes, and what these count as effects."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from longshift.agent import Agent
from longshift.contract import Verdict
from longshift.model import Json
from longshift.place import current, running_step
from longshift.testing.bench import Fakes, Rehearsal
from longshift.tooling import Absent, Done, Unknown


class Effects:
    """What was done to the world, counted as the service at the other end would count it.

    A fake calls ``add`` where the real step would reach the world. With a ``key`` it is an idempotent service: the same
    name and key again is the same effect. Without one, each call is an effect of its own.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._known: set[tuple[str, str]] = set()
        self._lock = threading.Lock()  # plain steps run in threads

    def add(self, name: str, *, key: object = None) -> bool:
        """Count one effect; whether it is new. A dead worker has none."""
        execution = current()
        if isinstance(execution, Rehearsal):
            if execution.outside.dead:
                return False
            if execution.outside.refused and running_step() is None:  # a step that ran when it was refused runs on
                execution.outside.world.late.append(f"effect {name}")
        with self._lock:
            if key is not None and (name, str(key)) in self._known:
                return False
            self._known.add((name, str(key)))
            self._counts[name] += 1
            return True

    @property
    def counts(self) -> Mapping[str, int]:
        """How many effects there were, by name."""
        return dict(self._counts)


@dataclass(frozen=True)
class Scenario:
    """One turn to be put through faults; made anew for each run, so that runs share nothing.

    Attributes:
        agent: what ``@agent`` made.
        input: as the agent takes it, or the JSON that a client would send.
        fake: for steps, by function or name: the result, an exception to raise, or a function to call instead.
        effects: what the fakes count. Default: none are observed.
        artifacts: bytes by ``art_...`` id, to read.
        signals, approve, settle: what others bring, as for ``run``.
    """

    agent: Agent[Any, Any]
    input: Json = None
    fake: Fakes = field(default_factory=dict)
    effects: Effects = field(default_factory=Effects)
    artifacts: Mapping[str, bytes] = field(default_factory=dict)
    signals: Mapping[str, Sequence[Json]] = field(default_factory=dict)
    approve: Mapping[str, bool | Verdict] = field(default_factory=dict)
    settle: Mapping[str, Done[Any] | Absent | Unknown] = field(default_factory=dict)
