"""The authoring face under a strict type checker."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.typing import sample

ROOT = Path(__file__).resolve().parents[2]
WRONG = ROOT / "tests" / "typing" / "wrong.py.txt"


def mypy(*paths: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--hide-error-context", *map(str, paths)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.timeout(300)
def test_the_sample_passes_and_every_mistake_is_found(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    shutil.copyfile(WRONG, wrong)
    found = mypy(ROOT / "tests" / "typing" / "sample.py", wrong)
    told = {int(line.split(":")[1]) for line in found.stdout.splitlines() if ": error:" in line and "wrong.py" in line}
    expected = {n for n, line in enumerate(WRONG.read_text().splitlines(), start=1) if line.endswith("# error")}
    assert told == expected, found.stdout
    assert "sample.py" not in found.stdout


def test_the_sample_also_runs() -> None:
    sample.check_result()
