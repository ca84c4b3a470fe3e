"""Tools of every effect, called by our own agent and by those of other frameworks: a worker dies by SIGKILL after each event."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from longshift.model import Json
from longshift.testing.waiting import wait_until_sync
from tests.acceptance.checks import assert_gap_free, assert_recorded_once
from tests.support.fleet import Fleet

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]

EVENTS = {"ours": 7, "pydantic": 8, "sdk": 8}
PLACES = [(name, n) for name, count in EVENTS.items() for n in range(1, count + 1)]


@dataclass
class Staged:
    undisturbed: dict[str, Json]
    turns: dict[tuple[str, int], Json]


@pytest.fixture(scope="module")
def staged(fleet: Fleet) -> Iterator[Staged]:
    """All victims side by side, each alone with its queue; the rescuer serves their queues only when all are dead."""
    fleet.agents = "tests.acceptance.effect_agents"
    fleet.settings = {"lease_ttl": 4}
    queues = {(name, n): f"{name}-{n}" for name, n in PLACES}
    # one after the other: so many imports of three frameworks side by side take longer than a worker may to be ready
    victims = [fleet.start_worker(queue, queues=queue, crash_after=n) for (_, n), queue in queues.items()]
    turns = {place: fleet.client.submit(queue, "Oslo") for place, queue in queues.items()}
    wait_until_sync(lambda: not any(v.alive for v in victims), description="all victims are dead", limit=120)
    rescuer = fleet.start_worker("rescuer", queues=",".join(["default", *queues.values()]))
    undisturbed = {name: fleet.client.wait(fleet.client.submit(name, "Oslo")) for name in EVENTS}
    yield Staged(undisturbed, {place: fleet.client.wait(turn, limit=120) for place, turn in turns.items()})
    fleet.stop(rescuer)


@pytest.mark.parametrize("name", EVENTS)
def test_an_undisturbed_turn_has_as_many_events_as_we_crash_after(fleet: Fleet, staged: Staged, name: str) -> None:
    turn = staged.undisturbed[name]

    assert turn["status"] == "succeeded", turn["error"]
    assert len(fleet.client.events(turn)) == EVENTS[name]
    assert effects_of(fleet, turn) == {"look": 1, "put": 1, "post": 1} | ({} if name == "ours" else {"model": 2})


@pytest.mark.parametrize(("name", "n"), PLACES)
def test_each_effect_is_one_wherever_the_worker_dies(fleet: Fleet, staged: Staged, name: str, n: int) -> None:
    turn = staged.turns[name, n]
    events = fleet.client.events(turn)

    assert (turn["status"], turn["output"]) == ("succeeded", staged.undisturbed[name]["output"])
    assert_gap_free(events)
    assert_recorded_once(events)
    lines = Counter(effect.what for effect in fleet.effects(turn))
    assert lines["post"] == 1, "an irreversible effect"
    keys = {(effect.what, effect.more["key"]) for effect in fleet.effects(turn) if effect.more["key"]}
    assert Counter(what for what, _ in keys) == {"look": 1, "put": 1, "post": 1}, "by their keys"
    requests = [event for event in events if (event["key"] or "").startswith("model:")]
    assert lines["model"] == len(requests), "none was recorded when its worker died in the middle of it"


def effects_of(fleet: Fleet, turn: Json) -> Counter[str]:
    return Counter(effect.what for effect in fleet.effects(turn))
