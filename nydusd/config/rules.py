"""The rules about values, checked on the v2 form after all types are right.

Runs in the process that loads a configuration. It looks at the file system for one rule only: a unix socket named by
`backend.http-proxy.addr` must exist. No message holds the value of a secret.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import re
import stat
from collections.abc import Iterator
from typing import Final

from nydusd.config.model import (
    MAX_BATCH_SIZE,
    MAX_THREADS,
    S3,
    Backend,
    Cache,
    Config,
    FileCache,
    HttpProxy,
    LocalDisk,
    LocalFs,
    Oss,
    Prefetch,
    Registry,
    Remote,
)
from nydusd.config.parse import BadKey

BACKEND_TYPES: Final = ("localdisk", "localfs", "oss", "s3", "registry", "http-proxy")
_FILE_CACHES: Final = ("blobcache", "filecache")
_CACHE_TYPES: Final = (*_FILE_CACHES, "fscache", "dummycache", "")
_HTTP_URL = re.compile(r"https?://[^/?#\s]+[^\s]*")


def check(config: Config) -> None:
    """Raise `BadKey` for the first rule that is broken."""
    if config.version != 2:
        raise BadKey("version", f"must be 2, but is {config.version}")
    if config.backend is not None:
        _check_backend(config.backend)
    _check_address("nydusd.metrics_listen", config.nydusd.metrics_listen)
    # Before the cache's prefetch table: a v1 text has only this one, and the message should speak of it.
    if config.rafs is not None:
        if config.rafs.mode not in ("direct", "cached"):
            raise BadKey("rafs.mode", f"must be direct or cached, but is {config.rafs.mode[:64]!r}")
        _check_batch("rafs.batch_size", config.rafs.batch_size)
        _check_prefetch("rafs.prefetch", config.rafs.prefetch)
    if config.cache is not None:
        _check_cache(config.cache)
    if config.overlay is not None:
        _not_empty("overlay.upper_dir", config.overlay.upper_dir)
        _not_empty("overlay.work_dir", config.overlay.work_dir)


def _check_address(path: str, address: str) -> None:
    """`IP:PORT` or nothing. No names: the supervisor, which binds it, must not wait for a name server."""
    host, _, port = address.rpartition(":")
    try:
        ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        known = port.isascii() and port.isdigit() and 0 < int(port) < 65536
    except ValueError:
        known = False
    if address and not known:
        raise BadKey(path, f"must be IP:PORT, like 127.0.0.1:9300 or [::1]:9300, but is {address[:64]!r}")


def warnings(config: Config) -> Iterator[str]:
    """What was accepted but does not do what it says."""
    if config.cache is not None and config.cache.compressed:
        yield "cache.compressed: ignored, the cache keeps uncompressed data"
    if config.rafs is not None and config.rafs.prefetch.stream_prefetch:
        yield "rafs.prefetch.stream_prefetch: ignored, prefetch reads chunks; use prefetch_all for the whole image"
    if config.overlay is not None:
        yield "overlay: ignored, images are mounted read-only"
    if config.external_backends:
        yield "external_backends: ignored, all blobs are read from `backend`"
    backend = config.backend.chosen() if config.backend is not None else None
    if isinstance(backend, Remote) and backend.proxy.dragonfly_scheduler_endpoint and config.backend is not None:
        path = f"backend.{config.backend.type}.proxy"
        instead = "requests go by the proxy" if backend.proxy.url else "and without a url no request goes by a proxy"
        yield f"{path}.dragonfly_scheduler_endpoint: not used, {instead}"


def check_auth(path: str, auth: str) -> None:
    """Raise `BadKey` unless `auth` is base64 of `user:password` (blank is allowed and means none)."""
    if not auth.strip():
        return
    try:
        decoded = base64.b64decode(auth.strip(), validate=True).decode()
    except ValueError:
        raise BadKey(path, "must be base64 of user:password, but is not base64 of UTF-8 text") from None
    if ":" not in decoded:
        raise BadKey(path, "must be base64 of user:password, but the decoded text has no colon")


def _check_backend(backend: Backend) -> None:
    if backend.type not in BACKEND_TYPES:
        raise BadKey("backend.type", f"must be one of {', '.join(BACKEND_TYPES)}, but is {backend.type[:64]!r}")
    path = f"backend.{backend.type}"
    table = backend.chosen()
    match table:
        case None:
            raise BadKey(path, f"is missing, it must be a table because backend.type is {backend.type}")
        case LocalDisk():
            _not_empty(f"{path}.device_path", table.device_path)
        case LocalFs():
            if not table.dir and not table.blob_file:
                raise BadKey(f"{path}.dir", "must not be empty, unless blob_file is set")
        case Oss():
            _not_empty(f"{path}.endpoint", table.endpoint)
            _not_empty(f"{path}.bucket_name", table.bucket_name)
        case S3():
            _not_empty(f"{path}.region", table.region)
            _not_empty(f"{path}.bucket_name", table.bucket_name)
        case Registry():
            _not_empty(f"{path}.host", table.host)
            _not_empty(f"{path}.repo", table.repo)
            check_auth(f"{path}.auth", table.auth or "")
        case HttpProxy():
            _check_addr(f"{path}.addr", table.addr)
    if isinstance(table, Remote):
        _check_remote(path, table)


def _check_remote(path: str, table: Remote) -> None:
    url = table.proxy.url  # as of the reference, its scheme may be left out
    _check_url(f"{path}.proxy.url", f"http://{url}" if url and "://" not in url else url)
    _check_url(f"{path}.proxy.ping_url", table.proxy.ping_url)
    for number, mirror in enumerate(table.mirrors):
        _not_empty(f"{path}.mirrors[{number}].host", mirror.host)
        _check_url(f"{path}.mirrors[{number}].ping_url", mirror.ping_url)


def _check_addr(path: str, addr: str) -> None:
    if not addr.startswith("/"):
        if not _HTTP_URL.fullmatch(addr):
            raise BadKey(path, "must be an http:// or https:// URL, or the absolute path of a unix socket")
        return
    try:
        is_socket = stat.S_ISSOCK(os.stat(addr).st_mode)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a path"
        raise BadKey(path, f"must be the path of an existing unix socket: {reason}") from None
    if not is_socket:
        raise BadKey(path, "must be the path of an existing unix socket, but is another kind of file")


def _check_cache(cache: Cache) -> None:
    if cache.type not in _CACHE_TYPES:
        allowed = ", ".join(name or "empty" for name in _CACHE_TYPES)
        raise BadKey("cache.type", f"must be one of {allowed}, but is {cache.type[:64]!r}")
    if cache.type in _FILE_CACHES:
        if cache.filecache is None:
            raise BadKey("cache.filecache", f"is missing, it must be a table because cache.type is {cache.type}")
        _check_file_cache(cache.filecache)
    if cache.type == "fscache":
        if cache.fscache is None:
            raise BadKey("cache.fscache", "is missing, it must be a table because cache.type is fscache")
        _not_empty("cache.fscache.work_dir", cache.fscache.work_dir)
    _check_prefetch("cache.prefetch", cache.prefetch)


def _check_file_cache(table: FileCache) -> None:
    path = "cache.filecache"
    _not_empty(f"{path}.work_dir", table.work_dir)
    if table.encryption_key and not re.fullmatch("[0-9a-fA-F]{64}", table.encryption_key):
        raise BadKey(f"{path}.encryption_key", "must be 64 hexadecimal digits")
    if table.enable_encryption:
        # Plain text must not be kept where cipher text was asked for, so this one cannot be a warning.
        raise BadKey(f"{path}.enable_encryption", "is not supported yet, it must be false")


def _check_prefetch(path: str, table: Prefetch) -> None:
    if not table.enable:
        return
    if not 1 <= table.threads <= MAX_THREADS:
        raise BadKey(f"{path}.threads", f"must be from 1 to {MAX_THREADS} when enabled, but is {table.threads}")
    _check_batch(f"{path}.batch_size", table.batch_size)


def _check_batch(path: str, size: int) -> None:
    if size > MAX_BATCH_SIZE:
        raise BadKey(path, f"must be at most {MAX_BATCH_SIZE} bytes, but is {size}")


def _check_url(path: str, url: str) -> None:
    if url and not _HTTP_URL.fullmatch(url):
        raise BadKey(path, "must be an http:// or https:// URL, or empty")


def _not_empty(path: str, value: str) -> None:
    if not value:
        raise BadKey(path, "must not be empty")
