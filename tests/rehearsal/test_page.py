"""docs/how-to/scale.md names commands that exist."""

from __future__ import annotations

import re
import shlex
from typing import Any

from typer.main import get_command

from tests.rehearsal.__main__ import app
from tests.rehearsal.manifests import K8S


def test_the_page_has_commands_that_exist() -> None:
    page = (K8S.parent / "docs" / "how-to" / "scale.md").read_text()
    command: Any = get_command(app)
    given = [found[1] or "" for found in re.finditer(r'make rehearse-scale(?: ARGS="([^"]*)")?', page)]

    assert len(given) > 3
    for arguments in given:
        command.make_context("rehearsal", shlex.split(arguments))  # raises what the command line would
