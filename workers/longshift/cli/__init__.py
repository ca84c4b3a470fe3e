"""The command line. Standard output carries data, standard error messages; see ``exits`` for the exit codes."""

from __future__ import annotations

import sys


def main() -> None:
    """The entry point ``longshift``: an expected error is one sentence, never a traceback."""
    from longshift.cli.app import app
    from longshift.cli.exits import report
    from longshift.errors import LongshiftError

    try:
        app(prog_name="longshift")
    except LongshiftError as error:
        sys.exit(report(error))
