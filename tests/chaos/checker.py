"""The checker: every promise, asked of the evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from tests.chaos import checks_logs, checks_rest, checks_turns
from tests.chaos.evidence import Evidence


def _events(found: Evidence) -> int:
    return sum(map(len, found.events.values()))


def _kinds(found: Evidence, kind: str) -> int:
    return sum(event["kind"] == kind for events in found.events.values() for event in events)


def _noted(found: Evidence, *what: str) -> int:
    return sum(effect.what in what for effect in found.effects)


CHECKS: Mapping[Callable[[Evidence], Iterator[str]], Callable[[Evidence], int]] = {
    checks_turns.accepted_turns_end: lambda e: len(e.asked),
    checks_turns.ends_are_final: lambda e: len(e.seen) + len(e.turns),
    checks_turns.ends_are_recorded_once: lambda e: len(e.turns),
    checks_turns.same_key_same_answer: lambda e: sum(map(len, e.by_key.values())),
    checks_turns.nothing_was_made_up: lambda e: len(e.listed),
    checks_turns.ends_are_as_asked: lambda e: sum(not asked.poison for asked in e.asked),
    checks_turns.poison_fails_alone: lambda e: sum(asked.poison for asked in e.asked),
    checks_turns.turns_start_in_order: lambda e: _kinds(e, "turn.started"),
    checks_turns.due_times_are_kept: lambda e: sum(bool(turn["run_after"]) for turn in e.turns.values()),
    checks_logs.seq_is_gap_free: _events,
    checks_logs.streams_miss_nothing: lambda e: sum(len(stream.seqs) for stream in e.streams),
    checks_logs.results_are_recorded_once: _events,
    checks_logs.turns_run_one_at_a_time: _events,
    checks_logs.epochs_grow: _events,
    checks_logs.attempts_do_not_overlap: lambda e: _kinds(e, "step.completed"),
    checks_logs.finished_steps_do_not_run_again: lambda e: _noted(e, "begun"),
    checks_logs.recorded_steps_have_run: lambda e: _kinds(e, "step.completed"),
    checks_logs.effects_keep_their_key: lambda e: _noted(e, "effect"),
    checks_logs.irreversible_effects_happen_once: lambda e: _noted(e, "sent"),
    checks_logs.values_stay: lambda e: _noted(e, "value"),
    checks_logs.contexts_are_the_fold: lambda e: _noted(e, "entered", "left"),
    checks_rest.answers_keep_the_contract: lambda e: e.answers,
    checks_rest.redis_keeps_nothing: lambda e: len(e.redis_keys) + len(e.redis_keys_during),
    checks_rest.leases_are_given_back: lambda e: len(e.events),
    checks_rest.logs_have_no_traceback: lambda e: e.logs,
    checks_rest.copies_are_the_fold: lambda e: e.logs,
    checks_rest.processes_end_as_told: lambda e: e.logs,
}
"""Each check, and how to count what it looks at."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What one check found."""

    name: str
    promise: str  # the first line of its docstring
    looked_at: int
    violations: tuple[str, ...]


def check(found: Evidence) -> list[Checked]:
    """All checks, in the order of ``CHECKS``."""
    return [
        Checked(
            function.__name__.replace("_", " "),
            (function.__doc__ or "").partition("\n")[0],
            looked_at(found),
            tuple(function(found)),
        )
        for function, looked_at in CHECKS.items()
    ]
