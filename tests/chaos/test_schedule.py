"""The schedule of faults: what the seed decides, and that it decides all of it."""

from __future__ import annotations

from collections import Counter

from tests.chaos.run import Options
from tests.chaos.schedule import DECK, Fault, FaultKind, draw

TTL = 3.0


def drawn(seed: int, *, seconds: float = 600) -> list[Fault]:
    return draw(seed, seconds=seconds, workers=5, replicas=2, ttl=TTL)


def test_the_same_seed_gives_the_same_schedule_and_another_seed_another() -> None:
    assert drawn(7) == drawn(7)
    assert drawn(7) != drawn(8)
    assert Options(seconds=600, seed=7).schedule(TTL) == drawn(7)


def test_a_longer_run_begins_like_a_shorter_one() -> None:
    short = drawn(7, seconds=120)
    assert drawn(7)[: len(short)] == short


def test_every_kind_of_fault_comes_in_two_minutes() -> None:
    for seed in range(20):
        assert {fault.kind for fault in drawn(seed, seconds=120)} == set(FaultKind), seed


def test_kinds_come_as_often_as_the_deck_says() -> None:
    faults = drawn(7, seconds=6000)
    rounds = len(faults) // sum(DECK.values())
    counted = Counter(fault.kind for fault in faults)
    assert rounds > 30
    assert all(rounds * DECK[kind] <= counted[kind] <= (rounds + 1) * DECK[kind] for kind in FaultKind)


def test_times_grow_and_victims_exist() -> None:
    faults = drawn(7)
    assert [fault.at for fault in faults] == sorted(fault.at for fault in faults)
    assert faults[-1].at < 600
    assert {fault.victim for fault in faults if fault.kind.target == "worker"} == set(range(5))
    assert {fault.victim for fault in faults if fault.kind.target == "api"} == {0, 1}
    assert {fault.victim for fault in faults if fault.kind.target not in ("worker", "api")} == {0}


def test_a_pause_ends_before_the_time_to_live_and_a_freeze_after_it() -> None:
    for fault in drawn(7):
        assert fault.kind is not FaultKind.WORKER_PAUSE or fault.seconds < TTL
        assert fault.kind is not FaultKind.WORKER_FREEZE or fault.seconds > TTL
