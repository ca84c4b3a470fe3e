"""The reference of the command line names every command and option, and none that does not exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from longshift.cli.app import app
from longshift.cli.exits import ExitCode

REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "cli.md"


def _commands(command: Any, name: str) -> Iterator[tuple[str, set[str]]]:
    """Every command that does something, with its long options (without those that only we use)."""
    below = getattr(command, "commands", {})
    for word, sub in below.items():
        yield from _commands(sub, f"{name} {word}")
    alone = name != "longshift" and getattr(command, "invoke_without_command", False)
    if not below or alone:
        shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
        options = {option for parameter in shown for option in parameter.opts if option.startswith("--")}
        yield name, options - {"--help"}


COMMANDS = dict(_commands(get_command(app), "longshift"))


def _sections() -> dict[str, str]:
    parts = re.split(r"^### (longshift .+)$", REFERENCE.read_text(), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_the_reference_has_each_command_and_no_other() -> None:
    assert set(_sections()) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_reference_has_each_option_of_a_command_and_no_other(name: str) -> None:
    first_line = _sections()[name].strip().split("\n")[0]
    assert set(re.findall(r"`(--[a-z-]+)`", first_line)) == COMMANDS[name]


def test_the_reference_has_each_exit_code() -> None:
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", REFERENCE.read_text(), flags=re.MULTILINE)} == set(
        ExitCode
    )
