"""``torture``: every fault at every point, and what counts as a broken promise."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from longshift import Turn, UsageError, agent, step
from longshift.agents.research import research
from longshift.testing import Effects, Report, Scenario, run, torture
from longshift.testing.verdict import Breach, Ran, judge
from longshift.testing.world import Fault


@step
async def charge(amount: int, key: str) -> str:
    raise NotImplementedError(f"no bank for {amount} {key}")


@step
async def ship(item: str) -> str:
    return f"{item} is on its way"


def checkout_with(make_key: Callable[[Turn], str]) -> Callable[[], Scenario]:
    @agent("checkout")
    async def checkout(turn: Turn, item: str) -> str:
        await charge(20, make_key(turn))
        await turn.sleep(60)
        return await ship(item)

    def scenario() -> Scenario:
        bank = Effects()

        async def pay(amount: int, key: str) -> str:
            bank.add("charge", key=key)
            return "paid"

        return Scenario(checkout, "book", fake={charge: pay}, effects=bank)

    return scenario


def breaches(report: Report) -> set[tuple[Fault, str, Breach]]:
    return {(row.fault, row.point, violation.breach) for row, violation in report.violations}


# -- what it finds


def test_an_agent_with_an_idempotent_key_keeps_every_promise() -> None:
    report = torture(checkout_with(lambda turn: str(turn.uuid())))
    assert report.violations == []
    assert report.counts == {"crash_points": 14, "pauses": 14, "doubled": 8}
    assert report.summary == "14 crash points, 14 pauses, 8 doubled wake-ups: no violation"


def test_a_step_that_ran_again_is_told_and_is_no_violation() -> None:
    report = torture(checkout_with(lambda turn: str(turn.uuid())))
    again = {row.point for row in report.rows if row.fault is Fault.CRASH and "charge" in row.repeated}
    assert again == {"before step.completed charge"}


def test_a_key_made_by_chance_is_a_double_charge_where_the_effect_has_happened_and_its_record_has_not() -> None:
    report = torture(checkout_with(lambda turn: str(uuid.uuid4())))
    doubled = {(row.fault, row.point) for row, v in report.violations if (v.breach, v.subject) == ("double", "charge")}
    assert doubled == {
        (Fault.CRASH, "before step.completed charge"),
        (Fault.PAUSE, "before step.completed charge"),
        (Fault.PAUSE, "after turn.started"),  # the stale writer begins the step before it is refused
    }
    assert (Fault.CRASH, "after step.completed charge", Breach.DIVERGED) in breaches(report)
    assert "3x double charge, at 'before step.completed charge', 'after turn.started' (pause)" in report.summary


def test_an_effect_without_a_key_counts_each_time() -> None:
    def scenario() -> Scenario:
        post = Effects()

        @step
        async def send() -> None:
            post.add("letter")

        @agent("letters")
        async def letters(turn: Turn, _: None) -> None:
            await send()

        return Scenario(letters, effects=post)

    found = {(fault, point) for fault, point, breach in breaches(torture(scenario)) if breach is Breach.DOUBLE}
    assert (Fault.CRASH, "before step.completed send") in found
    assert (Fault.CRASH, "after step.completed send") not in found


def test_an_effect_that_only_the_first_attempt_has_is_lost() -> None:
    def scenario() -> Scenario:
        post = Effects()

        @agent("moody")
        async def moody(turn: Turn, _: None) -> None:
            await ship("a")
            if turn.attempt == 1:
                post.add("letter", key=1)

        return Scenario(moody, effects=post)

    report = torture(scenario)
    assert (Fault.CRASH, "before step.completed ship", Breach.LOST) in breaches(report)
    assert {violation.breach for _, violation in report.violations} == {Breach.LOST}


def test_an_output_that_depends_on_the_attempt_is_another_output() -> None:
    @agent("counting")
    async def counting(turn: Turn, _: None) -> int:
        await ship("a")
        return turn.attempt

    report = torture(lambda: Scenario(counting))
    assert (Fault.CRASH, "after step.completed ship", Breach.OUTPUT) in breaches(report)
    assert {violation.breach for _, violation in report.violations} == {Breach.OUTPUT}


def test_a_turn_that_fails_only_when_it_is_resumed_is_told_with_its_error() -> None:
    @agent("fragile")
    async def fragile(turn: Turn, _: None) -> int:
        if turn.attempt > 1:
            raise RuntimeError("cannot be resumed")
        await ship("a")
        return 1

    report = torture(lambda: Scenario(fragile))
    assert "other ending (cannot be resumed), at 'after turn.started'" in report.summary


def test_code_that_goes_another_way_on_a_replay_leaves_records_unused() -> None:
    @agent("wandering")
    async def wandering(turn: Turn, _: None) -> str:
        if turn.attempt == 1:
            await ship("a")
        return await turn.step("last", str, 1)

    found = breaches(torture(lambda: Scenario(wandering)))
    assert (Fault.CRASH, "after step.completed ship", Breach.UNUSED) in found


def test_a_stale_writer_that_catches_its_refusal_and_goes_on_is_found_out() -> None:
    def scenario() -> Scenario:
        post = Effects()

        @agent("stubborn")
        async def stubborn(turn: Turn, _: None) -> str:
            try:
                return await ship("a")
            except BaseException:
                post.add("complaint", key=1)
                raise

        return Scenario(stubborn, effects=post)

    report = torture(scenario)
    late = {(row.point, v.subject) for row, v in report.violations if v.breach is Breach.LATE}
    assert ("before step.completed ship", "effect complaint") in late
    assert {row.fault for row, _ in report.violations} == {Fault.PAUSE}  # a worker that is killed does nothing more


def test_a_step_that_may_run_only_once_is_watched_by_its_name() -> None:
    scenario = checkout_with(lambda turn: str(turn.uuid()))
    found = breaches(torture(scenario, once=["charge"]))
    assert (Fault.CRASH, "before step.completed charge", Breach.ONCE) in found
    assert {breach for _, _, breach in found} == {Breach.ONCE}
    with pytest.raises(UsageError, match="the turn has no step 'charg': it has charge, ship"):
        torture(scenario, once=["charg"])


def test_a_turn_that_does_not_end_when_it_is_resumed_is_told() -> None:
    @agent("stuck")
    async def stuck(turn: Turn, _: None) -> None:
        await ship("a")
        if turn.attempt > 1:
            await asyncio.Event().wait()

    report = torture(lambda: Scenario(stuck), limit=timedelta(seconds=0.3))
    assert (Fault.CRASH, "after step.completed ship", Breach.ENDLESS) in breaches(report)


def test_a_result_that_is_recorded_twice_is_told_although_no_agent_can_bring_it_about() -> None:
    @agent("plain")
    async def plain(turn: Turn, _: None) -> str:
        return await ship("a")

    good = run(plain, None)
    bad = replace(good, events=(*good.events[:2], *good.events[1:]))
    row = judge(Fault.CRASH, "", Ran(bad, {}), Ran(good, {}), once=[])
    assert [str(violation) for violation in row.violations] == ["step.completed ship recorded twice"]


def test_the_research_agent_keeps_every_promise() -> None:
    sources = [
        {"name": "leases", "text": "A lease is the right to run a session. It belongs to one worker."},
        {"name": "cooking", "text": "Boil the water first. A worker in a kitchen rests meanwhile."},
    ]
    report = torture(lambda: Scenario(research, {"question": "What is a lease?", "sources": sources}))
    assert report.violations == []
    assert report.counts["crash_points"] == 16


def test_agents_in_threads_are_put_through_it_too() -> None:
    @step
    def double(n: int) -> int:
        return 2 * n

    @agent("plain")
    def plain(turn: Turn, n: int) -> int:
        turn.sync(turn.sleep(60))
        return double(double(n))

    assert torture(lambda: Scenario(plain, 1)).violations == []


# -- what it refuses


def test_an_agent_that_fails_undisturbed_is_refused_with_its_error() -> None:
    @agent("broken")
    async def broken(turn: Turn, _: None) -> None:
        raise ValueError("no such luck")

    with pytest.raises(UsageError, match=r"undisturbed, the turn has failed: no such luck\. Give it .* fakes"):
        torture(lambda: Scenario(broken))


def test_an_agent_that_does_not_end_undisturbed_is_refused() -> None:
    @agent("stuck")
    async def stuck(turn: Turn, _: None) -> None:
        await asyncio.Event().wait()

    with pytest.raises(UsageError, match=r"does not end within 0\.2 s"):
        torture(lambda: Scenario(stuck), limit=timedelta(seconds=0.2))


@step
async def dice() -> str:
    return str(uuid.uuid4())


@agent("by a step")
async def by_a_step(turn: Turn, _: None) -> str:
    await ship("a")
    return await dice()


@agent("by arguments")
async def by_arguments(turn: Turn, _: None) -> str:
    return await ship(str(uuid.uuid4()))


@agent("by itself")
async def by_itself(turn: Turn, _: None) -> str:
    await ship("a")
    return str(uuid.uuid4())


@agent("by its way")
async def by_its_way(turn: Turn, _: None) -> str:
    return await turn.step(f"step-{uuid.uuid4()}", str, 1)


@pytest.mark.parametrize(
    ("tortured", "said"),
    [
        (by_a_step, r"step 'dice' returns something else the second time"),
        (by_arguments, r"step 'ship' is called with other arguments the second time"),
        (by_itself, r"though their steps return the same"),
        (by_its_way, r"one records 'step\.completed step-.*' where the other records"),
    ],
)
def test_an_agent_whose_undisturbed_runs_differ_is_refused_and_the_step_is_named(tortured: Any, said: str) -> None:
    with pytest.raises(UsageError, match=f"two undisturbed runs .*{said}"):
        torture(lambda: Scenario(tortured))


def test_effects_are_counted_by_name_and_key_or_by_call() -> None:
    effects = Effects()
    assert [effects.add("charge", key=key) for key in (1, "1", 2)] == [True, False, True]
    assert [effects.add("mail"), effects.add("mail")] == [True, True]
    assert effects.counts == {"charge": 2, "mail": 2}


def test_a_dead_worker_has_no_effects() -> None:
    effects = Effects()

    @agent("cleaning")
    async def cleaning(turn: Turn, _: None) -> None:
        try:
            await ship("a")
        finally:
            effects.add("cleaned")

    run(cleaning, None, crash_at="after step.completed ship")
    assert effects.counts == {"cleaned": 1}
