"""A fleet under load, and what must be true of it when the harm is over."""

from __future__ import annotations

import time
from collections.abc import Sequence

from longshift.model import Json
from longshift.testing.fleet import Process
from longshift.testing.waiting import wait_until_sync
from tests.acceptance.checks import assert_gap_free, assert_no_finished_step_ran_again, assert_recorded_once
from tests.support.fleet import Effect, Fleet

TURNS = 300
IN_FLIGHT = 200
SETTINGS = {"lease_ttl": 5, "lock_grace": 2, "heartbeat": 0.5, "database_timeout": 2}


def under_load(fleet: Fleet, *, names: str = "ab") -> tuple[list[Process], Json]:
    """Workers, and a batch of which most turns are past their first step. The API serves already."""
    workers = [fleet.start_worker(name) for name in names]
    turns = [{"agent": "loaded", "input": n, "metadata": {"gate": "load"}} for n in range(TURNS)]
    batch = fleet.client.submit_batch(turns)
    wait_for_steps(fleet, "begun", "start", TURNS)
    fleet.open_gate("load")
    wait_for_steps(fleet, "begun", "step-0", IN_FLIGHT)
    return workers, batch


def wait_for_steps(fleet: Fleet, what: str, step: str, count: int) -> None:
    def enough() -> bool:
        return sum(e.what == what and e.step == step for e in fleet.effects()) >= count

    wait_until_sync(enough, description=f"{count} steps {step!r} have {what}", limit=60)


def running(effects: Sequence[Effect]) -> int:
    """Steps that have begun and not ended."""
    begun = {(e.turn, e.step) for e in effects if e.what == "begun"}
    return len(begun - {(e.turn, e.step) for e in effects if e.what == "done"})


def last(seconds: float) -> None:
    """Let an outage last: its length is what is tested."""
    end = time.monotonic() + seconds
    wait_until_sync(lambda: time.monotonic() > end, description="the outage has lasted", limit=2 * seconds)


def finished_cleanly(fleet: Fleet, batch: Json, *, limit: float = 90) -> list[Effect]:
    """Wait for all turns of ``batch``; check their results and logs, and give all effects."""
    turns = fleet.client.wait_batch(batch, limit=limit)
    assert len(turns) == TURNS
    assert {turn["status"] for turn in turns} == {"succeeded"}
    effects = fleet.effects()
    for turn in turns:
        events = fleet.client.events(turn)
        assert_gap_free(events)
        assert_recorded_once(events)
        assert_no_finished_step_ran_again(events, [e for e in effects if e.turn == turn["id"]])
    return effects
