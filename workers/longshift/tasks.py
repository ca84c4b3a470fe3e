"""The one Celery task: hand the sessions of a wake-up to the runtime of this process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from celery import Celery, Task

from longshift import wakeup
from longshift.errors import UsageError

if TYPE_CHECKING:
    from longshift.pool import Runtime


class WakeTask(Task):  # type: ignore[misc]  # Celery ships no types
    """A task whose body is a coroutine: ``longshift.pool`` awaits ``body()`` and never calls ``run()``."""

    name = wakeup.TASK
    typing = False
    ignore_result = True
    # Late: what is still in hand when the consumer closes goes back to the broker, to be taken by another worker.
    acks_late = True

    async def body(self, runtime: Runtime, kwargs: Mapping[str, Any]) -> None:
        """Wake the sessions named in ``kwargs``; returns when each is claimed or known not to be claimable.

        Raises:
            ValueError: ``kwargs`` are not those of a wake-up.
        """
        await runtime.wake(wakeup.decode(kwargs))

    def run(self, *_args: object, **_kwargs: object) -> None:
        """Refuse to run in one of Celery's own pools."""
        raise UsageError("a wake-up runs only in longshift.pool:AsyncioPool; start workers with `longshift worker`")


def register(app: Celery) -> None:
    """Make the wake-up known to ``app``."""
    app.register_task(WakeTask())
