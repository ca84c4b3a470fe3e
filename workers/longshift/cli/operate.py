"""Commands for those who keep a fleet running: exporter, probe. They start fast: a probe may run every few seconds."""

from __future__ import annotations

import asyncio
import json as jsonlib
import signal
import urllib.error
import urllib.request
from contextlib import suppress
from enum import StrEnum
from http.client import HTTPException
from typing import TYPE_CHECKING, Annotated

import typer

from longshift.cli.exits import ExitCode
from longshift.errors import ConfigError, Unavailable

if TYPE_CHECKING:
    from longshift.config import Config
    from longshift.model import Json

PATIENCE = 6
"""Seconds for an answer: a process takes four to say that something does not answer."""
ANY = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 - where a process listens everywhere, it is here too


class Probe(StrEnum):
    """What a process is asked."""

    LIVE = "live"
    READY = "ready"
    STUCK = "stuck"


def exporter(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port for scrapes; 0: any. Default: LONGSHIFT_METRICS_PORT, or 9464."),
    ] = None,
) -> None:
    """Serve the figures of the whole fleet to Prometheus, read from Postgres, until SIGTERM or Ctrl-C."""
    from longshift import telemetry
    from longshift.cli import local

    telemetry.setup()
    asyncio.run(_export(local.load(host=host, metrics_port=port)))


async def _export(config: Config) -> None:
    from longshift.exporter import PORT, Exporter

    over = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, over.set)
    port = PORT if config.metrics_port is None else config.metrics_port
    try:
        await Exporter(config).serve(over, port=port, host=config.host)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {config.host}:{port}: {error.strerror}; choose another port with --port"
        ) from None


def probe(
    what: Annotated[Probe, typer.Argument(help="What to ask: is it alive, is it ready, is it stuck?")],
    url: Annotated[
        str | None, typer.Option(help="Where the process answers; default: LONGSHIFT_METRICS_PORT on this machine.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Ask a worker, an API process or the exporter how it is; for health checks. 0: well, 1: not well, 4: no answer."""
    well, answer = _ask(f"{(url or _here()).rstrip('/')}/{what}z")
    if json:
        typer.echo(jsonlib.dumps(answer))
    else:
        typer.echo(_said(answer), err=not well)
    raise typer.Exit(ExitCode.OK if well else ExitCode.FAILED)


def _here() -> str:
    from longshift import config as settings

    config = settings.load()
    if not config.metrics_port:
        raise ConfigError(
            "LONGSHIFT_METRICS_PORT is not set: a process answers probes at that port; or say where with --url"
        )
    host = ANY.get(config.host, config.host)
    return f"http://[{host}]:{config.metrics_port}" if ":" in host else f"http://{host}:{config.metrics_port}"


def _ask(url: str) -> tuple[bool, Json]:
    """Whether it is well, and what it says.

    Raises:
        Unavailable: nobody answers there, or somebody else.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=PATIENCE) as response:
            status, body = 200, response.read()
    except urllib.error.HTTPError as error:
        with error:
            status, body = error.code, error.read()
    except (OSError, HTTPException, ValueError) as error:
        raise Unavailable(f"no answer from {url}: {getattr(error, 'reason', None) or error}") from None
    with suppress(ValueError):
        answer = jsonlib.loads(body)
        if status in (200, 503) and isinstance(answer, dict) and "status" in answer:
            return status == 200, answer
    raise Unavailable(
        f"{url} answers {status}, but not as a process of Longshift: is it the right port, and does it know this?"
    )


def _said(answer: Json) -> str:
    """One line for people."""
    failed = [
        f"{name}: {check.get('detail') or 'failed'}"
        for name, check in answer.get("checks", {}).items()
        if check.get("status") != "ok"
    ]
    details = [answer["detail"]] if answer.get("detail") else []
    return ": ".join([str(answer["status"]), *filter(None, ["; ".join(details + failed)])])
