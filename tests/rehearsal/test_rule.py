"""The autoscaler's rule, held against what the documentation of Kubernetes says of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from longshift.testing.fleet import SUPERVISED
from tests.rehearsal.manifests import SCALED_OBJECT, capacity, command, rule_for
from tests.rehearsal.rule import Autoscaler, Behaviour, Policy, Rule, Trigger, read

AT_ONCE = Behaviour(0, (Policy(percent=True, value=1000, period=15),))
WORK = Trigger("SELECT 1", target=10)
RULE = Rule(1, 10, (WORK,), up=AT_ONCE, down=Behaviour(0, (Policy(percent=True, value=100, period=15),)))


def decided(
    rule: Rule, values: Iterable[float | tuple[float, ...]], *, start: int = 1, ready: int | None = None
) -> list[int]:
    """What a rule makes of the values of its triggers, one decision after another; every replica is ready at once."""
    autoscaler, replicas, found = Autoscaler(rule), start, []
    for number, value in enumerate(values):
        given = value if isinstance(value, tuple) else (value,)
        up = replicas if ready is None else ready
        replicas = autoscaler.decide(number * rule.sync, current=replicas, ready=up, values=given)
        found.append(replicas)
    return found


def test_an_average_wants_as_many_as_the_value_holds_targets_rounded_up() -> None:
    assert decided(RULE, [5, 21, 39, 100, 0]) == [1, 3, 4, 10, 1]


def test_a_tenth_more_or_less_than_the_target_changes_nothing() -> None:
    assert decided(RULE, [33, 32.9, 27, 26.9, 14], start=3) == [3, 3, 3, 3, 2]


def test_a_value_multiplies_what_is_ready() -> None:
    age = replace(RULE, triggers=(Trigger("SELECT 1", target=30, average=False),))
    assert decided(age, [60], start=4, ready=3) == [6]
    assert decided(age, [32], start=4, ready=3) == [4]  # within the tolerance
    assert decided(age, [0], start=4) == [1]


def test_the_largest_proposal_of_all_triggers_counts() -> None:
    both = replace(RULE, triggers=(WORK, Trigger("SELECT 1", target=30, average=False)))
    assert decided(both, [(25.0, 0.0), (25.0, 60.0)]) == [3, 6]


def test_no_more_than_the_most_and_no_less_than_the_least() -> None:
    assert decided(replace(RULE, least=2, most=4), [1000, 0], start=2) == [4, 2]


def test_it_shrinks_to_the_largest_proposal_of_the_window() -> None:
    rule = replace(RULE, down=replace(RULE.down, window=60))
    assert decided(rule, [80, 20, 50, 20, 20, 20, 20, 20]) == [8, 8, 8, 8, 5, 5, 2, 2]


def test_it_grows_to_the_smallest_proposal_of_the_window() -> None:
    rule = replace(RULE, up=replace(RULE.up, window=30))
    assert decided(rule, [10, 80, 80, 80]) == [1, 1, 8, 8]


def test_a_policy_bounds_the_change_of_its_period_and_the_most_generous_one_counts() -> None:
    four, double = Policy(percent=False, value=4, period=30), Policy(percent=True, value=100, period=30)
    rule = replace(RULE, most=50, up=Behaviour(0, (four, double)))
    assert decided(rule, [500] * 5) == [5, 5, 10, 10, 20]
    assert decided(replace(rule, up=replace(rule.up, select="Min")), [500] * 5) == [2, 2, 4, 4, 8]


def test_shrinking_is_bounded_in_the_same_way() -> None:
    one, fifth = Policy(percent=False, value=1, period=60), Policy(percent=True, value=20, period=60)
    rule = replace(RULE, down=Behaviour(0, (one, fifth)))
    assert decided(rule, [0] * 9, start=10) == [8, 8, 8, 8, 6, 6, 6, 6, 4]
    assert decided(rule, [100, 0])[1] == 1  # what has come within the period may go within it


def test_a_disabled_direction_does_nothing() -> None:
    assert decided(replace(RULE, down=replace(RULE.down, select="Disabled")), [50, 0, 0]) == [5, 5, 5]


def test_from_zero_it_wakes_when_a_trigger_is_active_and_goes_back_after_the_cooldown() -> None:
    rule = replace(RULE, least=0, cooldown=45, triggers=(replace(WORK, activation=2),))
    assert decided(rule, [0, 2, 3, 30, 0, 0, 0, 0], start=0) == [0, 0, 1, 3, 1, 1, 0, 0]


def test_a_faster_rule_decides_the_same_in_less_time() -> None:
    rule = replace(RULE, down=Behaviour(60, (Policy(percent=False, value=1, period=60),)))
    values = [80, 20, 50, 20, 20, 20, 20, 20]
    assert decided(rule.faster(10), values) == decided(rule, values)
    assert rule.faster(10).sync == 1.5


def test_what_is_not_modelled_is_refused(tmp_path: Path) -> None:
    text = SCALED_OBJECT.read_text()
    (tmp_path / "other.yaml").write_text(text.replace("type: postgresql", "type: redis"))
    with pytest.raises(ValueError, match="'redis' is not modelled"):
        read(tmp_path / "other.yaml")


def test_the_rule_of_the_fleet_is_read_and_fits_workers_of_another_size() -> None:
    rule = read(SCALED_OBJECT)
    half = rule_for(capacity() // 2)

    assert rule.least >= 1  # the sweeper lives in workers
    assert [trigger.average for trigger in rule.triggers] == [True, False]
    assert [trigger.target for trigger in half.triggers] == [rule.triggers[0].target / 2, rule.triggers[1].target]


def test_pods_run_what_the_rehearsal_runs() -> None:
    assert command() == ["longshift", *SUPERVISED[1:]]
