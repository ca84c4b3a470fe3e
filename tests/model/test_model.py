"""The protocol holds in every reachable state of the model, and each of its fixes is needed for that."""

from __future__ import annotations

import json

import pytest

from tests.model import promises
from tests.model.__main__ import main
from tests.model.explore import Model, Step, TooManyStates, explore
from tests.model.state import Event
from tests.model.variants import DEEP, SCOPES, VARIANTS, check

LARGE = 3_000  # states; a scope with fewer has lost its faults


@pytest.mark.parametrize("name", SCOPES)
def test_the_protocol_keeps_its_promises_in_every_reachable_state(name: str) -> None:
    result = check(SCOPES[name])

    assert result.trace is None, [label for label, _ in result.trace.steps]
    assert result.states > LARGE


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", DEEP)
def test_the_protocol_keeps_its_promises_under_more_faults_at_once(name: str) -> None:
    result = check(DEEP[name])

    assert result.trace is None, [label for label, _ in result.trace.steps]


@pytest.mark.parametrize("name", VARIANTS)
def test_with_one_fix_taken_away_this_promise_breaks(name: str) -> None:
    result = VARIANTS[name].run()

    assert result.trace is not None, "the fix is not needed, or the model cannot tell"
    assert result.trace.violation == VARIANTS[name].breaks


def test_where_a_reply_could_be_slower_than_reconcile_only_efficiency_is_lost() -> None:
    """What is taken from a holder that way is fenced like any other lease that was taken away."""
    variant = VARIANTS["impatient-reconcile"]
    assert variant.breaks == promises.FOOLED
    result = variant.run(without=promises.FOOLED)

    assert result.trace is None, result.trace.violation


# -- that the promises are heard at all


def events(*kinds: str) -> tuple[Event, ...]:
    """``"0 started"``: turn and kind; seq, epoch and claim are right."""
    log = []
    for seq, text in enumerate(kinds, start=1):
        turn, kind = text.split()
        log.append(Event(seq, 1, 1, 0, int(turn), kind))
    return tuple(log)


GOOD = events("0 started", "0 a", "0 b", "0 waiting", "0 started", "0 signal", "0 finished", "1 started", "1 finished")
BAD = {
    "gap": (promises.GAP, tuple(event for event in GOOD if event.seq != 3)),
    "epoch": (promises.EPOCHS, (GOOD[0]._replace(epoch=2), *GOOD[1:])),
    "claim": (promises.EPOCHS, (GOOD[0]._replace(claim=2), *GOOD[1:])),
    "overlap": (promises.OVERLAP, events("0 started", "1 started")),
    "order": (promises.ORDER, events("1 started", "1 finished", "0 started")),
    "outside": (promises.OUTSIDE, events("0 started", "0 finished", "0 a")),
    "twice": (promises.TWICE, events("0 started", "0 a", "0 started", "0 a")),
    "ended": (promises.ENDED, events("0 started", "0 finished", "0 started", "0 cancelled")),
}


@pytest.mark.parametrize("name", BAD)
def test_a_log_that_breaks_a_promise_is_told_from_one_that_does_not(name: str) -> None:
    expected, log = BAD[name]

    assert promises.log_violates(GOOD) is None
    assert promises.log_violates(log) == expected


# -- the checker


def small(ways: dict[str, str], *, faults: str = "", wrong: str = "", done: str = "z") -> Model[str]:
    """States are letters, ``ways`` says where each leads; those in ``faults`` are reached only by faults."""

    def steps(state: str) -> list[Step[str]]:
        return [Step(f"{state} to {to}", to, fault=to in faults) for to in ways.get(state, "")]

    return Model("a", steps, lambda s: "wrong" if s in wrong else None, lambda s: s in done, dead_end="stuck")


def test_the_checker_visits_every_state_once() -> None:
    result = explore(small({"a": "bc", "b": "d", "c": "d", "d": "za"}))

    assert (result.states, result.transitions, result.depth, result.trace) == (5, 6, 3, None)


def test_the_checker_finds_a_shortest_way_to_what_is_wrong() -> None:
    result = explore(small({"a": "bc", "b": "e", "e": "x", "c": "x", "x": "z"}, wrong="x"))

    assert result.trace is not None
    assert [label for label, _ in result.trace.steps] == ["", "a to c", "c to x"]


@pytest.mark.parametrize("ways", [{"a": "zb"}, {"a": "zb", "b": "c", "c": "b"}], ids=["deadlock", "circle"])
def test_the_checker_finds_where_no_way_leads_to_the_end(ways: dict[str, str]) -> None:
    result = explore(small(ways))

    assert result.trace is not None
    assert result.trace.violation == "stuck"
    assert result.trace.steps[1] == ("a to b", "b")


def test_a_way_to_the_end_that_takes_a_fault_is_none() -> None:
    assert explore(small({"a": "z"}, faults="z")).trace is not None
    assert explore(small({"a": "bz", "b": "z"}, faults="b")).trace is None


def test_a_model_that_grows_too_large_is_refused() -> None:
    endless: Model[int] = Model(0, lambda n: [Step("on", n + 1)], lambda _: None, lambda _: True, dead_end="stuck")

    with pytest.raises(TooManyStates, match="more than 100 states"):
        explore(endless, limit=100)


# -- the command


def test_the_command_prints_a_way_to_break_a_variant(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--off", "one-shot-rescue"]) == 1

    told = capsys.readouterr().out
    assert "worker 0 crashes, 2 starts in its place" in told
    assert "late: worker 0's CLAIM commits: epoch 1, log ends at 0" in told
    assert f"=> {promises.ENDS}" in told


def test_the_command_prints_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mail", "--json"]) == 0

    [counts] = json.loads(capsys.readouterr().out)
    assert counts["scope"] == "mail"
    assert counts["states"] > LARGE
    assert counts["violation"] is None
