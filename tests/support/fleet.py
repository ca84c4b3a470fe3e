"""The fleet of our own tests: agents that write what they do to the world into one append-only file, and gates.

The file has a line for each effect, so that the order of the lines is the order in which they happened, whichever
process did it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from longshift.embedded import Guardian
from longshift.model import Json
from longshift.testing.fleet import LocalFleet

ROOT = Path(__file__).parents[2]
KEY = "lsk_acceptance_tests_only_0123456789"
AGENTS = "tests.acceptance.agents"


@dataclass(frozen=True)
class Effect:
    """One line of the file of effects."""

    what: str
    turn: str
    step: str
    attempt: int
    pid: int
    at: float  # time.monotonic() of the machine
    more: Mapping[str, Json]


class Fleet(LocalFleet):
    """A fleet that serves ``tests.acceptance.agents``, on servers of the run."""

    def __init__(
        self,
        folder: Path,
        *,
        database_url: str,
        redis_url: str,
        guardian: Guardian,
        settings: Mapping[str, object] | None = None,
        software: Path = ROOT,
    ) -> None:
        """``software``: where its ``workers`` and ``api`` are."""
        super().__init__(
            folder,
            agents=AGENTS,
            database_url=database_url,
            redis_url=redis_url,
            guardian=guardian,
            settings=settings,
            environment={"ACCEPTANCE_FOLDER": str(folder)},
            path=[software / "workers", software / "api", ROOT],
            api_key=KEY,
        )

    def effects(self, *turns: Json, what: str | None = None) -> list[Effect]:
        """What agents wrote down, in the order of its happening; all of it, or that of some turns."""
        file, wanted = self.folder / "effects.jsonl", {turn["id"] for turn in turns}
        lines = file.read_text().splitlines() if file.exists() else []
        found = [_effect(json.loads(line)) for line in lines]
        return [e for e in found if (not wanted or e.turn in wanted) and (what is None or e.what == what)]

    def open_gate(self, name: str) -> None:
        """Let agents pass that wait at the gate ``name``."""
        (self.folder / f"gate-{name}").touch()


def _effect(line: dict[str, Json]) -> Effect:
    known = {name: line.pop(name) for name in ("what", "turn", "step", "attempt", "pid", "at")}
    return Effect(**known, more=line)
