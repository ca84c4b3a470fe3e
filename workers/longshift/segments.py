"""The format of an archived log: segments of events, and the manifest that lists them.

A *segment* is gzip'd JSON lines, one for each event in the order of the log, ``payload`` last and as the log has it:

    {"seq":1,"id":"0193...","epoch":7,"turn":"0193...","kind":"turn.started","key":null,"v":3,"at":"2026-...","payload":{...}}

The *manifest* is JSON, renewed with each archiving; segments are never changed:

    {"version":1,"session":"0193...","through":2310,"event_id":"0193...","segments":[{"artifact":"0193...",
     "first_seq":1,"last_seq":2000,"first_id":"...","last_id":"...","count":2000,"size":1234,"sha256":"...","turns":["..."]}]}

``size`` and ``sha256`` are of the segment as it is stored, ``turns`` whose events it has. A reader checks a segment against
the manifest, and the manifest against the hash of its own artifact: nothing is served that is not what was archived.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Self
from uuid import UUID

from longshift.errors import ArtifactCorrupt
from longshift.events import FOLDED, Event

VERSION = 1
MOST_EVENTS = 2000
MOST_BYTES = 8 * 1024 * 1024
"""Of a segment before it is compressed. One event more may be in it."""
SEGMENT_TYPE = "application/vnd.longshift.segment+gzip"
MANIFEST_TYPE = "application/vnd.longshift.manifest+json"
CONTEXT_TYPE = "application/vnd.longshift.context"
_PAYLOAD = ',"payload":'


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event with its payload as the text that the log has."""

    seq: int
    id: UUID
    epoch: int
    turn_id: UUID | None
    kind: str
    key: str | None
    schema_version: int
    created_at: datetime
    payload: str

    def line(self) -> str:
        head = {
            "seq": self.seq,
            "id": self.id.hex,
            "epoch": self.epoch,
            "turn": self.turn_id.hex if self.turn_id is not None else None,
            "kind": self.kind,
            "key": self.key,
            "v": self.schema_version,
            "at": self.created_at.isoformat(),
        }
        text = json.dumps(head, ensure_ascii=False, separators=(",", ":"))
        return f"{text[:-1]}{_PAYLOAD}{self.payload}}}\n"

    def folded(self, session_id: UUID) -> Event:
        """As much of it as leaves something in the context."""
        return Event(
            session_id=session_id,
            seq=self.seq,
            id=self.id,
            epoch=self.epoch,
            turn_id=self.turn_id,
            kind=self.kind,
            key=self.key,
            payload=json.loads(self.payload) if self.kind in FOLDED else {},
            created_at=self.created_at,
            schema_version=self.schema_version,
        )


@dataclass(frozen=True, slots=True)
class Segment:
    """One entry of a manifest."""

    artifact: str  # id of the artifact, as hex digits
    first_seq: int
    last_seq: int
    first_id: str
    last_id: str
    count: int
    size: int  # bytes, compressed
    sha256: str
    turns: tuple[str, ...]  # whose events it has

    @property
    def artifact_id(self) -> UUID:
        return UUID(hex=self.artifact)

    def concerns(self, turn_ids: Collection[UUID] | None) -> bool:
        return turn_ids is None or any(turn.hex in self.turns for turn in turn_ids)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an archive consists of; without segments: nothing is archived."""

    session: str
    through: int = 0
    event_id: str = ""
    segments: tuple[Segment, ...] = ()

    def write(self) -> bytes:
        return json.dumps({"version": VERSION} | asdict(self), separators=(",", ":")).encode()

    @classmethod
    def read(cls, data: bytes) -> Self:
        """
        Raises:
            ArtifactCorrupt: it is no manifest, one of a later version, or its segments do not follow each other.
        """
        try:
            fields = json.loads(data)
            if fields.pop("version") != VERSION:
                raise ArtifactCorrupt("the manifest of an archive is of a later version of Longshift")
            segments = tuple(Segment(**{**one, "turns": tuple(one["turns"])}) for one in fields.pop("segments"))
            manifest = cls(segments=segments, **fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArtifactCorrupt(f"this is no manifest of an archive: {error}") from None
        manifest._check()
        return manifest

    def _check(self) -> None:
        last = 0
        for segment in self.segments:
            if segment.first_seq != last + 1 or segment.last_seq - last != segment.count:
                raise ArtifactCorrupt(f"the archive of session {self.session} has a gap after event {last}")
            last = segment.last_seq
        if last != self.through:
            raise ArtifactCorrupt(f"the archive of session {self.session} ends at event {last}, not {self.through}")


@dataclass(slots=True)
class Draft:
    """A segment while it is filled."""

    events: list[StoredEvent] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    size: int = 0

    @property
    def full(self) -> bool:
        return len(self.lines) >= MOST_EVENTS or self.size >= MOST_BYTES

    def add(self, event: StoredEvent) -> None:
        line = event.line()
        self.events.append(event)
        self.lines.append(line)
        self.size += len(line)

    def compressed(self) -> bytes:
        """To be called in a thread: it takes a tenth of a second."""
        return gzip.compress("".join(self.lines).encode(), mtime=0)

    def entry(self, artifact_id: UUID, data: bytes) -> Segment:
        first, last = self.events[0], self.events[-1]
        turns = dict.fromkeys(event.turn_id.hex for event in self.events if event.turn_id is not None)
        return Segment(
            artifact=artifact_id.hex,
            first_seq=first.seq,
            last_seq=last.seq,
            first_id=first.id.hex,
            last_id=last.id.hex,
            count=len(self.events),
            size=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            turns=tuple(turns),
        )


def unpack(data: bytes, segment: Segment) -> list[str]:
    """The lines of a stored segment, checked against its entry.

    Raises:
        ArtifactCorrupt: they are not what was archived.
    """
    name = f"the archived events {segment.first_seq} to {segment.last_seq}"
    if hashlib.sha256(data).hexdigest() != segment.sha256:
        raise ArtifactCorrupt(f"{name} do not have the hash that their manifest promises: restore them from a backup")
    try:
        lines = gzip.decompress(data).decode().split("\n")[:-1]
        ends = [(line["seq"], line["id"]) for line in map(json.loads, (lines[0], lines[-1]))]
    except (OSError, EOFError, ValueError, LookupError, TypeError, zlib.error) as error:
        raise ArtifactCorrupt(f"{name} cannot be read: {error}") from None
    promised = [(segment.first_seq, segment.first_id), (segment.last_seq, segment.last_id)]
    if ends != promised or len(lines) != segment.count:
        raise ArtifactCorrupt(f"{name} are not the events that their manifest lists")
    return lines


def event(line: str, session_id: UUID) -> Event:
    """The event of a line; nobody else has its payload."""
    fields = json.loads(line)
    return Event(
        session_id=session_id,
        seq=fields["seq"],
        id=UUID(hex=fields["id"]),
        epoch=fields["epoch"],
        turn_id=UUID(hex=fields["turn"]) if fields["turn"] is not None else None,
        kind=fields["kind"],
        key=fields["key"],
        payload=fields["payload"],
        created_at=datetime.fromisoformat(fields["at"]),
        schema_version=fields["v"],
    )


def stored(line: str) -> StoredEvent:
    """The same with its payload as the text that it was, to be put back into the log."""
    found = event(line, UUID(int=0))
    return StoredEvent(
        found.seq,
        found.id,
        found.epoch,
        found.turn_id,
        found.kind,
        found.key,
        found.schema_version,
        found.created_at,
        # the first: what comes before it is a name, a number, or text in which a quotation mark is escaped
        line[line.index(_PAYLOAD) + len(_PAYLOAD) : -1],
    )
