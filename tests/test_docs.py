"""Every code block of the guides for authors is run.

In a fenced block, ``python`` runs in one namespace per page, or with ``title=FILE`` is written to that file; ``console``
runs what follows each ``$``, and holds its output against the lines below it (``...`` stands for anything).
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from typer.main import get_command

from longshift.cli.app import app
from longshift.config import child_environment
from longshift.embedded import Guardian
from tests.support.http_servers import running
from tests.support.mcp_servers import Shop

DOCS = Path(__file__).resolve().parents[1] / "docs"
_BLOCK = re.compile(r"^( *)```(\w+)([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    options: str
    text: str

    @property
    def title(self) -> str | None:
        found = re.search(r"title=(\S+)", self.options)
        return found[1] if found else None


def blocks(page: str) -> list[Block]:
    path = DOCS / page
    text = path.read_text()
    return [
        Block(path, text.count("\n", 0, m.start()) + 2, m[2], m[3].strip(), dedent(m[4])) for m in _BLOCK.finditer(text)
    ]


def run_python(block: Block, namespace: dict[str, object]) -> None:
    source = "\n" * (block.line - 1) + block.text  # so that a traceback names the line of the page
    exec(compile(source, str(block.page), "exec"), namespace)


def run_console(block: Block, folder: Path) -> None:
    for command, output in commands(block):
        words = shlex.split(command)
        words = [sys.executable, *(["-m", "longshift.cli", *words[1:]] if words[0] == "longshift" else words[1:])]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False, env=plain_environment())
        shown = done.stdout + done.stderr
        assert (done.returncode != 0) == ("fails" in block.options), f"{command}\n{shown}"
        check_output(command, shown, output)


def commands(block: Block) -> list[tuple[str, str]]:
    """What follows each ``$``, and the lines below it."""
    return _COMMAND.findall(block.text)


def check_output(command: str, shown: str, output: str) -> None:
    expected = ".*".join(re.escape(part.strip()) for part in output.strip().split("..."))
    assert re.search(expected, shown, re.DOTALL), f"{command}\n{shown}\nexpected {output}"


def plain_environment() -> dict[str, str]:
    """Without the settings and options of the run that this test is part of."""
    unwanted = ("LONGSHIFT_", "PYTEST_", "COV_")
    return {name: value for name, value in child_environment().items() if not name.startswith(unwanted)}


@contextmanager
def stack(command: str, folder: Path, guardian: Guardian) -> Iterator[None]:
    """``longshift up`` as the page has it, on any port, until the page ends."""
    words = [sys.executable, "-m", "longshift.cli", *shlex.split(command)[1:], "--json", "--port", "0"]
    process = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True, env=plain_environment())
    guardian.watch(process.pid)
    assert process.stdout is not None
    try:
        assert any("ready" in json.loads(line) for line in process.stdout), "the stack did not start"
        yield
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_the_guide_for_authors_runs() -> None:
    namespace: dict[str, object] = {"__name__": "guide"}
    for block in blocks("how-to/write-agents.md"):
        assert block.language == "python"
        run_python(block, namespace)


def test_the_guide_to_artifacts_runs() -> None:
    namespace: dict[str, object] = {"__name__": "guide"}
    commands: Any = get_command(app)
    for block in blocks("how-to/artifacts.md"):
        if block.language == "python":
            run_python(block, namespace)
        elif block.text.startswith("longshift "):
            for line in block.text.splitlines():
                _, group, name, *arguments = shlex.split(line)
                commands.commands[group].commands[name].make_context(name, arguments)


def test_the_guide_to_frameworks_runs() -> None:
    namespace: dict[str, object] = {"__name__": "guide"}
    for block in blocks("how-to/frameworks.md"):
        if block.language == "python":
            run_python(block, namespace)


def test_the_guide_to_traces_runs() -> None:
    namespace: dict[str, object] = {"__name__": "guide"}
    for block in blocks("how-to/trace.md"):
        if block.language == "python" and block.options != "no-run":
            run_python(block, namespace)


def test_the_guide_to_memory_runs() -> None:
    namespace: dict[str, object] = {"__name__": "guide"}
    for block in blocks("how-to/memory.md"):
        if block.language == "python":
            run_python(block, namespace)


def test_the_guide_for_operators_has_commands_that_exist() -> None:
    commands: Any = get_command(app)
    seen = set()
    for block in blocks("how-to/operate-tools.md"):
        assert block.language == "sh"
        for line in block.text.splitlines():
            program, name, *arguments = shlex.split(line)
            assert program == "longshift"
            commands.commands[name].make_context(name, arguments)  # raises what the command line would
            seen.add(name)
    assert seen == {"approvals", "approve", "signal", "tools", "settle", "steps", "retry"}


def test_the_guide_to_mcp_runs() -> None:
    namespace: dict[str, object] = {"__name__": "guide"}
    with running(Shop().app) as server:
        for block in blocks("how-to/mcp.md"):
            run_python(replace(block, text=block.text.replace("https://shop.example", server.url)), namespace)


@pytest.mark.timeout(180)
def test_the_tutorial_runs(tmp_path: Path, guardian: Guardian) -> None:
    pages = blocks("tutorial.md")
    starts = next(i for i, block in enumerate(pages) if block.text.startswith("$ longshift up "))
    for block in pages[:starts]:
        if block.title is not None:
            (tmp_path / block.title).write_text(block.text)
        else:
            run_console(block, tmp_path)
    with stack(pages[starts].text.removeprefix("$ ").strip(), tmp_path, guardian):
        for block in pages[starts + 1 :]:
            run_console(block, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_guide_to_breaking_an_agent_runs(tmp_path: Path) -> None:
    for block in blocks("how-to/break-your-agent.md"):
        if block.title is not None:
            (tmp_path / block.title).write_text(block.text)
        else:
            run_console(block, tmp_path)
