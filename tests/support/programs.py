"""Programs of others that some tests run: where they are, and what it means that one is not there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest


def program(name: str) -> Path:
    """The program on the PATH. Without it a test is skipped, but on CI, which installs all of them, it fails."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        reason = f"{name} is not installed: see CONTRIBUTING.md, section Tests"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return Path(found)
