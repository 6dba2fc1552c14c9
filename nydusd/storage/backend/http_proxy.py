"""Blobs that a server near by gives by their ids, over TCP or a unix socket. Run by fetch workers."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from urllib.parse import SplitResult, quote, unquote, urlsplit

from nydusd.config.model import HttpProxy
from nydusd.errors import ConfigError
from nydusd.storage.backend.http.base import HttpBackend
from nydusd.storage.backend.http.store import SharedStore
from nydusd.storage.backend.table import read_table, with_store

_SAFE_IN_PATH = "/%:@!$&'()*+,;=-._~"


class HttpProxyBackend(HttpBackend):
    """Blob `<id>` is `addr`/`path`/`<id>` where `addr` is an URL.

    Where `addr` is the path of a unix socket, it is `/path/<id>` there if there is a `path`; else the socket serves
    one blob only, and that is `/`.
    """

    def __init__(self, table: HttpProxy, store: SharedStore) -> None:
        is_socket = table.addr.startswith("/")
        if "\0" in table.addr:
            raise ConfigError("backend http-proxy: 'addr' has a zero byte")
        parts = _parts("http://localhost" if is_socket else table.addr)
        path = quote("/".join(part for part in table.path.split("/") if part), safe=_SAFE_IN_PATH)
        if any(part in (".", "..") for part in path.split("/")):
            raise ConfigError(f"backend http-proxy: 'path' is {table.path[:300]!r}; a part . or .. is not allowed")
        super().__init__("http-proxy", table, store, table.addr if is_socket else "")
        self._prefix = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}/"
        if path:
            self._prefix += f"{path}/"
        self._one_blob = is_socket and not table.path
        self._authorization = ""
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._authorization = f"Basic {base64.b64encode(pair.encode()).decode()}"

    @classmethod
    def from_config(cls, config: Mapping[str, object], shared_fd: int = -1) -> HttpProxyBackend:
        """Take the table `backend.http-proxy` in its plain form. Raises `ConfigError`."""
        table = read_table("http-proxy", config, HttpProxy)
        return with_store(lambda store: cls(table, store), shared_fd)

    def blob_url(self, blob_id: str) -> str:
        return self._prefix if self._one_blob else self._prefix + blob_id

    def authorize(self, method: str, url: str, headers: dict[str, str]) -> None:
        if self._authorization:
            headers["Authorization"] = self._authorization


def _parts(addr: str) -> SplitResult:
    """The parts of an URL that has no query. Raises `ConfigError`, without the value: it may hold a password."""
    try:
        parts = urlsplit(addr)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) and addr.isprintable()
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment or " " in addr:
        raise ConfigError(
            "backend http-proxy: 'addr' is neither an http:// or https:// URL without a query "
            "nor the absolute path of a unix socket"
        )
    return parts
