"""Where things are: the settings, and what the local stack of this folder says about itself.

    DATA/stack.json   written by `longshift up` (mode 0600): the URLs and the key, for the commands on this machine
    DATA/api-key      the key that `up` made (mode 0600); in the database there is only its hash

The environment wins: ``LONGSHIFT_URL``, ``LONGSHIFT_API_KEY``, ``LONGSHIFT_DATABASE_URL`` and so on.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError

from longshift import config as settings
from longshift.client import Client
from longshift.config import Config

T = TypeVar("T")


class StackFile(BaseModel):
    """What a running stack tells the commands on this machine."""

    model_config = ConfigDict(frozen=True)

    pid: int
    url: str
    api_key: str
    database_url: str
    redis_url: str
    artifacts_url: str


def path_of(data: Path) -> Path:
    return data / "stack.json"


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner reads, whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    new.replace(path)


def read_stack(data: Path) -> StackFile | None:
    """What the stack on this folder said last; None if there was none."""
    with suppress(OSError, ValidationError):
        return StackFile.model_validate_json(path_of(data).read_bytes())
    return None


def load(**overrides: object) -> Config:
    """The settings; where the servers are comes from the local stack if the environment does not say it.

    Raises:
        ConfigError: a setting does not fit.
    """
    config = settings.load(**overrides)
    stack = read_stack(config.data)
    if stack is None:
        return config
    found = {
        "database_url": SecretStr(stack.database_url),
        "redis_url": SecretStr(stack.redis_url),
        "artifacts_url": stack.artifacts_url,
        "api_key": SecretStr(stack.api_key),
        "url": stack.url,
    }
    if config.database_url is not None or config.redis_url is not None:
        found = {name: found[name] for name in ("api_key", "url")}  # never half of one stack and half of another
    if "url" in config.model_fields_set and config.url.rstrip("/") != stack.url:
        found.pop("api_key")  # the key of this folder's stack is none of another's business
    return config.model_copy(update={name: v for name, v in found.items() if name not in config.model_fields_set})


def connect(config: Config) -> Client:
    """A client of the API that the settings name."""
    key = config.api_key.get_secret_value() if config.api_key is not None else None
    return Client(config.url, key)


def ask(question: Callable[[Client], Awaitable[T]]) -> T:
    """The one door from the blocking command line into the async client.

    Raises:
        LongshiftError: what the client raises.
    """

    async def asking() -> T:
        async with connect(load()) as client:
            return await question(client)

    return asyncio.run(asking())
