"""When a worker says of itself that it is stuck, by a clock that the test moves."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from longshift import Turn, agent
from longshift.clock import Clock
from longshift.place import current
from longshift.stuck import Judge, Look, Silence
from longshift.testing import run
from longshift.watch import Pace

IDLE = Look(ready=True, overdue=False, free=10, claims=0)
STARVING = replace(IDLE, overdue=True)
TEN_MINUTES = 600.0


class Watched:
    """A judge that looks once a second."""

    def __init__(self) -> None:
        self.now = 1000.0
        clock = Clock(monotonic=lambda: self.now)
        self.judge = Judge(clock=clock, stuck_after=timedelta(seconds=30), step_timeout=timedelta(minutes=10))

    def after(self, seconds: int, look: Look) -> str | None:
        """The verdict when it was like that for so long."""
        verdict = None
        for _ in range(seconds):
            self.now += 1
            verdict = self.judge.look(look)
        return verdict

    def turn(self, *, patience: float = TEN_MINUTES, waits_for_thread: bool = False) -> Silence:
        """One that has shown progress just now."""
        return Silence("turn_1", self.now, patience, waits_for_thread)


def test_an_idle_worker_is_healthy_for_ever() -> None:
    assert Watched().after(10_000, IDLE) is None


def test_a_worker_that_takes_nothing_of_what_is_ready_is_stuck_after_its_time() -> None:
    watched = Watched()
    assert watched.after(30, STARVING) is None
    verdict = watched.after(1, STARVING)

    assert verdict == "it has taken no work for 30 s, though some was ready and 10 slots were free"


def test_one_claim_shows_that_it_is_not_stuck() -> None:
    watched = Watched()
    watched.after(60, STARVING)

    assert watched.after(1, replace(STARVING, claims=1)) is None
    assert watched.after(30, replace(STARVING, claims=1)) is None
    assert watched.after(1, replace(STARVING, claims=1)) is not None


def test_a_worker_that_is_full_is_not_stuck() -> None:
    assert Watched().after(1000, replace(STARVING, free=0)) is None


def test_a_moment_without_overdue_work_begins_the_time_anew() -> None:
    watched = Watched()
    watched.after(29, STARVING)
    watched.after(1, IDLE)

    assert watched.after(30, STARVING) is None


def test_while_something_does_not_answer_nothing_is_stuck() -> None:
    watched = Watched()
    away = replace(STARVING, ready=False, turns=[watched.turn()])

    assert watched.after(1000, away) is None
    assert watched.after(30, replace(away, ready=True)) is None, "it is given its time when that is back"


def test_a_turn_without_progress_for_longer_than_its_step_may_take_is_stuck() -> None:
    watched = Watched()
    silent = replace(IDLE, turns=[watched.turn(patience=60)])
    assert watched.after(90, silent) is None
    verdict = watched.after(2, silent)

    assert verdict == "turn_1 has made no progress for 91 s, and may take 60 s"
    assert watched.after(1, replace(IDLE, turns=[watched.turn(patience=60)])) is None


def test_an_outage_does_not_count_as_silence() -> None:
    watched = Watched()
    silent = replace(IDLE, turns=[watched.turn(patience=60)])
    watched.after(80, silent)
    watched.after(60, replace(silent, ready=False))

    assert watched.after(90, silent) is None
    assert watched.after(2, silent) is not None


def test_the_time_of_a_process_that_was_stopped_does_not_count() -> None:
    watched = Watched()
    look = replace(STARVING, turns=[watched.turn(patience=60)])
    watched.after(20, look)
    watched.now += 3600

    assert watched.after(30, look) is None
    assert watched.after(1, look) is not None


def test_a_plain_step_may_wait_for_a_thread_as_long_as_others_use_theirs() -> None:
    watched = Watched()
    waiting = watched.turn(waits_for_thread=True)
    busy = watched.turn(patience=7200)
    look = replace(IDLE, turns=[waiting, busy], thread_at=watched.now)

    assert watched.after(7200, look) is None, "one that has a thread may take two hours"


def test_threads_of_which_none_comes_free_are_stuck() -> None:
    watched = Watched()
    look = replace(IDLE, turns=[watched.turn(waits_for_thread=True)], thread_at=watched.now)
    assert watched.after(630, look) is None
    assert watched.after(2, look) is not None

    assert watched.after(1, replace(look, thread_at=watched.now)) is None, "another plain step has got a thread"


def test_a_plain_agent_may_wait_for_a_thread_as_long_as_those_that_have_one_get_on() -> None:
    watched = Watched()
    queued = replace(watched.turn(), queued=True)
    for _ in range(10):
        others = replace(watched.turn(), threaded=True)
        assert watched.after(500, replace(IDLE, turns=[queued, others])) is None

    assert watched.after(400, replace(IDLE, turns=[queued])) is not None, "those that had one have left, and keep it"


def test_a_plain_agent_is_known_to_have_its_thread_while_it_runs() -> None:
    @agent("plain")
    def plain(turn: Turn, _: None) -> list[bool]:
        execution = current()
        assert execution is not None
        return [execution.port.pace.queued, execution.port.pace.threaded]

    assert run(plain, None).value == [False, True]


def test_a_plain_agent_has_no_thread_before_it_says_so_nor_when_it_has_ended() -> None:
    pace = Pace(Clock(), between=timedelta(minutes=10))
    with pace.queueing() as begun:
        assert (pace.queued, pace.threaded) == (True, False)
        begun()
        assert (pace.queued, pace.threaded) == (False, True)
    assert (pace.queued, pace.threaded) == (False, False)
