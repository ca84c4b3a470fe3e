"""What an MCP tool answered, as plain JSON that a log can keep and a model can read."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Awaitable, Callable
from typing import Required

import mcp_types as types
from pydantic import BaseModel
from typing_extensions import TypedDict  # before Python 3.12 pydantic wants this one

from longshift.contract import Artifact
from longshift.errors import LongshiftError
from longshift.model import Json

INLINE = 32 * 1024
"""Bytes of an image, a sound or a file that stay in the result; larger ones become artifacts."""
LONGEST = 512 * 1024
"""Bytes of a result that is recorded, as JSON; what became an artifact does not count."""

Keep = Callable[[str, bytes, str], Awaitable[Artifact]]
"""Makes an artifact of (name, bytes, content type)."""


class McpToolError(LongshiftError):
    """An MCP tool answered that it has failed; the text is the tool's own."""

    code = "mcp_tool_error"


class Part(TypedDict, total=False):
    """A piece of an answer. Which fields are there depends on its ``type``.

    ``text``: ``text``. ``image``, ``audio``, ``blob``: ``mime_type``, ``size`` in bytes, and ``data`` (base64) or, if that
    is large, ``artifact`` (an id). ``resource``: ``uri`` and ``text``; one that is not text is a ``blob`` with a ``uri``.
    ``link``: ``uri`` and ``name``.
    """

    type: Required[str]
    text: str
    mime_type: str
    size: int
    data: str
    artifact: str
    uri: str
    name: str


class McpResult(BaseModel, frozen=True):
    """What a tool answered. ``is_error``: the tool says that it failed; ``content`` then says why, for the model to read."""

    content: list[Part]
    structured: Json = None
    is_error: bool = False

    @property
    def text(self) -> str:
        """All of its text; if it has none, its structured content as JSON."""
        texts = [part["text"] for part in self.content if "text" in part]
        return "\n".join(texts) if texts or self.structured is None else json.dumps(self.structured)

    def for_model(self) -> Json:
        """What a model reads: the text; the parts, if there are others; ``{"error": text}`` if the tool failed."""
        if self.is_error:
            return {"error": self.text}
        if all(part["type"] == "text" for part in self.content):
            return self.text
        return [dict(part) for part in self.content]

    def raise_for_error(self) -> McpResult:
        """This result, if the tool did not fail.

        Raises:
            McpToolError: it did.
        """
        if self.is_error:
            raise McpToolError(self.text or "the tool failed without saying why")
        return self


def too_large(reason: str) -> McpResult:
    """For the model to see: the tool was called, and what it said is not here."""
    return McpResult(
        content=[{"type": "text", "text": f"the tool was called, but {reason}: ask it for less"}], is_error=True
    )


async def read_result(answer: types.CallToolResult, *, keep: Keep | None) -> McpResult:
    """``answer`` as plain data; ``keep`` takes what is large, without it everything stays inline."""
    content = [await _part(block, number, keep) for number, block in enumerate(answer.content, start=1)]
    result = McpResult(content=content, structured=answer.structured_content, is_error=answer.is_error)
    if keep is not None and (size := len(result.model_dump_json().encode())) > LONGEST:
        return too_large(f"its answer has {size:,} bytes, more than {LONGEST:,}, images and files apart")
    return result


async def _part(block: types.ContentBlock, number: int, keep: Keep | None) -> Part:
    match block:
        case types.TextContent():
            return {"type": "text", "text": block.text}
        case types.ImageContent() | types.AudioContent():
            return await _binary(block.type, block.data, block.mime_type, f"{block.type}-{number}", keep)
        case types.ResourceLink():
            return {"type": "link", "uri": block.uri, "name": block.name}
        case types.EmbeddedResource(resource=resource):
            if isinstance(resource, types.TextResourceContents):
                return {"type": "resource", "uri": resource.uri, "text": resource.text}
            kind = resource.mime_type or "application/octet-stream"
            part = await _binary("blob", resource.blob, kind, f"blob-{number}", keep)
            return {**part, "uri": resource.uri}


async def _binary(kind: str, data: str, mime_type: str, name: str, keep: Keep | None) -> Part:
    try:
        raw = base64.b64decode(data, validate=True)
    except binascii.Error:
        return {"type": "text", "text": f"({kind} of type {mime_type} that is not valid base64)"}
    part: Part = {"type": kind, "mime_type": mime_type, "size": len(raw)}
    if keep is None or len(raw) <= INLINE:
        return {**part, "data": data}
    return {**part, "artifact": (await keep(name, raw, mime_type)).id}


__all__ = ["Keep", "McpResult", "McpToolError", "Part", "read_result", "too_large"]
