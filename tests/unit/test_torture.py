"""``torture``: every fault at every point, and what counts as a broken promise."""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from longshift import Turn, UsageError, agent, step
from longshift.agents.research import research
from longshift.cli import main
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


# -- the command


FILE = """
import uuid
from longshift import Turn, agent, step
from longshift.testing import Effects, Scenario

@step
async def charge(key: str) -> str:
    print("charging")
    return "paid"

@agent("careless")
async def careless(turn: Turn, amount: int) -> str:
    return await charge(str(uuid.uuid4()))

@agent("careful")
async def careful(turn: Turn, amount: int) -> str:
    return await charge(str(turn.uuid()))

def torture() -> Scenario:
    bank = Effects()
    async def fake(key: str) -> str:
        bank.add("charge", key=key)
        return "paid"
    return Scenario(careless, 5, fake={charge: fake}, effects=bank)
"""


@dataclass
class Said:
    code: int
    out: str
    err: str


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Said]]:
    """Run the command in a folder that has ``shop.py``."""

    def calling(*arguments: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["longshift", "torture", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return Said(int(ended.value.code or 0), out, err)

    (tmp_path / "shop.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    modules = set(sys.modules)
    yield calling
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def test_the_command_prints_a_row_for_each_point_and_says_last_what_is_broken(call: Callable[..., Said]) -> None:
    said = call("shop.py")
    assert said.code == 1
    lines = said.out.splitlines()
    assert len(lines) == 1 + 6 + 6 + 1 + 2
    row = "before step.completed charge crash died, another worker went on double charge charge"
    assert row in [" ".join(line.split()) for line in lines]
    assert lines[-1].startswith("6 crash points, 6 pauses, 4 doubled wake-ups: 3x double charge, at 'before step.")


def test_the_command_ends_with_0_if_no_promise_is_broken(call: Callable[..., Said]) -> None:
    said = call("shop.py:careful", "--input", "5")
    assert (said.code, said.out.splitlines()[-1]) == (
        0,
        "6 crash points, 6 pauses, 4 doubled wake-ups: no violation",
    )
    assert "charging" not in said.out  # what agents print is no data


def test_the_command_watches_steps_that_may_run_only_once(call: Callable[..., Said]) -> None:
    said = call("shop.py:careful", "--input", "5", "--once", "charge")
    assert said.code == 1
    assert "repeated charge, at 'before step.completed charge'" in said.out


def test_the_command_speaks_json(call: Callable[..., Said]) -> None:
    said = call("shop.py", "--json")
    report = json.loads(said.out)
    assert said.code == 1
    assert {name: report[name] for name in ("agent", "crash_points", "pauses", "doubled")} == {
        "agent": "careless",
        "crash_points": 6,
        "pauses": 6,
        "doubled": 4,
    }
    assert {
        "fault": "crash",
        "point": "before step.completed charge",
        "breach": "double",
        "subject": "charge",
        "text": "double charge",
    } in report["violations"]
    row = next(row for row in report["rows"] if row["fault"] == "pause" and row["point"].startswith("before step."))
    assert row["refused"] == ["step.completed charge"]
    assert row["repeated"] == {"charge": 1}


def test_the_input_of_a_scenario_may_be_replaced(call: Callable[..., Said]) -> None:
    assert "does not fit agent 'careless'" in call("shop.py", "--input", '"much"').err


@pytest.mark.parametrize(
    ("arguments", "text", "said"),
    [
        (["there_is.py"], None, "there is no file 'there_is.py'"),
        (["shop.py:nobody"], None, "'shop.py' has no one agent 'nobody': it defines careful, careless"),
        (["two.py"], FILE.replace("def torture", "def other"), "choose one with two.py:NAME (careful, careless)"),
        (["none.py"], "x = 1", "'none.py' defines no agent"),
        (["bad.py"], "import nothing_of_this_name", "cannot load 'bad.py': ModuleNotFoundError: No module named"),
        (["leaving.py"], "raise SystemExit(3)", "cannot load 'leaving.py': SystemExit: 3"),
        (["text.txt"], "x = 1", "'text.txt' is no Python file"),
        (
            ["odd.py"],
            FILE.replace("return Scenario(careless, 5,", "return dict("),
            "must return a longshift.testing.Sc",
        ),
        (
            ["worse.py"],
            FILE.replace("bank = Effects()\n", "1 / 0\n"),
            "torture() of 'worse.py' raised ZeroDivisionError",
        ),
        (["shop.py:careful", "--input", "{"], None, "INPUT is not JSON"),
        (["shop.py:careful"], None, "the input does not fit agent 'careful'"),
    ],
)
def test_what_cannot_be_tortured_is_said_in_a_sentence(
    call: Callable[..., Said], arguments: list[str], text: str | None, said: str
) -> None:
    if text is not None:
        Path(arguments[0]).write_text(text)
    answer = call(*arguments)
    assert answer.code == 2
    assert said in " ".join(answer.err.split())
