"""A context as text, for Redis and for archives.

    {"v":1,"seq":120,"event_id":"0193...","messages":2,"state":["page"]}
    {"role":"user",...}            one line for each message
    {"role":"assistant",...}
    17                             one line for each value of the state, in the order of its names

JSON has no line breaks of its own, so that taking it apart parses nothing but the first line.
"""

from __future__ import annotations

import json
from uuid import UUID

from longshift.errors import InvalidInput
from longshift.events import Context

VERSION = 1


def write(context: Context) -> str:
    head = {
        "v": VERSION,
        "seq": context.seq,
        "event_id": context.event_id.hex if context.event_id is not None else None,
        "messages": len(context.messages),
        "state": list(context.remembered),
    }
    first = json.dumps(head, ensure_ascii=False, separators=(",", ":"))
    return "\n".join((first, *context.messages, *context.remembered.values()))


def read(text: str) -> Context:
    """
    Raises:
        InvalidInput: this is no snapshot, or one of a later version.
    """
    first, *lines = text.split("\n")
    try:
        head = json.loads(first)
        count, names = head["messages"], head["state"]
        event_id = UUID(head["event_id"]) if head["event_id"] is not None else None
        if head["v"] != VERSION or len(lines) != count + len(names):
            raise InvalidInput("this snapshot of a context is cut off, or of another version")
        return Context(head["seq"], event_id, lines[:count], dict(zip(names, lines[count:], strict=True)))
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidInput(f"this is no snapshot of a context: {error}") from None
