"""A hot copy as bytes: what was written is what is read, and whatever else stands there is noticed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import blake2b
from uuid import UUID

from longshift import snapshot
from longshift.errors import InvalidInput
from longshift.events import Context
from longshift.model import Kept

Key = tuple[UUID, UUID]
"""Whose context: the tenant and the session."""
PLACE = 19 + 1 + 19 + 1 + 32
"""Bytes of epoch, seq and event id at the beginning of a copy."""
BURIED = 9_999_999_999_999_999_999
"""The seq of what stands where a session was deleted: nothing of its epoch, or of an older one, comes after it."""
_LINE = re.compile(rb"(\d{19}) (\d{19}) ([0-9a-f]{32}) ([0-9a-f]{32}) (-1|\d{1,19}) (\d{1,19})")


@dataclass(frozen=True, slots=True)
class Copy:
    """A context as Redis has it.

    Attributes:
        epoch: of the lease under which it was written.
        context: the fold through its seq; None: the session is deleted.
        kept: the newest checkpoint, as far as the writer knew.
        mark: how the copy begins: to drop this one and no other.
    """

    epoch: int
    context: Context | None
    kept: Kept
    mark: bytes


@dataclass(frozen=True, slots=True)
class Broken:
    """What stands there is no copy. ``reason``: digest (some of it has changed) or unreadable."""

    reason: str
    mark: bytes


def key_name(key: Key) -> str:
    tenant_id, session_id = key
    return f"longshift.ctx.{tenant_id.hex}.{session_id.hex}"


def write(context: Context, *, epoch: int, kept: Kept) -> bytes:
    """
    Raises:
        ValueError: there is nothing to copy before the first event.
    """
    if context.event_id is None:
        raise ValueError("a context without events has no copy")
    place = f"{epoch:019d} {context.seq:019d} {context.event_id.hex}".encode()
    return _sealed(place, kept, snapshot.write(context).encode("utf-8", "surrogatepass"))


def write_buried(*, epoch: int) -> bytes:
    """What says that the session is deleted."""
    return _sealed(f"{epoch:019d} {BURIED:019d} {0:032x}".encode(), Kept(), b"")


def _sealed(place: bytes, kept: Kept, text: bytes) -> bytes:
    rest = f"{kept.seq} {kept.fresh}\n".encode() + text
    return b" ".join((place, _digest(place, rest), rest))


def _digest(place: bytes, rest: bytes) -> bytes:
    return blake2b(place + b" " + rest, digest_size=16).hexdigest().encode()


def read(raw: bytes) -> Copy | Broken:
    line = raw[: raw.find(b"\n") + 1 or 200]
    found = _LINE.fullmatch(line[:-1])
    if found is None:
        return Broken("unreadable", line)
    epoch, seq, event_id, digest, *kept = found.groups()
    if _digest(raw[:PLACE], raw[found.start(5) :]) != digest:
        return Broken("digest", line)
    newest = Kept(*map(int, kept))
    if int(seq) == BURIED:
        return Copy(int(epoch), None, newest, line)
    try:
        context = snapshot.read(raw[len(line) :].decode("utf-8", "surrogatepass"))
    except (InvalidInput, ValueError):
        return Broken("unreadable", line)
    if (context.seq, context.event_id) != (int(seq), UUID(event_id.decode())):
        return Broken("unreadable", line)
    return Copy(int(epoch), context, newest, line)
