"""How long a turn waits that came to a worker without its agent."""

from __future__ import annotations

from datetime import timedelta

from longshift.runner import MISDIRECTED, misdirected


def test_pauses_differ_so_that_they_fall_into_step_with_no_worker() -> None:
    pauses = [misdirected() for _ in range(50)]

    assert len(set(pauses)) > 1
    assert all(timedelta(0) < pause < 2 * MISDIRECTED for pause in pauses)
    assert max(pauses) - min(pauses) > MISDIRECTED / 4
