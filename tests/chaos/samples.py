"""A small run in which nothing went wrong, as evidence: for the tests of the checker."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from longshift.model import Json
from tests.chaos.evidence import Asked, Evidence, Key, Seen, Stream
from tests.chaos.plans import context_of
from tests.support.fleet import Effect

SESSION = f"ses_{1:032x}"
FIRST, SECOND, POISON = (f"turn_{n:032x}" for n in (1, 2, 3))
AT = "2026-01-01T00:00:00Z"


class Log:
    """Writes the events of one session."""

    def __init__(self) -> None:
        self.events: list[Json] = []
        self.epoch = 1

    def add(self, turn: str, kind: str, *, key: str | None = None, **payload: Any) -> None:
        seq = len(self.events) + 1
        event = {"seq": seq, "id": str(UUID(int=seq)), "session_id": SESSION, "turn_id": turn, "kind": kind, "key": key}
        self.events.append({**event, "epoch": self.epoch, "payload": payload, "created_at": AT})

    def start(self, turn: str, *, attempt: int, **more: Any) -> None:
        self.epoch += 1
        self.add(turn, "turn.started", attempt=attempt, agent="chaos", version="1", at=AT, **more)

    def step(self, turn: str, name: str) -> None:
        self.add(turn, "step.completed", key=f"{name}#0", name=name, digest="", result=1)


def turn(id_: str, *, status: str = "succeeded", output: Json = None, error: Json = None, position: int = 1) -> Json:
    """What the API says of a turn."""
    row = {"id": id_, "session_id": SESSION, "status": status, "output": output, "error": error, "position": position}
    return {**row, "agent": "chaos", "input": 1, "run_after": AT, "started_at": "2026-01-01T00:00:00.5Z"}


def effect(turn: str, what: str, step: str = "", *, attempt: int = 1, at: float = 0.0, **more: Json) -> Effect:
    return Effect(what, turn, step, attempt, 1000 + attempt, at, more)


def good() -> Evidence:
    """A session of three turns: one is rescued in its second step, one changes the state, one is poison."""
    log = Log()
    log.start(FIRST, attempt=1, input=1)
    log.step(FIRST, "one")
    log.start(FIRST, attempt=2)
    log.step(FIRST, "two")
    log.add(FIRST, "turn.succeeded", output=2)
    log.start(SECOND, attempt=1, input=1)
    log.add(SECOND, "state.changed", key="$state#0", set={"n": 5})
    log.step(SECOND, "only")
    log.add(SECOND, "turn.succeeded", output=1)
    log.start(POISON, attempt=1, input="exits")
    log.add(POISON, "turn.failed", error={"code": "crash_loop"})
    said = [
        _message("user", 1, FIRST),
        _message("assistant", 2, FIRST),
        _message("user", 1, SECOND),
    ]
    effects = [
        effect(FIRST, "entered", context=context_of(said[:1], {})),
        effect(FIRST, "begun", "one", at=1.0),
        effect(FIRST, "effect", "one", at=1.1, key="k1"),
        effect(FIRST, "done", "one", at=2.0),
        effect(FIRST, "sent", "letter", at=2.0, key="s1"),
        effect(FIRST, "begun", "two", at=2.1),  # and then its worker died
        effect(FIRST, "effect", "two", at=2.2, key="k2"),
        effect(FIRST, "value", "three", at=2.3, value=[1]),
        effect(FIRST, "entered", attempt=2, context=context_of(said[:1], {})),
        effect(FIRST, "begun", "two", attempt=2, at=5.0),
        effect(FIRST, "effect", "two", attempt=2, at=5.1, key="k2"),
        effect(FIRST, "value", "three", attempt=2, at=5.2, value=[1]),
        effect(FIRST, "done", "two", attempt=2, at=6.0),
        effect(FIRST, "left", attempt=2, context=context_of(said[:1], {})),
        effect(SECOND, "entered", context=context_of(said, {})),
        effect(SECOND, "begun", "only", at=7.0),
        effect(SECOND, "done", "only", at=8.0),
        effect(SECOND, "left", context=context_of(said, {"n": 5})),
    ]
    return Evidence(
        asked=[
            Asked(FIRST, SESSION, ("succeeded",), 2),
            Asked(SECOND, SESSION, ("succeeded",), 1, after=FIRST),
            Asked(POISON, SESSION, ("failed:crash_loop",), after=SECOND, poison=True),
        ],
        by_key={"c0-1": [FIRST, FIRST], "c0-2": [SECOND], "c0-3": [POISON]},
        seen=[Seen(FIRST, "queued"), Seen(FIRST, "running"), Seen(FIRST, "succeeded", 2)],
        turns={
            FIRST: turn(FIRST, output=2) | {"input": {"parts": ["send"]}},
            SECOND: turn(SECOND, output=1, position=2),
            POISON: turn(POISON, status="failed", error={"code": "crash_loop"}, position=3),
        },
        listed=[POISON, SECOND, FIRST],
        events={SESSION: log.events},
        streams=[Stream(SESSION, [1, 2, 3], resumed=1)],
        effects=effects,
        answers=10,
        redis_keys_during=[Key("longshift.wake.default", "list", -1, 7)],
        redis_keys=[Key("longshift.wake.default", "list", -1, 0), Key("longshift.lead", "string", 3.0)],
        logs=3,
    )


def _message(role: str, content: Json, turn: str) -> Json:
    return {"role": role, "content": content, "turn_id": turn.removeprefix("turn_")}
