"""The files of an archived log."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from longshift import segments
from longshift.errors import ArtifactCorrupt
from longshift.model import new_id
from longshift.segments import Draft, Manifest, Segment, StoredEvent

AWKWARD = '{"b":1,"a":1.50,"text":",\\"payload\\":{} \u2028 é"}'


def events(count: int, *, first: int = 1) -> list[StoredEvent]:
    at = datetime(2026, 1, 31, 12, 0, 0, 123456, UTC)
    turn, key = new_id(), 'x,"payload":'
    return [StoredEvent(first + n, new_id(), 7, turn, "step.completed", key, 3, at, AWKWARD) for n in range(count)]


def written(stored: list[StoredEvent]) -> tuple[bytes, Segment]:
    draft = Draft()
    for event in stored:
        draft.add(event)
    data = draft.compressed()
    return data, draft.entry(new_id(), data)


def test_events_come_out_of_a_segment_as_they_went_in_to_the_letter() -> None:
    stored = events(3)
    data, entry = written(stored)

    lines = segments.unpack(data, entry)

    assert [segments.stored(line) for line in lines] == stored
    assert segments.event(lines[0], new_id()).payload == json.loads(AWKWARD)
    assert entry.concerns([stored[0].turn_id or new_id()])
    assert not entry.concerns([new_id()])


@pytest.mark.parametrize("change", [{"sha256": "0" * 64}, {"count": 4}, {"last_seq": 4}, {"first_id": new_id().hex}])
def test_a_segment_that_is_not_what_its_manifest_says_is_refused(change: dict[str, object]) -> None:
    data, entry = written(events(3))

    with pytest.raises(ArtifactCorrupt):
        segments.unpack(data, replace(entry, **change))  # type: ignore[arg-type]


def test_a_manifest_with_a_gap_or_of_a_later_version_is_refused() -> None:
    one, other = written(events(3))[1], written(events(3, first=4))[1]
    whole = Manifest(new_id().hex, 6, other.last_id, (one, other))

    assert Manifest.read(whole.write()) == whole
    for bad in (
        replace(whole, segments=(other,)).write(),
        replace(whole, through=7).write(),
        whole.write().replace(b'"version":1', b'"version":2'),
        b"[]",
        b"{",
    ):
        with pytest.raises(ArtifactCorrupt):
            Manifest.read(bad)
