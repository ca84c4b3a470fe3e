"""What the integrations are to those who do not use them: nothing, until they ask."""

from __future__ import annotations

import subprocess
import sys

import pytest

from longshift.config import child_environment

FRAMEWORKS = ("agents", "openai", "pydantic_ai", "mcp")


def said(program: str) -> str:
    words = [sys.executable, "-c", program]
    return subprocess.run(words, capture_output=True, text=True, check=True, env=child_environment()).stdout.strip()


def test_longshift_and_its_worker_import_no_framework() -> None:
    program = f"import longshift, longshift.worker, sys; print([m for m in {FRAMEWORKS} if m in sys.modules])"
    assert said(program) == "[]"


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [("pydantic_ai", "pydantic_ai", "pydantic-ai"), ("openai_agents", "agents", "openai-agents")],
)
def test_a_missing_extra_is_named(module: str, package: str, extra: str) -> None:
    program = (
        f"import sys; sys.modules[{package!r}] = None\n"
        f"try: import longshift.integrations.{module}\n"
        "except ImportError as error: print(error)"
    )
    assert f"pip install 'longshift[{extra}]'" in said(program)
