"""The cold tier in S3, or in a service that speaks its protocol. The only module that imports boto3.

One client per store, shared by its threads: clients may be shared, sessions may not, and each further pair of them
costs 85 ms and 13 MB. The credentials need GetObject, PutObject, DeleteObject, AbortMultipartUpload and ListBucket
(without the last S3 answers "access denied" for what is merely missing). A process killed during a large upload leaves
invisible parts that S3 charges for: give the bucket a lifecycle rule that aborts incomplete multipart uploads.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import IO, TYPE_CHECKING, Any, Protocol

import urllib3.exceptions
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from longshift.artifacts.location import S3Location
from longshift.artifacts.store import Reader
from longshift.errors import ConfigError, LongshiftError, NotFound, Unavailable

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

_PART = 5 * 1024 * 1024  # the least that S3 allows: every upload under way holds one part in memory
_FAILURES = (BotoCoreError, ClientError, Boto3Error, urllib3.exceptions.HTTPError, OSError)
_MISSING = frozenset({"NoSuchKey", "404"})
_CREDENTIALS = "check the credentials and the bucket's policy"
_ADVICE = {
    "NoSuchBucket": "create the bucket, or correct LONGSHIFT_ARTIFACTS_URL",
    "404": "create the bucket, or correct LONGSHIFT_ARTIFACTS_URL",
    "403": _CREDENTIALS,
    "AccessDenied": _CREDENTIALS,
    "ExpiredToken": _CREDENTIALS,
    "InvalidAccessKeyId": _CREDENTIALS,
    "NoCredentialsError": _CREDENTIALS,
    "SignatureDoesNotMatch": _CREDENTIALS,
}


class _Content(Protocol):
    """The part of botocore's StreamingBody that is used."""

    def read(self, amt: int | None = None) -> bytes: ...

    def close(self) -> None: ...


class S3Reader:
    """A response body, with errors translated. It holds a connection until it is read to its end or closed."""

    def __init__(self, backend: S3Backend, key: str, content: _Content) -> None:
        self._backend = backend
        self._key = key
        self._content = content

    def read(self, size: int | None, /) -> bytes:
        with self._backend.errors("read", self._key):
            return self._content.read(size)

    def close(self) -> None:
        self._content.close()


class S3Backend:
    """See ``Backend``; nothing is sent before the first call."""

    def __init__(
        self,
        location: S3Location,
        *,
        connections: int,
        connect_timeout: timedelta,
        read_timeout: timedelta,
        attempts: int,
    ) -> None:
        self._bucket = location.bucket
        self._prefix = f"{location.prefix}/" if location.prefix else ""
        self._extra = _encryption(location)
        self._transfer = TransferConfig(
            multipart_threshold=_PART,
            multipart_chunksize=_PART,
            use_threads=False,  # the store's threads are the bound
            preferred_transfer_client="classic",  # never the CRT, which has threads and settings of its own
        )
        self._client = _client(
            location,
            Config(
                max_pool_connections=connections,
                connect_timeout=connect_timeout.total_seconds(),
                read_timeout=read_timeout.total_seconds(),
                retries={"mode": "standard", "total_max_attempts": attempts},
                tcp_keepalive=True,
                signature_version="s3v4",  # of presigned URLs: the older one knows neither KMS nor newer regions
                s3={"addressing_style": location.addressing},
                # Other services often lack the checksums that AWS has; ours is compared on every read anyway.
                request_checksum_calculation="when_required" if location.endpoint_url else "when_supported",
                response_checksum_validation="when_required" if location.endpoint_url else "when_supported",
            ),
        )

    def put(self, key: str, source: IO[bytes], *, size: int, content_type: str) -> None:
        extra = {**self._extra, "ContentType": content_type}
        name = self._prefix + key
        with self.errors("store", key):
            if size < _PART:  # one request; upload_fileobj would also close the source
                self._client.put_object(Bucket=self._bucket, Key=name, Body=source, ContentLength=size, **extra)
            else:
                self._client.upload_fileobj(source, self._bucket, name, ExtraArgs=extra, Config=self._transfer)

    def open(self, key: str, *, start: int, end: int | None) -> Reader:
        wanted = _range(start, end)
        try:
            with self.errors("read", key):
                response = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key, **wanted)
        except _EmptyRangeError:
            return io.BytesIO()
        content = S3Reader(self, key, response["Body"])
        if not wanted:
            return content
        if response.get("ContentRange") and start != end:
            return content
        content.close()
        if start == end:
            return io.BytesIO()
        raise Unavailable(f"the object store ignored the range of bytes asked of {key!r}")

    def delete(self, key: str) -> None:
        try:
            with self.errors("delete", key):
                self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)
        except NotFound:
            pass  # AWS does not mind; some other services do

    def presign(self, key: str, *, expires_in: timedelta, headers: Mapping[str, str]) -> str:
        wanted = {f"Response{name.replace('-', '')}": value for name, value in headers.items()}
        with self.errors("sign a URL of", key):
            return self._client.generate_presigned_url(
                "get_object",
                Params={"Bucket": self._bucket, "Key": self._prefix + key, **wanted},
                ExpiresIn=int(expires_in.total_seconds()),
                HttpMethod="GET",
            )

    def check(self) -> None:
        with self.errors("find the bucket", None):
            self._client.head_bucket(Bucket=self._bucket)

    def close(self) -> None:
        self._client.close()

    @contextmanager
    def errors(self, doing: str, key: str | None) -> Iterator[None]:
        """Translate what boto3 raises. Its own text stays behind: it may quote requests, and requests are signed."""
        try:
            yield
        except _FAILURES as error:
            raise self._meaning(error, doing, key) from None

    def _meaning(self, error: Exception, doing: str, key: str | None) -> LongshiftError:
        code = _code(error)
        if code == "InvalidRange":
            return _EmptyRangeError()
        if doing in ("read", "delete") and code in _MISSING:
            return NotFound(f"there is no artifact {key!r}")
        what = doing if key is None else f"{doing} artifact {key!r}"
        advice = _ADVICE.get(code, "it may be out of reach; the same call may succeed later")
        return Unavailable(f"cannot {what} in bucket {self._bucket!r}: {code}; {advice}")


class _EmptyRangeError(LongshiftError):
    """A range starts at or after the end of the object: like a slice, it is empty."""


def _code(error: Exception) -> str:
    """What S3 calls the error, else the class of what went wrong on the way there."""
    if isinstance(error, ClientError):
        return str(error.response.get("Error", {}).get("Code", "an unnamed error"))
    return type(error).__name__


def _range(start: int, end: int | None) -> dict[str, Any]:
    """An empty range asks for one byte, for S3 has no empty ones and a missing object must be found out."""
    if start == 0 and end is None:
        return {}
    return {"Range": f"bytes={start}-" if end is None else f"bytes={start}-{max(start, end - 1)}"}


def _encryption(location: S3Location) -> dict[str, Any]:
    extra = {"ServerSideEncryption": location.sse, "SSEKMSKeyId": location.kms_key_id}
    return {name: value for name, value in extra.items() if value is not None}


def _client(location: S3Location, config: Config) -> S3Client:
    try:
        return Session().client("s3", region_name=location.region, endpoint_url=location.endpoint_url, config=config)
    except (BotoCoreError, ValueError) as error:
        problem = type(error).__name__
        raise ConfigError(
            f"the S3 client cannot be set up ({problem}): check region and endpoint_url in LONGSHIFT_ARTIFACTS_URL"
            " and the AWS configuration (profile, region)"
        ) from None
