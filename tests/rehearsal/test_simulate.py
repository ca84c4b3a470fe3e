"""The simulation: that its queue is a queue, that its fleet does what the real one did, and what it says of the ScaledObject."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from statistics import mean

import pytest

from longshift.embedded import LocalPostgres
from tests.rehearsal.compare import Case, page_row, simulate
from tests.rehearsal.demand import Demand, Segment, burst, recorded, step
from tests.rehearsal.judge import Verdict, judge
from tests.rehearsal.manifests import K8S, rule_for
from tests.rehearsal.rule import SYNC, Policy
from tests.rehearsal.simulate import Model, Outcome, Simulation, Views, needed, views


@pytest.fixture
def ask(database_url: str) -> Iterator[Views]:
    with views(database_url) as found:
        yield found


def demand(*segments: tuple[float, float], seconds: float = 100) -> Demand:
    return Demand("some", "", tuple(Segment(*segment) for segment in segments), seconds)


def at(outcome: Outcome, second: int) -> tuple[int, int, float]:
    now = outcome.series[second]
    return now.runnable, now.running, now.oldest


def test_work_waits_for_a_slot_and_the_oldest_goes_first(ask: Views) -> None:
    outcome = Simulation(demand((0.5, 10), (1.5, 10), (2.5, 10)), Model(slots=1), ask).run()

    assert [at(outcome, second) for second in (1, 5, 11, 21, 31)] == [
        (0, 1, 0.0),
        (2, 1, 3.5),
        (1, 1, 8.5),
        (0, 1, 0.0),
        (0, 0, 0.0),
    ]
    assert outcome.waits == [0, 9, 18]


def test_a_new_pod_takes_work_when_it_has_started_up(ask: Views) -> None:
    outcome = Simulation(demand((0, 90), (0, 90)), Model(slots=1, start_up=20), ask, script=[(10, 2)]).run()
    assert [now.running for now in outcome.series if now.at in (29, 31)] == [1, 2]


def test_a_drained_pod_gives_its_turns_to_others_when_their_steps_have_ended(ask: Views) -> None:
    works = demand((0, 60), (0, 60), (30, 10), seconds=200)
    outcome = Simulation(works, Model(slots=1, start_up=5, step=4), ask, script=[(1, 2), (20, 1)]).run()

    assert outcome.interrupted == 1
    assert [(now.paid, now.ready) for now in outcome.series if now.at in (19, 25)] == [(2, 2), (1, 1)]
    assert sum(now.running for now in outcome.series) == pytest.approx(130, abs=3)  # seconds: nothing is done twice


def test_what_is_needed_is_what_an_endless_fleet_would_hold() -> None:
    assert needed(demand((0, 3), (0, 3), (1, 2), seconds=5), 1, most=2) == [2, 2, 2, 2, 1, 1, 1]


@pytest.mark.parametrize("name", ["scripted", "autoscaled"])
def test_the_model_of_the_fleet_does_what_the_recorded_one_did(ask: Views, name: str) -> None:
    """Given the replicas of the rehearsal, it holds and leaves as much as the real fleet did."""
    demand, file = recorded(name)
    model = Model(slots=file["slots"], start_up=file["ready_after"], step=1)
    outcome = Simulation(demand, model, ask, script=file["changes"]).run()

    seen = [(runnable, running) for _, runnable, running, *_ in file["series"]]
    assert mean(now.running for now in outcome.series) == pytest.approx(mean(held for _, held in seen), rel=0.2)
    assert mean(now.runnable for now in outcome.series) == pytest.approx(mean(left for left, _ in seen), rel=0.5, abs=2)


@pytest.fixture(scope="module")
def simulated(postgres_server: LocalPostgres) -> dict[str, tuple[Outcome, Verdict]]:
    """A step and a batch under the rule as it is."""
    with views(postgres_server.url) as ask:
        return {make.__name__: simulate(Case(make()), ask) for make in (step, burst)}


def test_the_rule_grows_to_what_a_step_needs_and_back(simulated: dict[str, tuple[Outcome, Verdict]]) -> None:
    outcome, verdict = simulated["step"]
    assert verdict.reaction is not None
    assert verdict.reaction <= SYNC
    assert verdict.caught_up is not None
    assert verdict.caught_up < 60
    assert verdict.overshoot <= 1
    assert outcome.series[-1].wanted == 1


def test_a_batch_of_ten_thousand_takes_the_whole_fleet_and_gives_it_back(
    simulated: dict[str, tuple[Outcome, Verdict]],
) -> None:
    outcome, verdict = simulated["burst"]
    assert verdict.highest == rule_for(100).most
    assert verdict.interrupted == 0
    assert outcome.series[-1].wanted == 1


def test_the_page_has_the_figures_of_the_rule_as_it_is(simulated: dict[str, tuple[Outcome, Verdict]]) -> None:
    """Else: ``make rehearse-scale ARGS="--simulate"``, and its figures into the page; then draw the picture."""
    lines = (K8S.parent / "docs" / "how-to" / "scale.md").read_text().splitlines()
    for name, (_, verdict) in simulated.items():
        assert any(line.startswith(f"| {name}: ") and line.endswith(page_row(verdict)) for line in lines), name


def test_the_age_of_the_oldest_helps_where_workers_have_fewer_slots_than_the_target_believes(ask: Views) -> None:
    rule = replace(rule_for(100), most=40)
    without = replace(rule, triggers=rule.triggers[:1])
    outcomes = [
        Simulation(replace(step(), seconds=20 * 60), Model(slots=25), ask, rule=each).run() for each in (rule, without)
    ]

    aged, blind = (judge(outcome, most=40) for outcome in outcomes)
    assert aged.oldest < 0.8 * blind.oldest


def test_slower_growth_makes_a_batch_wait(ask: Views, simulated: dict[str, tuple[Outcome, Verdict]]) -> None:
    rule = rule_for(100)
    slow = replace(rule, up=replace(rule.up, policies=(Policy(percent=False, value=1, period=60),)))
    verdict = judge(Simulation(replace(burst(), seconds=20 * 60), Model(), ask, rule=slow).run(), most=rule.most)
    assert verdict.oldest > simulated["burst"][1].oldest + 60
