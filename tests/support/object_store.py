"""An S3 to test against: moto in a process of its own, so that its memory is not ours and it can really die."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

import boto3

BUCKET = "longshift-test"


class ObjectServer:
    """Serves the bucket ``BUCKET`` on a free port of the loopback; ends with the ``with`` block, or with its parent.

    boto3 must find some credentials in the environment (``AWS_ACCESS_KEY_ID`` and so on); moto takes any.
    """

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self._process.stdout is not None
        self.endpoint = f"http://127.0.0.1:{int(self._process.stdout.readline())}"
        self.client = boto3.session.Session().client("s3", endpoint_url=self.endpoint, region_name="us-east-1")
        self.client.create_bucket(Bucket=BUCKET)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self.client.close()

    def url(self, prefix: str) -> str:
        """What ``open_store`` takes."""
        return f"s3://{BUCKET}/{prefix}?region=us-east-1&endpoint_url={self.endpoint}"

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


def one_at_a_time(app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    """moto closes a replaced object while another request still reads it (500, "I/O operation on closed file")."""
    lock = threading.Lock()

    def serialised(environ: Any, start_response: Any) -> Iterable[bytes]:
        with lock:
            return list(app(environ, start_response))

    return serialised


def main() -> None:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    assert server._server is not None
    server._server.app = one_at_a_time(server._server.app)
    print(server.get_host_and_port()[1], flush=True)
    sys.stdin.read()  # to its end: the parent has closed the pipe, or died


if __name__ == "__main__":
    main()
