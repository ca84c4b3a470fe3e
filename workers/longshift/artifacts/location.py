"""Where the cold tier is: a URL, understood once, without ever repeating it (it may hold what should not be shown)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from longshift.artifacts.local import LocalBackend
from longshift.artifacts.store import ArtifactStore, Backend, ThreadedStore, check_key
from longshift.errors import ConfigError, InvalidInput

Addressing = Literal["auto", "path", "virtual"]
Encryption = Literal["AES256", "aws:kms"]

_ADDRESSING: tuple[Addressing, ...] = ("auto", "path", "virtual")
_ENCRYPTION: tuple[Encryption, ...] = ("AES256", "aws:kms")
_OPTIONS = frozenset({"addressing", "endpoint_url", "kms_key_id", "region", "sse"})
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_REGION = re.compile(r"[a-z0-9-]{1,40}")
_FORMS = "LONGSHIFT_ARTIFACTS_URL is s3://bucket/prefix?region=...&endpoint_url=... or file:///dir"

W = TypeVar("W", bound=str)


@dataclass(frozen=True, slots=True)
class S3Location:
    """``s3://bucket/prefix?option=value``: where the objects are and how they are kept. Holds no credentials."""

    bucket: str
    prefix: str  # without slashes at its ends; may be empty
    region: str | None = None  # None: as the AWS configuration says
    endpoint_url: str | None = None  # another service that speaks S3
    addressing: Addressing = "auto"  # with an endpoint_url "path", which every such service understands
    sse: Encryption | None = None  # server-side encryption; None: as the bucket says
    kms_key_id: str | None = None


def open_store(
    url: str,
    *,
    threads: int = 16,
    connect_timeout: timedelta = timedelta(seconds=3),
    read_timeout: timedelta = timedelta(seconds=10),
    attempts: int = 3,
) -> ArtifactStore:
    """Open the cold tier; S3 is not contacted yet, a folder is created.

    ``threads`` bounds transfers and connections at a time; each transfer of an upload takes up to 5 MiB of memory.
    The timeouts are per network operation and ``attempts`` counts the first one: a store that hangs is ``Unavailable``
    after at most ``attempts * (connect_timeout + read_timeout)`` plus back-off. ``connect_timeout`` also bounds
    ``check``. Credentials come from where AWS tools look for them (environment, profile, role), never from the URL.

    Raises:
        ConfigError: ``url`` or the AWS configuration cannot be used.
    """
    parts = _split(url)
    if parts.scheme == "file":
        backend: Backend = LocalBackend(_folder(parts))
    else:
        location = _s3_location(parts)
        from longshift.artifacts.s3 import S3Backend  # 17 MB and 0.1 s that a local store does without

        backend = S3Backend(
            location,
            connections=threads + 1,  # one for the probe
            connect_timeout=connect_timeout,
            read_timeout=read_timeout,
            attempts=attempts,
        )
    return ThreadedStore(backend, threads=threads, probe_timeout=connect_timeout)


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ConfigError(_FORMS) from None
    if parts.scheme not in ("file", "s3") or parts.fragment:
        raise ConfigError(_FORMS)
    return parts


def _folder(parts: SplitResult) -> Path:
    folder = Path(unquote(parts.path))
    if parts.netloc not in ("", "localhost") or parts.query or not folder.is_absolute() or "\0" in str(folder):
        raise ConfigError(f"{_FORMS}; a folder is given by its absolute path, without options")
    return folder


def _s3_location(parts: SplitResult) -> S3Location:
    if "@" in parts.netloc:
        raise ConfigError(f"{_FORMS}; credentials do not belong into it: set AWS_ACCESS_KEY_ID and so on, or a role")
    if _BUCKET.fullmatch(parts.netloc) is None:
        raise ConfigError(f"{_FORMS}; a bucket's name has 3 to 63 of a-z, 0-9, '-', '.'")
    options = _options(parts.query)
    endpoint = _endpoint(options.get("endpoint_url"))
    region = options.get("region")
    if region is not None and _REGION.fullmatch(region) is None:
        raise ConfigError("LONGSHIFT_ARTIFACTS_URL: region is a name like eu-central-1")
    sse = options.get("sse")
    return S3Location(
        bucket=parts.netloc,
        prefix=_prefix(parts.path),
        region=region,
        endpoint_url=endpoint,
        addressing=_one_of("addressing", options.get("addressing", "path" if endpoint else "auto"), _ADDRESSING),
        sse=None if sse is None else _one_of("sse", sse, _ENCRYPTION),
        kms_key_id=options.get("kms_key_id"),
    )


def _prefix(path: str) -> str:
    prefix = unquote(path).strip("/")
    try:
        if prefix:
            check_key(prefix.lower())
    except InvalidInput:
        raise ConfigError(f"{_FORMS}; a prefix has parts of letters, digits, '.', '_', '-'") from None
    return prefix


def _options(query: str) -> Mapping[str, str]:
    pairs = parse_qsl(query, keep_blank_values=True)
    options = dict(pairs)
    if len(options) != len(pairs) or not _OPTIONS.issuperset(options) or not all(options.values()):
        raise ConfigError(
            f"LONGSHIFT_ARTIFACTS_URL: each of {', '.join(sorted(_OPTIONS))} once, with a value, nothing else"
        )
    if "kms_key_id" in options and options.get("sse") != "aws:kms":
        raise ConfigError("LONGSHIFT_ARTIFACTS_URL: kms_key_id needs sse=aws:kms")
    return options


def _endpoint(url: str | None) -> str | None:
    if url is None:
        return None
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError("LONGSHIFT_ARTIFACTS_URL: endpoint_url is http(s)://host:port, without credentials")
    return url


def _one_of(name: str, value: str, allowed: tuple[W, ...]) -> W:
    if value not in allowed:
        raise ConfigError(f"LONGSHIFT_ARTIFACTS_URL: {name} is one of {', '.join(allowed)}")
    return value
