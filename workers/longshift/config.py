"""Settings: read from the environment once, validated once, frozen, passed down. No other module reads the environment."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, Self
from uuid import UUID

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from longshift.errors import ConfigError


def _seconds(value: object) -> object:
    """A number in text means seconds; anything else is left to pydantic (ISO 8601, ``[D ]HH:MM:SS``)."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Names = Annotated[tuple[str, ...], NoDecode]
Seconds = Annotated[timedelta, BeforeValidator(_seconds)]


class Config(BaseSettings):
    """Every setting of every Longshift process, each one ``LONGSHIFT_<NAME>`` in the environment.

    Durations are given in seconds or ISO 8601 (``PT1.5S``); sizes in bytes.
    """

    model_config = SettingsConfigDict(env_prefix="LONGSHIFT_", frozen=True, extra="forbid", env_ignore_empty=True)

    # where things are
    database_url: SecretStr | None = Field(None, description="postgresql://...; unset: `longshift up` starts one")
    redis_url: SecretStr | None = Field(None, description="redis://...; unset: `longshift up` starts one")
    artifacts_url: str | None = Field(None, description="s3://bucket/prefix or file:///dir")
    data: Path = Field(Path(".longshift"), description="folder of the local stack: Postgres, Redis, artifacts, logs")

    # the local stack and the API
    host: str = "127.0.0.1"
    port: int = Field(8420, ge=0, le=65535)
    api_key: SecretStr | None = Field(
        None, description="if set, the key of the default tenant; else one is made and printed"
    )
    url: str = Field("http://127.0.0.1:8420", description="where the command line finds the API")
    max_body: int = Field(1024 * 1024, gt=0, description="bytes of a request body")
    max_batch_body: int = Field(200 * 1024 * 1024, gt=0, description="bytes of a JSONL batch body")
    max_artifact: int = Field(2 * 1024**3, gt=0, description="bytes of an uploaded artifact")

    # workers
    agents: Names = Field(
        ("longshift.agents.research",), description="modules whose agents the workers load, comma-separated"
    )
    queues: Names = Field(("default",), description="wake-up queues that a worker serves, comma-separated")
    workers: int = Field(2, ge=0, description="worker processes of the local stack")
    capacity: int = Field(500, ge=1, description="turns that one worker process runs at a time")
    threads: int = Field(16, ge=1, description="threads for agents and steps that are not async")
    wards: int = Field(4, ge=1, description="child processes of a worker, at most, for turns that may have crashed one")
    process: UUID | None = Field(None, description="given by a supervisor to the process that it starts")

    fetch_allow: Names = Field(
        (),
        description="hosts and networks that agents may fetch from although they are not public, comma-separated",
    )

    # time limits of the protocol (design: liveness belongs to the worker)
    heartbeat: Seconds = timedelta(seconds=1)
    lease_ttl: Seconds = Field(timedelta(seconds=15), description="a worker silent for this long is declared dead")
    lock_grace: Seconds = Field(timedelta(seconds=3), description="the same, when its advisory lock is gone too")
    loop_limit: Seconds = Field(
        timedelta(seconds=30), description="an event loop stalled for this long ends its process"
    )
    sweep: Seconds = Field(timedelta(milliseconds=500), description="pause between two passes of the sweeper")
    rering: Seconds = Field(timedelta(seconds=2), description="a ready session whose wake-up is older is rung again")
    drain_grace: Seconds = Field(timedelta(seconds=20), description="time that running steps get after SIGTERM")
    turn_deadline: Seconds = Field(timedelta(days=7), description="deadline of a turn that names none")
    step_timeout: Seconds = Field(timedelta(minutes=10), description="timeout of a step that names none")
    connect_timeout: Seconds = timedelta(seconds=3)
    database_timeout: Seconds = Field(
        timedelta(seconds=10), ge=timedelta(seconds=1), description="a Postgres that says nothing for so long is away"
    )

    # tiers
    hot_ttl: Seconds = Field(timedelta(hours=1), description="how long a context stays in Redis after its last turn")
    hot_verify: float = Field(0.01, ge=0, le=1, description="share of hot contexts that are compared with their fold")
    checkpoint_events: int = Field(1000, ge=1, description="events after which a checkpoint is kept, however small")
    inline: int = Field(32 * 1024, ge=1024, description="bytes of a value in a row; a larger one goes to the cold tier")
    max_value: int = Field(64 * 1024 * 1024, ge=1024, description="bytes of a result or output, wherever it is kept")
    session_ttl: Seconds | None = Field(
        None, ge=timedelta(seconds=1), description="sessions idle for this long are deleted; unset: never"
    )
    archive_after: Seconds | None = Field(
        timedelta(days=7),
        ge=timedelta(0),
        description="logs of sessions idle for this long move to the cold tier; 0: never",
    )
    keep_uploads: Seconds = Field(
        timedelta(days=30),
        ge=timedelta(hours=1),  # a large input has no reference until its turn, or its batch, is committed
        description="an artifact that nothing refers to is deleted when it is older than this",
    )
    embedder: str | None = Field(
        None,
        description="module:function that makes vectors of texts for recall, in the workers; unset: full text only",
    )

    # operation
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="where a process serves its health and its metrics; unset: not"
    )
    stuck_after: Seconds = Field(
        timedelta(seconds=30),
        ge=timedelta(seconds=1),
        description="a worker with free slots that takes none of the work that is ready for so long is stuck",
    )
    traces: Literal["off", "otlp"] = Field(
        "off", description="otlp: send traces to the collector that OTEL_EXPORTER_OTLP_ENDPOINT names"
    )
    pod_name: str | None = Field(
        None, description="name of the pod of a worker, which then keeps its deletion cost; unset: it does not"
    )
    pod_namespace: str | None = Field(None, description="namespace of that pod")

    # group commit
    batch_rows: int = Field(500, ge=1, description="rows of one append statement")
    batch_bytes: int = Field(4 * 1024 * 1024, ge=1024, description="payload bytes of one append statement")
    max_event: int = Field(1024 * 1024, description="payload bytes of one event; larger values belong in artifacts")
    pool_size: int = Field(8, ge=2, description="Postgres connections of one process, the liveness connection apart")

    @field_validator("agents", "queues", "fetch_allow", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _beats_before_it_is_missed(self) -> Self:
        """A worker that beats too seldom could be called silent, and, as a sweeper, never trust its own watch."""
        if not 2 * self.heartbeat <= self.lock_grace < self.lease_ttl:
            raise PydanticCustomError(
                "liveness",
                "LONGSHIFT_LOCK_GRACE must be at least twice LONGSHIFT_HEARTBEAT and less than LONGSHIFT_LEASE_TTL: "
                "the defaults are 3, 1 and 15 seconds",
            )
        return self

    def require(self, name: Literal["database_url", "redis_url", "artifacts_url"]) -> str:
        """The value of a setting that this process cannot do without.

        Raises:
            ConfigError: it is not set.
        """
        value = getattr(self, name)
        if value is None:
            raise ConfigError(
                f"LONGSHIFT_{name.upper()} is not set: set it, or run `longshift up`, which starts a local stack"
            )
        return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


def load(**overrides: object) -> Config:
    """Read the settings; ``overrides`` (those that are not None) win over the environment.

    Raises:
        ConfigError: a value does not fit; the message names each setting.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        return Config(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        raise ConfigError("settings that do not fit: " + "; ".join(map(_misfit, error.errors()))) from None


def unknown() -> list[str]:
    """Variables that begin like settings and are none: misspelt ones do nothing.

    Kubernetes adds such variables for each service whose name begins with ours (``LONGSHIFT_API_SERVICE_HOST``): not meant.
    """
    given = [name for name in os.environ if name.startswith("LONGSHIFT_")]
    services = tuple(name.removesuffix("SERVICE_HOST") for name in given if name.endswith("_SERVICE_HOST"))
    known = {f"LONGSHIFT_{name.upper()}" for name in Config.model_fields}
    return sorted(name for name in given if name not in known and not name.startswith(services))


def _misfit(error: ErrorDetails) -> str:
    name = ".".join(str(part) for part in error["loc"]).upper()
    return f"LONGSHIFT_{name}: {error['msg']}" if name else error["msg"]


def child_environment(**settings: SecretStr | Path | UUID | str | int | tuple[str, ...] | None) -> dict[str, str]:
    """This process's environment with ``settings`` (those that are not None) on top: how a child is given its own."""
    given = {f"LONGSHIFT_{name.upper()}": _written(value) for name, value in settings.items() if value is not None}
    return {**os.environ, **given}


def worker_environment(config: Config, *, process: UUID) -> dict[str, str]:
    """For a child that works with ``config``; ``process`` is the identity that it is given."""
    return child_environment(
        process=process,
        agents=config.agents,
        queues=config.queues,
        capacity=config.capacity,
        database_url=config.database_url,
        redis_url=config.redis_url,
        artifacts_url=config.artifacts_url,
        embedder=config.embedder,
    )


def _written(value: SecretStr | Path | UUID | str | int | tuple[str, ...]) -> str:
    match value:
        case SecretStr():
            return value.get_secret_value()
        case tuple():
            return ",".join(value)
        case _:
            return str(value)
