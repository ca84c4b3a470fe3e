"""Reading request bodies: bounded before they are read whole, strict JSON, nothing that Postgres could not store."""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import NoReturn

from fastapi import Request

from longshift.db.intake import Idempotency
from longshift.errors import InvalidInput
from longshift.events import storable
from longshift.model import Json
from longshift_api.problems import Refusal, too_large

MAX_DEPTH = 100
"""Nested arrays and objects; far more than data has, far less than what overflows a parser's stack."""

_UNSTORABLE = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")
_KEY = re.compile(r"[\x21-\x7e]{1,255}\Z")


def parse_json(data: bytes) -> Json:
    """The value in ``data``. NUL becomes U+2400 and a lone surrogate U+FFFD: Postgres can store neither.

    Raises:
        InvalidInput: not JSON, or NaN, Infinity, a number out of range, or nested too deeply.
    """
    try:
        value = json.loads(data.decode("utf-8-sig"), parse_constant=_refuse_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise InvalidInput(f"not UTF-8, from byte {error.start} on") from None
    except json.JSONDecodeError as error:
        raise InvalidInput(f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:  # an integer with thousands of digits
        raise InvalidInput(f"not usable JSON: {error}") from None
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH:
        _check_depth(value)
    if _UNSTORABLE.search(data):
        value = json.loads(storable(json.dumps(value, ensure_ascii=False)))
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidInput(f"{name} is not JSON: use null or text")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise InvalidInput(f"the number {text[:40]} is out of range")
    return number


def _too_deep() -> InvalidInput:
    return InvalidInput(f"nested too deeply: at most {MAX_DEPTH} levels of arrays and objects")


def _check_depth(value: Json) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        nested = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
        level = [child for children in nested for child in children]
        if not level:
            return
    raise _too_deep()


def media_type(request: Request) -> str:
    """The content type without its parameters, in lower case; "" if there is none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def check_length(request: Request, limit: int, *, what: str = "the body") -> None:
    """Refuse by the announced length, before a byte of it is read.

    Raises:
        Refusal: 413.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise too_large(what, limit)


class StrictRequest(Request):
    """A request whose body is bounded and whose JSON is strict."""

    limit: int = 0

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            check_length(self, self.limit)
            chunks, size = [], 0
            async for chunk in self.stream():
                size += len(chunk)
                if size > self.limit:
                    raise too_large("the body", self.limit)
                chunks.append(chunk)
            self._body = b"".join(chunks)
        return self._body

    async def json(self) -> Json:
        if not hasattr(self, "_json"):
            kind = media_type(self)
            if kind != "application/json" and not kind.endswith("+json"):
                raise Refusal(
                    415, "unsupported_media_type", f"send Content-Type: application/json, not {kind or 'none'!r}"
                )
            self._json = parse_json(await self.body())
        return self._json


def idempotency(request: Request, body_digest: bytes) -> Idempotency | None:
    """What the ``Idempotency-Key`` of a request promises: scoped to the route, bound to path, query and body.

    Raises:
        InvalidInput: the key is empty, too long or not plain ASCII.
    """
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not _KEY.match(key):
        raise InvalidInput("Idempotency-Key must be 1 to 255 printable ASCII characters without spaces")
    digest = hashlib.sha256(f"{request.url.path}?{request.url.query}\0".encode() + body_digest).digest()
    return Idempotency(f"{request.method} {request.scope['route'].path}", key, digest)


async def json_idempotency(request: Request) -> Idempotency | None:
    """The same for a route whose body is JSON and has been read."""
    if "idempotency-key" not in request.headers:
        return None
    return idempotency(request, hashlib.sha256(await request.body()).digest())
