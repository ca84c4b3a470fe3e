"""Commands that run one process of a fleet: worker, api, migrate. Start-up checks say which setting is wrong."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Annotated
from uuid import UUID

import typer

from longshift import telemetry
from longshift.agent import Agents, load_agents
from longshift.cli import local
from longshift.cli.output import put_json, say
from longshift.cli.show import AsJson
from longshift.config import Config, child_environment, worker_environment
from longshift.errors import InUse, Unavailable

API = (sys.executable, "-P", "-m", "longshift_api")
"""Without the current folder on the path: the API imports nothing of a user's."""
SUPERVISED = (sys.executable, "-P", "-m", "longshift.cli", "worker", "--supervised")


def worker(
    agents: Annotated[str | None, typer.Option(help="Modules whose agents it serves, comma-separated.")] = None,
    queues: Annotated[str | None, typer.Option(help="Queues it serves, comma-separated.")] = None,
    capacity: Annotated[int | None, typer.Option(min=1, help="Turns it runs at a time.")] = None,
    supervisor: Annotated[
        bool,
        typer.Option(
            help="Run it as the child of a small process, which starts it again when it dies, and reports the death: its "
            "turns go on elsewhere at once, and one that crashes its process is found out sooner."
        ),
    ] = True,
    supervised: Annotated[bool, typer.Option("--supervised", hidden=True)] = False,
) -> None:
    """Run a worker until SIGTERM or Ctrl-C, which drain it; once more ends at once what still runs."""
    telemetry.setup()
    config = local.load(agents=agents, queues=queues, capacity=capacity)
    if supervised or not supervisor:
        raise typer.Exit(_run_worker(config, supervised=supervised))
    raise typer.Exit(_supervise(config))


def api(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen on; 0: any.")] = None,
) -> None:
    """Run the HTTP API alone, until SIGTERM or Ctrl-C."""
    config = local.load(host=host, port=port)
    environment = child_environment(
        host=config.host,
        port=config.port,
        database_url=config.database_url,
        redis_url=config.redis_url,
        artifacts_url=config.artifacts_url,
    )
    os.execve(sys.executable, API, environment)  # noqa: S606 - it takes this process's place, signals and all


def migrate(
    contract: Annotated[
        bool,
        typer.Option(
            "--contract",
            help="Apply contracting migrations, too, which older software does not survive; refused while some lives.",
        ),
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing: exit with 0 if this software may start on the database.")
    ] = False,
    wait: Annotated[
        float,
        typer.Option(min=0, help="Seconds to go on trying while Postgres is away or (--check) is not migrated."),
    ] = 0,
    json: AsJson = False,
) -> None:
    """Bring the database to the schema of this version. May be repeated, and under the version before."""
    from longshift.cli.migrating import bring, may_start

    config = local.load()
    if check:
        revision = may_start(config, wait=wait)
        put_json({"revision": revision}) if json else say(f"this version may start on revision {revision}")
        return
    done = bring(config, contract=contract, wait=wait)
    if json:
        put_json({"revision": done.revision, "stopped_before": done.stopped_before})
    else:
        say(f"the database is at revision {done.revision}")
    if done.stopped_before is not None and done.sufficient:
        say(
            f"{done.stopped_before} is to come: when nothing older than this version runs any more, run "
            "`longshift migrate --contract`"
        )
    if not done.sufficient:
        raise InUse(
            f"this version needs what comes after the contracting migration {done.stopped_before}, which older versions do "
            "not survive: stop all of them, then run `longshift migrate --contract`"
        )


def _supervise(config: Config) -> int:
    from longshift.supervisor import Supervisor

    def environment(process: UUID) -> dict[str, str]:
        return worker_environment(config, process=process)

    def report(process: UUID, code: int) -> bool | None:
        from longshift import deaths

        if config.database_url is None or config.redis_url is None:  # the child has complained
            return False
        return asyncio.run(deaths.report_once(config, process=process, code=code))

    return Supervisor(SUPERVISED, environment, report).run()


def _run_worker(config: Config, *, supervised: bool) -> int:
    from longshift import fleet, parent
    from longshift.ending import end_process
    from longshift.tracing import open_traces
    from longshift.worker import Worker

    traces = open_traces(config, service="longshift-worker")  # complains before anything is begun
    asyncio.run(check(config))
    agents = _load_agents(config)
    traces.share()  # after them: they may have brought a provider of their own
    app = fleet.create_app(
        redis_url=config.require("redis_url"),
        queues=config.queues,
        runtime=Worker(
            config,
            agents,
            on_failure=lambda: app.request_stop(1),
            on_drain=lambda: app.request_stop(0),
            traces=traces,
        ),
        connect_timeout=config.connect_timeout.total_seconds(),
    )
    if supervised:
        parent.when_gone(app.request_stop)
    return end_process(fleet.run(app))


async def check(config: Config) -> None:
    """Is everything there that a worker needs?

    Raises:
        ConfigError: a setting is missing or wrong, or the database is not migrated; the message names the setting.
        Unavailable: Postgres, Redis or the artifact store does not answer.
    """
    from longshift.artifacts import open_store
    from longshift.db import health
    from longshift.db.database import Database
    from longshift.hot import Hot

    timeout = config.connect_timeout
    db = Database(config.require("database_url"), size=2, connect_timeout=timeout, name="longshift-check")
    hot = Hot(config.require("redis_url"), timeout=timeout)
    store = open_store(config.require("artifacts_url"), connect_timeout=timeout)
    try:
        try:
            await health.check_schema(db)
        except Unavailable as error:
            raise Unavailable(f"LONGSHIFT_DATABASE_URL: {error}") from None
        await hot.check()
        try:
            await store.check()
        except Unavailable as error:
            raise Unavailable(f"LONGSHIFT_ARTIFACTS_URL: {error}") from None
    finally:
        await store.close()
        await hot.close()
        await db.close()


def _load_agents(config: Config) -> Agents:
    """The agents, from modules that may lie in the current folder. Our own modules are imported by now."""
    sys.path.insert(0, str(Path.cwd()))
    return load_agents(config.agents)
