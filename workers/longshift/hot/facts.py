"""What Redis says of itself."""

from __future__ import annotations

import re
from dataclasses import dataclass
from secrets import token_hex
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError


@dataclass(frozen=True, slots=True)
class Facts:
    """What is there.

    Attributes:
        kind: Redis or Valkey.
        policy: maxmemory-policy; empty: it does not say.
        limit, used: bytes; a limit of 0 is none.
        writes: whether it took a key, and gave it back.
    """

    kind: str
    version: str
    cluster: bool
    policy: str
    limit: int
    used: int
    writes: bool

    @property
    def version_pair(self) -> tuple[int, int]:
        found = re.match(r"(\d+)\.(\d+)", self.version)
        return (int(found[1]), int(found[2])) if found else (0, 0)


async def look(redis: Redis) -> Facts:
    """Raises what redis-py raises, but for a refusal to write."""
    said: dict[str, Any] = await redis.info()
    valkey = "valkey_version" in said
    return Facts(
        kind="Valkey" if valkey else "Redis",
        version=str(said.get("valkey_version" if valkey else "redis_version", "")),
        cluster=bool(said.get("cluster_enabled")),
        policy=str(said.get("maxmemory_policy", "")),
        limit=int(said.get("maxmemory", 0)),
        used=int(said.get("used_memory", 0)),
        writes=await _writes(redis),
    )


async def _writes(redis: Redis) -> bool:
    key, value = f"longshift.doctor.{token_hex(8)}", b"1"
    try:
        await redis.set(key, value, ex=10)
        found = await redis.get(key)
        await redis.delete(key)
    except ResponseError:  # read-only, out of memory, or not permitted
        return False
    return bool(found == value)
