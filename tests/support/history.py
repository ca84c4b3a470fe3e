"""The software of an earlier commit, out of the history of this repository."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def before(path: str, folder: Path) -> Path:
    """``workers`` and ``api`` as of the commit before the one that added ``path``, unpacked into ``folder``.

    Without the history (a source archive, a shallow clone) a test is skipped, but on CI, which has it, it fails.
    """
    added = _git("log", "--diff-filter=A", "--format=%H", "--", path).decode().split()
    archive = _git("archive", "--format=tar", f"{added[-1]}^", "workers", "api") if added else b""
    if not archive:
        reason = f"the commit before {path} is not here: fetch the whole history"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with tarfile.open(fileobj=io.BytesIO(archive)) as found:
        found.extractall(folder, filter="data")
    return folder


def _git(*arguments: str) -> bytes:
    """What git prints; nothing if it fails, or is not there."""
    git = shutil.which("git")
    if git is None:
        return b""
    done = subprocess.run([git, *arguments], cwd=ROOT, capture_output=True, check=False)
    return done.stdout if done.returncode == 0 else b""
