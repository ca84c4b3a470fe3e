"""The checker is shown runs in which exactly one thing went wrong, and has to name it."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest

from longshift.model import Json
from tests.chaos.checker import CHECKS, check
from tests.chaos.evidence import Asked, Death, Evidence, Key, Seen, Stream
from tests.chaos.samples import FIRST, POISON, SECOND, SESSION, effect, good

DOCTORED: dict[str, tuple[str, Callable[[Evidence], object]]] = {}


def doctored(check: str) -> Callable[[Callable[[Evidence], object]], Callable[[Evidence], object]]:
    """Names what the checker must say about the evidence after the function has been at it."""

    def decorate(function: Callable[[Evidence], object]) -> Callable[[Evidence], object]:
        DOCTORED[function.__name__] = (check, function)
        return function

    return decorate


def violated(found: Evidence) -> set[str]:
    return {checked.name for checked in check(found) if checked.violations}


def log(found: Evidence) -> list[Json]:
    return found.events[SESSION]


def insert(found: Evidence, place: int, event: Json) -> None:
    """An event at a place, with the numbers of those after it moved on."""
    events = log(found)
    events.insert(place, event)
    for seq, each in enumerate(events, 1):
        each["seq"], each["id"] = seq, f"00000000-0000-0000-0000-{seq:012}"


# ------------------------------------------------------------------------------------------------------------ turns


@doctored("accepted turns end")
def an_accepted_turn_is_lost(found: Evidence) -> None:
    del found.turns[SECOND]
    found.listed.remove(SECOND)
    found.events[SESSION] = log(found)[:5]
    found.effects = [each for each in found.effects if each.turn == FIRST]


@doctored("accepted turns end")
def an_accepted_turn_still_runs(found: Evidence) -> None:
    found.turns[POISON]["status"] = "running"
    del log(found)[-1]


@doctored("accepted turns end")
def a_request_was_never_accepted(found: Evidence) -> None:
    found.unanswered.append("POST /v1/turns: 503")


@doctored("ends are final")
def an_ended_turn_runs_again(found: Evidence) -> None:
    found.seen.append(Seen(FIRST, "running"))


@doctored("ends are final")
def an_ended_turn_has_another_output_later(found: Evidence) -> None:
    found.seen.append(Seen(FIRST, "succeeded", 3))


@doctored("ends are recorded once")
def a_turn_is_cancelled_and_its_log_says_it_succeeded(found: Evidence) -> None:
    found.turns[SECOND]["status"] = "cancelled"
    found.asked[1] = replace(found.asked[1], expected=("cancelled",))


@doctored("ends are recorded once")
def a_turn_ends_twice(found: Evidence) -> None:
    insert(found, 11, deepcopy(log(found)[10]))


@doctored("ends are recorded once")
def a_turn_writes_after_its_end(found: Evidence) -> None:
    insert(found, 11, {**deepcopy(log(found)[9]), "kind": "turn.diverged"})


@doctored("same key same answer")
def one_key_makes_two_turns(found: Evidence) -> None:
    found.by_key["c0-1"] = [FIRST, SECOND]
    found.by_key["c0-2"] = []


@doctored("same key same answer")
def two_keys_make_one_turn(found: Evidence) -> None:
    found.by_key["c0-2"] = [FIRST]


@doctored("nothing was made up")
def a_turn_exists_that_nobody_asked_for(found: Evidence) -> None:
    found.listed.append("turn_" + "f" * 32)


@doctored("nothing was made up")
def a_turn_is_listed_twice(found: Evidence) -> None:
    found.listed.append(FIRST)


@doctored("nothing was made up")
def two_requests_got_the_same_turn(found: Evidence) -> None:
    found.asked.append(found.asked[0])


@doctored("ends are as asked")
def an_innocent_turn_fails(found: Evidence) -> None:
    found.turns[FIRST] |= {"status": "failed", "output": None, "error": {"code": "agent_error"}}
    found.seen = []
    log(found)[4] |= {"kind": "turn.failed"}
    for each in log(found):
        each["payload"].pop("output", None)
    found.effects = [each for each in found.effects if each.what not in ("entered", "left")]


@doctored("ends are as asked")
def the_result_is_wrong(found: Evidence) -> None:
    found.asked[0] = replace(found.asked[0], output=42)


@doctored("ends are as asked")
def a_turn_that_was_cancelled_succeeds(found: Evidence) -> None:
    found.asked[1] = replace(found.asked[1], expected=("cancelled",))


@doctored("poison fails alone")
def poison_fails_as_something_else(found: Evidence) -> None:
    found.turns[POISON]["error"] = {"code": "internal"}


@doctored("poison fails alone")
def an_innocent_turn_fails_as_poison(found: Evidence) -> None:
    found.asked[2] = Asked(POISON, SESSION, ("failed:crash_loop",), after=SECOND)


@doctored("turns start in order")
def a_later_turn_has_an_earlier_place(found: Evidence) -> None:
    found.turns[SECOND]["position"], found.turns[FIRST]["position"] = 1, 2


@doctored("turns start in order")
def turns_start_against_their_places(found: Evidence) -> None:
    found.turns[SECOND]["position"], found.turns[POISON]["position"] = 3, 2
    found.asked[2] = replace(found.asked[2], after=None)


@doctored("due times are kept")
def a_scheduled_turn_starts_early(found: Evidence) -> None:
    found.turns[FIRST]["run_after"] = "2026-01-01T00:00:01Z"


# ------------------------------------------------------------------------------------------------------------- logs


@doctored("seq is gap free")
def the_log_has_a_gap(found: Evidence) -> None:
    for event in log(found)[10:]:
        event["seq"] += 1


@doctored("seq is gap free")
def an_event_stands_there_twice(found: Evidence) -> None:
    log(found)[10]["id"] = log(found)[9]["id"]


@doctored("streams miss nothing")
def a_follower_missed_an_event(found: Evidence) -> None:
    found.streams.append(Stream(SESSION, [1, 2, 4]))


@doctored("streams miss nothing")
def a_follower_saw_an_event_twice(found: Evidence) -> None:
    found.streams.append(Stream(SESSION, [1, 2, 2]))


@doctored("streams miss nothing")
def a_follower_was_told_that_history_changed(found: Evidence) -> None:
    found.streams.append(Stream(SESSION, [1, 2], resets=1))


@doctored("results are recorded once")
def a_step_is_recorded_twice(found: Evidence) -> None:
    insert(found, 8, deepcopy(log(found)[7]))


@doctored("turns run one at a time")
def two_turns_of_a_session_run_at_once(found: Evidence) -> None:
    events = log(found)
    events[3], events[5] = events[5], events[3]  # the second starts while the first is open
    for seq, event in enumerate(events, 1):
        event |= {"seq": seq, "epoch": seq}
    found.effects = [each for each in found.effects if each.what not in ("entered", "left", "begun", "done")]


@doctored("epochs grow")
def a_stale_holder_writes(found: Evidence) -> None:
    log(found)[3]["epoch"] = 1


@doctored("epochs grow")
def an_attempt_is_missing(found: Evidence) -> None:
    log(found)[2]["payload"]["attempt"] = 3
    found.effects = [replace(each, attempt=3) if each.attempt == 2 else each for each in found.effects]


@doctored("attempts do not overlap")
def recorded_steps_of_two_attempts_overlap(found: Evidence) -> None:
    found.effects = [replace(e, at=5.5) if (e.step, e.what) == ("one", "done") else e for e in found.effects]


@doctored("attempts do not overlap")
def recorded_steps_of_two_turns_overlap(found: Evidence) -> None:
    found.effects = [replace(e, at=5.5) if (e.step, e.what) == ("only", "begun") else e for e in found.effects]


@doctored("finished steps do not run again")
def a_finished_step_runs_again(found: Evidence) -> None:
    found.effects.append(effect(FIRST, "begun", "one", attempt=2, at=4.0))


@doctored("finished steps do not run again")
def a_step_runs_twice_in_one_attempt(found: Evidence) -> None:
    found.effects.append(effect(SECOND, "begun", "only", at=9.0))


@doctored("recorded steps have run")
def a_result_is_recorded_by_an_attempt_that_did_not_run_the_step(found: Evidence) -> None:
    found.effects = [e for e in found.effects if (e.step, e.attempt) != ("two", 2)]
    found.effects.append(effect(FIRST, "done", "two", at=2.5))


@doctored("effects keep their key")
def an_effect_happens_under_two_keys(found: Evidence) -> None:
    found.effects.append(effect(FIRST, "effect", "two", attempt=2, key="k3"))


@doctored("effects keep their key")
def two_effects_share_a_key(found: Evidence) -> None:
    found.effects.append(effect(SECOND, "effect", "only", key="k1"))


@doctored("irreversible effects happen once")
def a_letter_is_sent_twice(found: Evidence) -> None:
    found.effects.append(effect(FIRST, "sent", "letter", attempt=2, key="s1"))


@doctored("irreversible effects happen once")
def a_letter_is_never_sent(found: Evidence) -> None:
    found.effects = [each for each in found.effects if each.what != "sent"]


@doctored("values stay")
def a_recorded_value_changes(found: Evidence) -> None:
    found.effects.append(effect(FIRST, "value", "three", attempt=2, value=[2]))


@doctored("contexts are the fold")
def an_agent_saw_another_history(found: Evidence) -> None:
    found.effects.append(effect(SECOND, "entered", context="something else"))


@doctored("contexts are the fold")
def the_state_at_the_end_is_not_in_the_log(found: Evidence) -> None:
    log(found)[6]["payload"] = {"set": {"n": 6}}


# ------------------------------------------------------------------------------------------------------------- rest


@doctored("answers keep the contract")
def the_api_answered_500(found: Evidence) -> None:
    found.bad_answers.append("GET /v1/turns: 500")


@doctored("redis keeps nothing")
def a_key_is_left_for_ever(found: Evidence) -> None:
    found.redis_keys.append(Key("unacked", "hash", -1))


@doctored("redis keeps nothing")
def a_key_without_end_was_seen_during_the_run(found: Evidence) -> None:
    found.redis_keys_during.append(Key("unacked_index", "zset", -1))


@doctored("redis keeps nothing")
def wake_ups_are_left(found: Evidence) -> None:
    found.redis_keys.append(Key("longshift.wake.other", "list", -1, 2))


@doctored("leases are given back")
def a_lease_is_left(found: Evidence) -> None:
    found.leases_held = 1


@doctored("leases are given back")
def a_dead_worker_holds_a_lease(found: Evidence) -> None:
    found.leases_of_the_dead = 1


@doctored("logs have no traceback")
def a_process_was_surprised(found: Evidence) -> None:
    found.tracebacks.append("worker-1.log: KeyError")


@doctored("copies are the fold")
def a_copy_was_another_context(found: Evidence) -> None:
    found.drift.append("worker-1.log: seq 7")


@doctored("processes end as told")
def a_worker_died_by_itself(found: Evidence) -> None:
    found.deaths.append(Death("worker-1", 1, ""))


# ------------------------------------------------------------------------------------------------------------- tests


def test_a_good_run_violates_nothing() -> None:
    assert violated(good()) == set()


@pytest.mark.parametrize("name", DOCTORED)
def test_the_checker_names_what_is_wrong(name: str) -> None:
    expected, doctor = DOCTORED[name]
    found = good()
    doctor(found)
    assert expected in violated(found)


def test_every_check_was_seen_to_fail() -> None:
    names = {function.__name__.replace("_", " ") for function in CHECKS}
    assert {check for check, _ in DOCTORED.values()} == names


def test_every_check_says_which_promise_it_is_about() -> None:
    assert all(checked.promise for checked in check(good()))


def test_evidence_is_the_same_after_it_was_written_and_read(tmp_path: Path) -> None:
    found = good()
    found.deaths.append(Death("worker-1", 1, "its last words"))
    found.save(tmp_path / "evidence.json")
    assert Evidence.load(tmp_path / "evidence.json") == found
