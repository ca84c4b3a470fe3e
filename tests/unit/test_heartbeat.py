"""What a worker may say about others after it was stopped, or its machine asleep."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import cast

import pytest

from longshift.clock import Clock
from longshift.config import Config
from longshift.db.liveness import Answer, Liveness, Member, Pulse
from longshift.heartbeat import Heartbeat
from longshift.model import Condition, new_id


class Time:
    """A machine's clocks; the database's is the wall's."""

    def __init__(self) -> None:
        self.wall, self.ticks = datetime(2030, 1, 1, tzinfo=UTC), 0.0
        self.clock = Clock(now=lambda: self.wall, monotonic=lambda: self.ticks)

    def pass_(self, seconds: float, *, ticking: bool = True) -> None:
        self.wall += timedelta(seconds=seconds)
        self.ticks += seconds if ticking else 0


class Answering:
    """A connection that answers every beat."""

    leader = True

    def __init__(self, time: Time) -> None:
        self.time = time
        self.connected_at = time.wall
        self.pulses: list[Pulse] = []
        self.drain = False

    def beat(self, _worker: object, pulse: Pulse, **_more: object) -> Answer:
        self.pulses.append(pulse)
        return Answer(self.time.wall, suspects=False, drain=self.drain)


def beating(liveness: Answering, *, on_drain: Callable[[], None] = lambda: None) -> Heartbeat:
    return Heartbeat(
        cast(Liveness, liveness),
        config=Config(),
        member=Member("here", 1, ["default"], 1, new_id()),
        clock=liveness.time.clock,
        on_reborn=lambda _: None,
        on_silence=lambda _: None,
        on_drain=on_drain,
    )


@pytest.mark.parametrize("ticking", [pytest.param(True, id="stopped"), pytest.param(False, id="asleep")])
def test_who_was_not_there_has_not_watched(ticking: bool) -> None:
    time = Time()
    liveness = Answering(time)
    heartbeat = beating(liveness)
    for _ in range(20):
        time.pass_(1)
        heartbeat._beat()
    assert heartbeat.watching_since == datetime(2030, 1, 1, 0, 0, 1, tzinfo=UTC)

    time.pass_(60, ticking=ticking)
    seen = [heartbeat.watching_since]  # the sweeper may look before the next beat
    heartbeat._beat()
    assert seen == [None]
    assert liveness.pulses[-1].watching_since is None
    assert heartbeat.watching_since == time.wall


async def test_a_worker_that_is_asked_to_drain_hears_it_once() -> None:
    liveness, asked = Answering(Time()), asyncio.Queue[str]()
    heartbeat = beating(liveness, on_drain=lambda: asked.put_nowait("drain"))
    heartbeat._loop = asyncio.get_running_loop()
    heartbeat._beat()
    liveness.drain = True
    for _ in range(3):
        heartbeat._beat()

    assert await asked.get() == "drain"
    assert asked.empty()


def test_each_beat_says_how_the_worker_is() -> None:
    liveness = Answering(Time())
    heartbeat = beating(liveness)
    heartbeat._beat()
    heartbeat.load.condition, heartbeat.load.complaint = Condition.UNREADY, "redis does not answer"
    heartbeat._beat()

    assert [(pulse.condition, pulse.complaint) for pulse in liveness.pulses] == [
        (None, None),
        (Condition.UNREADY, "redis does not answer"),
    ]
