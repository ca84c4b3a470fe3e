"""``longshift up``: the local stack with one command."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from longshift import config as settings
from longshift.cli.output import put, put_json, say
from longshift.cli.show import AsJson

if TYPE_CHECKING:  # slow to import, and the other commands do without
    from longshift.cli.parts import Status
    from longshift.cli.stack import Shutdown, Stack

_STYLES = {"ready": "green", "restarted": "green", "died": "red", "stopped": "dim"}


def up(
    workers: Annotated[int | None, typer.Option(min=0, help="Worker processes (LONGSHIFT_WORKERS, 2).")] = None,
    agents: Annotated[
        str | None, typer.Option(help="Modules whose agents they serve, comma-separated (LONGSHIFT_AGENTS).")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port of the API; 0: any (LONGSHIFT_PORT, 8420).")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address of the API (LONGSHIFT_HOST, 127.0.0.1).")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with all its data (LONGSHIFT_DATA, .longshift).")] = None,
    json: AsJson = False,
) -> None:
    """Start a local stack: Postgres, Redis, the API and workers. Ctrl-C stops it; its data stay.

    Postgres, Redis and the artifact store are those of LONGSHIFT_DATABASE_URL, LONGSHIFT_REDIS_URL and
    LONGSHIFT_ARTIFACTS_URL where these are set. The key is LONGSHIFT_API_KEY, or one is made and printed once.
    """
    from longshift.cli.stack import Shutdown, Stack

    config = settings.load(workers=workers, agents=agents, port=port, host=host, data=data)
    shutdown = Shutdown()
    with _signals(shutdown):
        Stack(config, tell=_tell_json if json else _tell, shutdown=shutdown).run(_ready_json if json else _ready)


@contextmanager
def _signals(shutdown: Shutdown) -> Iterator[None]:
    """Count the requests to stop; what was set before is restored. A SIGHUP that is ignored (nohup) stays so."""

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        shutdown.requests += 1

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(status: Status) -> None:
    where = "  ".join(part for part in (status.where, status.detail) if part)
    say(f"{status.part:<10} {status.state:<9} {where}".rstrip(), style=_STYLES.get(status.state))


def _tell_json(status: Status) -> None:
    given = {"part": status.part, "state": status.state, "where": status.where, "pid": status.pid}
    put_json({name: value for name, value in (given | {"detail": status.detail}).items() if value not in ("", None)})


def _ready(stack: Stack) -> None:
    if stack.key_is_new:
        say(f"key        {stack.key}  (kept in {stack.data / 'api-key'})")
    say("ready at", end=" ")
    put(stack.url)
    say("Ctrl-C stops everything", style="dim")


def _ready_json(stack: Stack) -> None:
    put_json({"ready": True, "url": stack.url, "key_file": str(stack.data / "stack.json"), "pids": stack.pids})
