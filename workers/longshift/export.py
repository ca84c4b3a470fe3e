"""A session as JSON lines, all of it, wherever it is. The format is described in docs/reference/export.md.

    {"type": "session", "format": 1, ...}      first
    {"type": "turn", ...}                      in the order of the session
    {"type": "event", ...}                     1, 2, 3 ... without gaps; archived ones come from the cold tier, verified
    {"type": "tool_call", ...}                 the oldest first
    {"type": "artifact", ...}                  what is known of each; their bytes are fetched by id
    {"type": "end", "counts": {...}, "sha256": "..."}      last: an export without it was cut off

Which tier something is in leaves no trace in an export.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from datetime import datetime, timedelta
from enum import StrEnum
from uuid import UUID

from longshift.archive import Archive
from longshift.db import archives, exports, views
from longshift.db.database import Database
from longshift.errors import NotFound
from longshift.events import Event
from longshift.model import Json, Prefix, SessionRecord, ToolCallRecord, TurnRecord, show_id

FORMAT = 1
_TURN = (
    *("status", "agent", "agent_version", "queue", "input", "output", "error", "position", "attempts", "first_seq"),
    *("run_after", "deadline", "batch_index", "custom_id", "usage", "metadata", "created_at", "started_at", "ended_at"),
)
_TURN_IDS = {
    "id": Prefix.TURN,
    "root_turn_id": Prefix.TURN,
    "retry_of": Prefix.TURN,
    "parent_turn_id": Prefix.TURN,
    "batch_id": Prefix.BATCH,
    "input_artifact": Prefix.ARTIFACT,
    "output_artifact": Prefix.ARTIFACT,
}
_CALL = (
    *("tool", "effect", "dedupe", "place", "input", "status", "attempts", "epoch", "timeout", "created_at"),
    *("started_at", "ended_at", "result", "error", "settled_at", "note"),
)
_CALL_IDS = {
    "id": Prefix.CALL,
    "turn_id": Prefix.TURN,
    "worker_id": Prefix.WORKER,
    "artifact_id": Prefix.ARTIFACT,
    "settled_by": Prefix.KEY,
}


async def export(db: Database, archive: Archive, session_id: UUID, *, tenant_id: UUID) -> AsyncIterator[bytes]:
    """The lines, as of now: what a turn records while this is read is left out.

    Raises:
        NotFound: no such session, or it was deleted meanwhile.
        ArtifactCorrupt: archived events are not what was archived; what has come so far is not a whole export.
        Unavailable: Postgres or the store is away; the same.
    """
    session = await views.session(db, session_id, tenant_id=tenant_id)
    if session is None:
        raise NotFound(f"there is no session {show_id(Prefix.SESSION, session_id)}")
    digest, counts = hashlib.sha256(), Counter[str]()
    async for kind, line in _parts(db, archive, session):
        text = json.dumps({"type": kind, **line}, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        digest.update(text)
        counts[kind] += 1
        yield text
    if counts["event"] != session.last_seq:
        raise NotFound(f"session {show_id(Prefix.SESSION, session_id)} was deleted while it was exported")
    end = {"type": "end", "counts": dict(counts), "sha256": digest.hexdigest()}
    yield json.dumps(end, separators=(",", ":")).encode() + b"\n"


async def _parts(
    db: Database, archive: Archive, session: SessionRecord
) -> AsyncIterator[tuple[str, Mapping[str, Json]]]:
    yield "session", _session(session)
    async for turn in exports.turns(db, session.id):
        yield "turn", _shown(turn, _TURN_IDS, _TURN)
    async for event in archive.events(session.id, through=session.last_seq):
        yield "event", _event(event)
    async for call in exports.tool_calls(db, session.id):
        yield "tool_call", _shown(call, _CALL_IDS, _CALL)
    record = await archives.find(db, session.id)
    manifest = await archive.manifest(session.id, record)
    own = [segment.artifact_id for segment in manifest.segments]
    own += [record.manifest_id, record.context_id] if record is not None else []
    async for row in exports.artifacts(db, session.id, but=own):
        facts = {name: getattr(row, name) for name in ("name", "content_type", "size", "sha256")}
        created_at = row.created_at.isoformat()
        yield "artifact", {"id": show_id(Prefix.ARTIFACT, row.id), **facts, "created_at": created_at}


def _session(session: SessionRecord) -> dict[str, Json]:
    return {
        "format": FORMAT,
        "id": show_id(Prefix.SESSION, session.id),
        "created_at": session.created_at.isoformat(),
        "last_seq": session.last_seq,
        "metadata": dict(session.metadata),
    }


def _event(event: Event) -> dict[str, Json]:
    return {
        "seq": event.seq,
        "id": str(event.id),
        "epoch": event.epoch,
        "turn_id": show_id(Prefix.TURN, event.turn_id) if event.turn_id is not None else None,
        "kind": event.kind,
        "key": event.key,
        "schema_version": event.schema_version,
        "created_at": event.created_at.isoformat(),
        "payload": event.payload,
    }


def _shown(record: TurnRecord | ToolCallRecord, ids: Mapping[str, Prefix], names: Iterable[str]) -> dict[str, Json]:
    shown: dict[str, Json] = {}
    for name, prefix in ids.items():
        value = getattr(record, name)
        shown[name] = show_id(prefix, value) if value is not None else None
    return shown | {name: _plain(getattr(record, name)) for name in names}


def _plain(value: Json) -> Json:
    match value:
        case datetime():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case StrEnum():
            return value.value
    return value
