"""Holds the answers of the API against the file of effects, and says of each promise whether it was kept.

What is promised, and what is not: the *result* of a step is recorded once, and a step whose result is recorded does not
run again. Its *function* runs at least once: a step that was running when its worker was killed had no result yet, so
it runs again on another worker, and its line is in the file of effects twice. The kill must explain each such line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

STEPS = ("plan", "search", "read", "write")
Json = dict[str, Any]


@dataclass
class Evidence:
    """All that the checks may look at."""

    tasks: list[Json]  # as submitted
    turns: list[Json]  # as answered
    events: dict[str, list[Json]]  # of each turn
    effects: list[Json]  # in the order of the file
    contents: dict[str, bytes]  # of each artifact
    killed: int  # process id
    runs: dict[tuple[str, str, str], list[Json]] = field(init=False)  # effects of one step of one turn

    def __post_init__(self) -> None:
        self.runs = defaultdict(list)
        for effect in self.effects:
            self.runs[effect["turn"], effect["step"], effect["subject"]].append(effect)

    def recorded(self, turn: Json) -> list[Json]:
        return [event for event in self.events[turn["id"]] if event["kind"] == "step.completed"]


def every_task_ended_once(evidence: Evidence) -> Iterator[str]:
    """Every task has exactly one turn; it succeeded, and its log ends with exactly one success"""
    answered = Counter(turn["custom_id"] for turn in evidence.turns)
    for task in evidence.tasks:
        if answered[task["custom_id"]] != 1:
            yield f"{task['custom_id']} was answered {answered[task['custom_id']]} times"
    for turn in evidence.turns:
        kinds = [event["kind"] for event in evidence.events[turn["id"]]]
        ends = [kind for kind in kinds if kind in ("turn.succeeded", "turn.failed", "turn.cancelled", "turn.expired")]
        if turn["status"] != "succeeded" or ends != ["turn.succeeded"] or kinds[-1] != "turn.succeeded":
            yield f"{turn['custom_id']} is {turn['status']} ({turn['error']}), its log ends with {ends}"


def every_log_is_gap_free(evidence: Evidence) -> Iterator[str]:
    """The events of every session are numbered 1, 2, 3 ... without gaps"""
    for turn in evidence.turns:
        numbers = [event["seq"] for event in evidence.events[turn["id"]]]
        if numbers != list(range(1, len(numbers) + 1)):
            yield f"{turn['custom_id']}: {numbers}"


def every_result_was_recorded_once(evidence: Evidence) -> Iterator[str]:
    """Every step of every task has its result recorded exactly once"""
    for turn in evidence.turns:
        keys = Counter(event["key"] for event in evidence.recorded(turn))
        names = Counter(event["payload"]["name"] for event in evidence.recorded(turn))
        expected = Counter({"ingest": len(turn["input"]["sources"]), **dict.fromkeys(STEPS, 1)})
        if max(keys.values(), default=0) > 1 or names != expected:
            yield f"{turn['custom_id']}: recorded {dict(names)}, expected {dict(expected)}"


def every_step_left_its_effect(evidence: Evidence) -> Iterator[str]:
    """Every step of every task has left its line in the file of effects"""
    for turn in evidence.turns:
        subjects = [("ingest", source["name"]) for source in turn["input"]["sources"]] + [(name, "") for name in STEPS]
        for step, subject in subjects:
            if not evidence.runs[turn["id"], step, subject]:
                yield f"{turn['custom_id']}: no trace of {step} {subject}"


def no_recorded_step_ran_again(evidence: Evidence) -> Iterator[str]:
    """No step ran again once its result was recorded"""
    ends = {
        (turn["id"], *_place(event)): datetime.fromisoformat(event["created_at"])
        for turn in evidence.turns
        for event in evidence.recorded(turn)
    }
    for place, runs in evidence.runs.items():
        late = [run for run in runs if place in ends and datetime.fromisoformat(run["at"]) > ends[place]]
        if late:
            yield f"{' '.join(place)} ran {len(late)} times after it was recorded"


def _place(event: Json) -> tuple[str, str]:
    """(step, subject) as in the file of effects."""
    payload = event["payload"]
    return payload["name"], payload["result"]["name"] if payload["name"] == "ingest" else ""


def every_repetition_is_the_kills(evidence: Evidence) -> Iterator[str]:
    """A step that ran twice was running on the killed worker"""
    for (turn, step, subject), runs in evidence.runs.items():
        if any(run["pid"] != evidence.killed for run in runs[:-1]):
            yield f"{turn}: {step} {subject} ran on {[run['pid'] for run in runs]}"


def the_kill_hit_something(evidence: Evidence) -> Iterator[str]:
    """The killed worker held turns, and other workers finished them"""
    if not moved_turns(evidence):
        yield f"no turn had lines of process {evidence.killed} first and of another one later: the kill proved nothing"


def every_quotation_is_verbatim(evidence: Evidence) -> Iterator[str]:
    """Every quotation is a verbatim piece of the document it names"""
    for turn in evidence.turns:
        texts = {s["name"]: evidence.contents[s["artifact"]].decode() for s in turn["input"]["sources"]}
        for citation in turn["output"]["citations"] if turn["output"] else ():
            if citation["quote"] not in texts[citation["source"]]:
                yield f"{turn['custom_id']}: {citation['quote']!r} is not in {citation['source']}"


def every_report_is_whole(evidence: Evidence) -> Iterator[str]:
    """Every report can be downloaded and has the hash that its turn promised"""
    for turn in evidence.turns:
        report = turn["output"]["report"] if turn["output"] else {"id": "", "sha256": ""}
        if hashlib.sha256(evidence.contents.get(report["id"], b"")).hexdigest() != report["sha256"]:
            yield f"{turn['custom_id']}: report {report['id']}"


CHECKS: tuple[Callable[[Evidence], Iterator[str]], ...] = (
    every_task_ended_once,
    every_log_is_gap_free,
    every_result_was_recorded_once,
    every_step_left_its_effect,
    no_recorded_step_ran_again,
    every_repetition_is_the_kills,
    the_kill_hit_something,
    every_quotation_is_verbatim,
    every_report_is_whole,
)


def moved_turns(evidence: Evidence) -> set[str]:
    """Turns that the killed worker began and another one carried on."""
    pids: dict[str, list[int]] = defaultdict(list)
    for effect in evidence.effects:
        pids[effect["turn"]].append(effect["pid"])
    return {turn for turn, used in pids.items() if evidence.killed in used and used[-1] != evidence.killed}


def gather(http: httpx.Client, traces: Path, *, batch_id: str, killed: int) -> Evidence:
    """Everything from HTTP but for the tasks as they were sent and the effects as they were left."""
    tasks, effects = (_lines((traces / name).read_text()) for name in ("tasks.jsonl", "effects.jsonl"))
    turns = _lines(_get(http, f"/v1/batches/{batch_id}/results").text)
    wanted = {source["artifact"] for turn in turns for source in turn["input"]["sources"]}
    wanted |= {turn["output"]["report"]["id"] for turn in turns if turn["output"]}
    return Evidence(
        tasks=tasks,
        turns=turns,
        events={turn["id"]: _get(http, f"/v1/turns/{turn['id']}/events?limit=500").json()["data"] for turn in turns},
        effects=effects,
        contents={identity: _get(http, f"/v1/artifacts/{identity}/content").content for identity in wanted},
        killed=killed,
    )


def _get(http: httpx.Client, path: str) -> httpx.Response:
    return http.get(path, follow_redirects=True).raise_for_status()


def _lines(text: str) -> list[Json]:
    return [json.loads(line) for line in text.splitlines() if line]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.demo.check", description=__doc__)
    parser.add_argument("--stack", type=Path, required=True, help="stack.json of the running stack")
    parser.add_argument("--batch", required=True)
    parser.add_argument("--killed", type=int, required=True, help="process id of the worker that was killed")
    parser.add_argument("--traces", type=Path, required=True, help="folder with tasks.jsonl and effects.jsonl")
    options = parser.parse_args()
    stack = json.loads(options.stack.read_text())
    headers = {"Authorization": f"Bearer {stack['api_key']}"}
    with httpx.Client(base_url=stack["url"], headers=headers, timeout=30, trust_env=False) as http:
        evidence = gather(http, options.traces, batch_id=options.batch, killed=options.killed)
    broken = 0
    for check in CHECKS:
        violations = list(check(evidence))
        broken += len(violations)
        print(f"  {'FAIL' if violations else 'ok':<4}  {check.__doc__}")
        for violation in violations:
            print(f"        {violation}")
    repeated = sum(len(runs) - 1 for runs in evidence.runs.values())
    print(
        f"  {len(evidence.turns)} turns, {len(evidence.runs)} steps, {len(evidence.effects)} runs of their functions; "
        f"{len(moved_turns(evidence))} turns moved to another worker.\n"
        f"  {repeated} steps were running when their worker was killed and ran again (at least once); "
        "their results are recorded once."
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
