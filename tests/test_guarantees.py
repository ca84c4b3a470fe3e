"""The page of guarantees has a row for each promise, and every test that it names is there to be run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "docs" / "guarantees.md", ROOT / "docs" / "explanation" / "failures.md"]
_TEST = re.compile(r"^(?:async )?def (test_\w+)", re.MULTILINE)


def _rows() -> dict[str, str]:
    lines = PAGES[0].read_text().splitlines()
    return {found[1]: line for line in lines if (found := re.match(r"\| \*\*(P\d)\*\* \|", line))}


def test_each_promise_has_a_row_with_what_it_says_the_faults_and_a_test() -> None:
    rows = _rows()

    assert list(rows) == [f"P{n}" for n in range(1, 9)]
    for promise, row in rows.items():
        _, _, said, faults, tests, _ = (cell.strip() for cell in row.split("|"))
        assert said, promise
        assert faults, promise
        assert "`test_" in tests, promise


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    """By its whole name, or by a part of it: ``…a_part_of_it…``."""
    files = {file.name: _TEST.findall(file.read_text()) for file in (ROOT / "tests").rglob("test_*.py")}
    there = {name for names in files.values() for name in names}
    said = re.findall(r"`([^`\s]*(?:test_|…)[^`\s]*)`", page.read_text())
    words = {word for name in said for word in re.split(r"…|::|/|\[[^]]*\]", name) if word}

    assert len(words) > 10
    missing = {word for word in words if word not in files and not any(word in name for name in there)}
    assert missing - {"protocol"} == set()
