"""What counts as a surprise in the logs."""

from __future__ import annotations

import json
from pathlib import Path

from tests.chaos.gather import MEANT, tracebacks

INNER = 'Traceback (most recent call last):\n  File "a.py", line 1, in f\nOSError: gone'
OUTER = "Traceback (most recent call last):\n  File \"b.py\", line 2, in g\nKeyError: 'x'"
BETWEEN = "\n\nThe above exception was the direct cause of the following exception:\n\n"


def found(folder: Path, *lines: str) -> list[str]:
    log = folder / "worker-1.1.log"
    log.write_text("\n".join(lines) + "\n")
    return list(tracebacks(log))


def test_a_traceback_in_a_line_of_json_is_named_with_its_causes(tmp_path: Path) -> None:
    quiet = json.dumps({"message": "worker ready"})
    loud = json.dumps({"message": "it failed", "trace": INNER + BETWEEN + OUTER})
    assert found(tmp_path, quiet, loud) == [
        "worker-1.1.log, line 2: it failed: KeyError: 'x', because of OSError: gone"
    ]


def test_a_plain_traceback_is_found_too(tmp_path: Path) -> None:
    assert found(tmp_path, "starting", *INNER.splitlines()) == ["worker-1.1.log, line 2: OSError: gone"]


def test_what_an_agent_was_told_to_raise_is_no_surprise(tmp_path: Path) -> None:
    meant = json.dumps({"message": "agent raised", "trace": f"{INNER}\n{MEANT}: no Exception"})
    assert found(tmp_path, meant) == []


def test_the_last_line_of_a_killed_process_may_be_torn(tmp_path: Path) -> None:
    assert found(tmp_path, '{"message": "half a li') == []
