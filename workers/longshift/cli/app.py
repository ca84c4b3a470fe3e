"""The commands, put together."""

from __future__ import annotations

from importlib import metadata

import typer

from longshift.cli import artifacts, decide, fleet, keys, look, operate, processes, sessions, tenants, work
from longshift.cli.doctor import doctor
from longshift.cli.exits import EPILOG
from longshift.cli.torture import torture
from longshift.cli.up import up
from longshift.errors import ConfigError

app = typer.Typer(
    name="longshift",
    help="Long-running agent jobs on a fleet of workers that share nothing.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def options(
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True),
) -> None:
    if version:
        try:
            typer.echo(metadata.version("longshift"))
        except metadata.PackageNotFoundError:
            raise ConfigError("this longshift runs from its sources: install it to know its version") from None
        raise typer.Exit


_RUN, _OPERATE, _WORK, _DECIDE = "Run", "Operate", "Give work", "Decide"
_LOOK, _KEEP, _TEST = "Look", "Keep and delete", "Test"
for panel, commands in (
    (_RUN, (up, processes.worker, processes.api, operate.exporter, processes.migrate)),
    (_WORK, (work.submit, work.batch, work.retry, work.cancel)),
    (_DECIDE, (decide.approvals, decide.approve, decide.tools, decide.settle, decide.signal)),
    (_LOOK, (look.status, look.result, look.events, look.steps, look.agents)),
    (_OPERATE, (doctor, operate.probe)),
    (_TEST, (torture,)),
):
    for command in commands:
        app.command(rich_help_panel=panel, epilog=EPILOG)(command)
app.add_typer(artifacts.app, name="artifacts", rich_help_panel=_WORK)
app.add_typer(fleet.app, name="fleet", rich_help_panel=_OPERATE)
app.add_typer(keys.app, name="keys", rich_help_panel=_RUN)
app.add_typer(tenants.app, name="tenants", rich_help_panel=_RUN)
app.add_typer(sessions.app, name="sessions", rich_help_panel=_KEEP)
