"""What one client has uploaded must not run in the browser of another: headers under which it is safe to hand out."""

from __future__ import annotations

from urllib.parse import quote

ANY_TYPE = "application/octet-stream"
_PASSIVE = ("audio/", "font/", "image/", "video/")
_PASSIVE_TYPES = frozenset(
    {
        "application/gzip",
        "application/json",
        "application/jsonl",
        "application/pdf",
        "application/zip",
        "text/csv",
        "text/markdown",
        "text/plain",
    }
)


def disposition(name: str) -> str:
    """``Content-Disposition``: a download called ``name``, never shown in place. Any name: all but plain characters are
    escaped (RFC 8187), so that none of them can end the header or the value.
    """
    return f"attachment; filename*=UTF-8''{quote(name.encode(errors='replace'), safe='')}"


def passive(content_type: str) -> str:
    """``content_type``, if a browser never runs it; else bytes without a type. For answers of others, to which we cannot add
    ``nosniff`` and ``sandbox``.
    """
    kind = content_type.split(";", maxsplit=1)[0].strip().lower()
    harmless = kind in _PASSIVE_TYPES or (kind.startswith(_PASSIVE) and not kind.endswith("xml"))
    return content_type if harmless else ANY_TYPE
