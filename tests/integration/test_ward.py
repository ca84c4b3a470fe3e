"""A ward as a process: how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_a_ward_that_finds_no_postgres_says_so_in_a_sentence(tmp_path: Path) -> None:
    settings = {
        "LONGSHIFT_DATABASE_URL": "postgresql://nobody:secret@127.0.0.1:1/nowhere",
        "LONGSHIFT_REDIS_URL": "redis://127.0.0.1:1/0",
        "LONGSHIFT_ARTIFACTS_URL": tmp_path.as_uri(),
    }
    ward = subprocess.run(
        [sys.executable, "-m", "longshift.ward"],
        check=False,
        env=os.environ | settings,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert ward.returncode == 1
    assert "error: Postgres does not answer" in ward.stderr
    assert "Traceback" not in ward.stderr
    assert "secret" not in ward.stderr + ward.stdout
