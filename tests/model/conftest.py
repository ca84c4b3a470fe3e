"""The deep scopes run when they are asked for: ``make test ARGS="-m full"``."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "full" in config.option.markexpr:
        return
    deep = [item for item in items if item.get_closest_marker("full") is not None]
    config.hook.pytest_deselected(items=deep)
    items[:] = [item for item in items if item not in deep]
