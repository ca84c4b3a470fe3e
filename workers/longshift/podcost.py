"""Tells Kubernetes how many turns a worker runs, so that a scale-down takes the pod that loses least.

The annotation ``controller.kubernetes.io/pod-deletion-cost`` of the worker's own pod; a ReplicaSet removes pods of a low cost
first. Everything here is best effort: without it a scale-down takes any pod, whose turns then go on elsewhere all the same.

Needs what ``k8s/components/pod-cost`` gives the pod: a token that may patch it, and a way to the API server.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import httpx

logger = logging.getLogger(__name__)

ANNOTATION = "controller.kubernetes.io/pod-deletion-cost"
API_SERVER = "https://kubernetes.default.svc"
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where the kubelet puts, and renews, the token, the API server's certificate authority and the name of the namespace."""
EVERY = timedelta(seconds=15)
"""Between two changes of the annotation at least: each is a write that the API server shows to everyone who watches pods."""
LONGEST = timedelta(minutes=5)
"""Between two tries, when they fail in a row; after the first, each pause is twice as long."""
PATIENCE = timedelta(seconds=5)


@dataclass(frozen=True, slots=True)
class Credentials:
    token: str
    namespace: str
    tls: ssl.SSLContext


class PodCost:
    """Keeps the deletion cost of one pod at what ``running`` says."""

    def __init__(
        self,
        running: Callable[[], int],
        *,
        pod: str,
        namespace: str | None = None,
        url: str = API_SERVER,
        account: Path = ACCOUNT,
        every: timedelta = EVERY,
    ) -> None:
        """``namespace`` None: the account's."""
        self._running = running
        self._pod = pod
        self._namespace = namespace
        self._url = url
        self._account = account
        self._every = every
        self._written: int | None = None  # the pod may have a cost from a process before this one
        self._failed = 0

    async def run(self) -> None:
        """For ever: a failure is logged, once, and tried again."""
        while True:
            running = self._running()
            if running != self._written:
                await self._try(running)
            await asyncio.sleep(self._pause().total_seconds())

    def _pause(self) -> timedelta:
        return max(self._every, min(LONGEST, self._every * 2.0 ** min(self._failed - 1, 10)))

    async def _try(self, running: int) -> None:
        try:
            await self._write(running)
        except (
            httpx.HTTPError,
            httpx.InvalidURL,
            OSError,
            ValueError,
        ) as error:  # of ssl: OSError; no text: ValueError
            self._failed += 1
            if self._failed == 1:
                logger.warning(
                    "the pod's deletion cost cannot be kept: a scale-down takes any pod",
                    extra={"pod": self._pod, "reason": _reason(error)},
                )
        else:
            if self._failed:
                logger.info("the pod's deletion cost is kept again", extra={"pod": self._pod})
            self._written, self._failed = running, 0

    async def _write(self, running: int) -> None:
        """One connection for each write: there is one in fifteen seconds, and the authority may have changed meanwhile."""
        account = await asyncio.to_thread(self._read)
        async with httpx.AsyncClient(verify=account.tls, timeout=PATIENCE.total_seconds(), trust_env=False) as client:
            answer = await client.patch(
                f"{self._url}/api/v1/namespaces/{account.namespace}/pods/{self._pod}",
                headers={"authorization": f"Bearer {account.token}", "content-type": "application/merge-patch+json"},
                json={"metadata": {"annotations": {ANNOTATION: str(running)}}},
            )
        answer.raise_for_status()

    def _read(self) -> Credentials:
        """Anew each time: tokens last an hour, and the kubelet replaces them before that."""
        return Credentials(
            token=(self._account / "token").read_text("ascii").strip(),
            namespace=self._namespace or (self._account / "namespace").read_text("ascii").strip(),
            tls=ssl.create_default_context(cafile=self._account / "ca.crt"),
        )


def _reason(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        told = error.response.text[:300]
        return f"the API server answers {error.response.status_code}: {told}"
    return f"{type(error).__name__}: {error}"
