"""The client of Redis: what can be said of it without one."""

from __future__ import annotations

from pathlib import Path

import pytest

from longshift.errors import Unavailable
from longshift.hot import Hot
from longshift.model import new_id


@pytest.mark.parametrize("scheme", ["redis", "unix"])
async def test_a_redis_that_is_not_there_is_unavailable_and_nothing_else(scheme: str, tmp_path: Path) -> None:
    hot = Hot("redis://127.0.0.1:1" if scheme == "redis" else f"unix://{tmp_path}/none.sock")
    with pytest.raises(Unavailable):
        await hot.check()
    assert await hot.ring([(new_id(), "default")]) is False
    assert not hot.up
    async with hot.listen("a", "b") as messages:  # looks elsewhere, after a moment
        assert messages.empty()
    await hot.close()
