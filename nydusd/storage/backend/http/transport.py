"""Sends one HTTP request and gives the answer with its body still on the wire. Run by fetch workers.

urllib3 makes and keeps the connections; redirects, retries and decoding are switched off. Two things are ours: every
wait (connect, each receive of headers and body) ends at the deadline of the request, and the body is received by the
kernel's copy straight into the caller's buffer: `http.client.HTTPResponse.readinto` on a buffered reader hands long
reads on to `recv_into`. A connection that fails in mid-body looks like its end, so what came before is not lost.
"""

from __future__ import annotations

import http.client
import io
import logging
import socket
import ssl
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Final

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    LocationParseError,
    LocationValueError,
    NameResolutionError,
    NewConnectionError,
    ProxyError,
    SSLError,
)

from nydusd.errors import ConfigError
from nydusd.redact import redact_url, user_info
from nydusd.storage.backend.http.answer import Answer
from nydusd.storage.backend.http.exchange import Exchange
from nydusd.storage.backend.http.failure import Failure, Kind
from nydusd.storage.backend.http.resolver import Resolver

if TYPE_CHECKING:
    from urllib3.poolmanager import PoolManager

# Its lines quote whole URLs, and a redirect's query is a credential.
logging.getLogger("urllib3").setLevel(logging.ERROR)

MAX_HOSTS: Final = 8
"""Connections kept at most, one a host: a worker sends one request at a time."""
_BUFFER: Final = 16 << 10


class _Source(io.RawIOBase):
    """What comes out of a socket, each receive within the exchange's limits; an error in a body reads as its end."""

    def __init__(self, sock: socket.socket, exchange: Exchange) -> None:
        self._sock = sock
        self._file = sock.makefile("rb", buffering=0)
        self._exchange = exchange

    def readable(self) -> bool:
        return True

    def readinto(self, buf: memoryview) -> int | None:  # type: ignore[override]
        if self._exchange.in_body and self._exchange.error is not None:
            return 0
        try:
            self._sock.settimeout(self._exchange.limit(self._exchange.for_data))
            return self._file.readinto(buf)
        except OSError as error:
            if not self._exchange.in_body:
                raise
            self._exchange.error = error
            return 0

    def close(self) -> None:
        self._file.close()
        super().close()


class _Mixin:
    """A connection that connects by our resolver and receives by our exchange."""

    exchange: ClassVar[Exchange]
    resolver: ClassVar[Resolver]
    unix_socket: ClassVar[str]

    def _raw_response(self, sock: socket.socket, *args: object, **named: object) -> http.client.HTTPResponse:
        raw = http.client.HTTPResponse(sock, *args, **named)  # type: ignore[arg-type]
        raw.fp.close()
        raw.fp = io.BufferedReader(_Source(sock, self.exchange), _BUFFER)
        self.exchange.raw = raw
        return raw

    def open_socket(self, host: str, port: int) -> socket.socket:
        """Connect to the first address that accepts."""
        if self.unix_socket:
            return _connect(socket.AF_UNIX, self.unix_socket, self.exchange)
        failed: OSError = OSError("no address")
        for family, address in self.resolver.addresses(host, port):
            try:
                sock = _connect(family, address, self.exchange)
            except OSError as error:
                failed = error
                continue
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        raise failed


def _connect(family: socket.AddressFamily, address: str | tuple[str, int], exchange: Exchange) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(exchange.limit(exchange.for_connection))
        sock.connect(address)
    except OSError:
        sock.close()
        raise
    return sock


class Transport:
    """The connections of one backend in one process. `proxy_url` is for requests that are sent with `proxied`.

    `timeout` limits each wait for the server, `connect_timeout` each wait for a connection (seconds, 0: no limit but
    the deadline). Raises `ConfigError` for CA files or a proxy URL that cannot be used.
    """

    def __init__(
        self,
        *,
        timeout: float,
        connect_timeout: float,
        skip_verify: bool = False,
        ca_cert_files: tuple[str, ...] = (),
        proxy_url: str = "",
        unix_socket: str = "",
    ) -> None:
        self.in_flight = ""
        self._exchange = Exchange(for_connection=connect_timeout or None, for_data=timeout or None)
        self._skip_verify = skip_verify
        self._ca_files = ca_cert_files
        self._context: ssl.SSLContext | None = None
        # Clients write it with or without a scheme.
        self._proxy_url = proxy_url if "://" in proxy_url or not proxy_url else f"http://{proxy_url}"
        self._classes = _pool_classes(self._exchange, Resolver(), unix_socket)
        self._managers: dict[bool, PoolManager] = {}
        if ca_cert_files and not skip_verify:
            self._tls()

    def send(
        self,
        method: str,
        url: str,
        headers: dict[str, str],
        deadline: float,
        *,
        body: bytes | None = None,
        proxied: bool = False,
    ) -> Answer:
        """Send a request and wait for the headers of the answer, whatever its status. Raises `Failure`.

        A deadline that is over, or too soon for any server, is not held against the host.

        The answer must be finished before the next request to the same host, else that takes a new connection.
        """
        host = host_of(url)
        exchange = self._exchange
        exchange.begun, exchange.deadline = time.monotonic(), deadline
        exchange.in_body, exchange.error = False, None
        if exchange.over():
            raise Failure(Kind.DEADLINE, host, "no time left to ask it")
        self.in_flight = host
        try:
            response = self._manager(proxied, url).urlopen(
                method,
                url,
                headers=headers,
                body=body,
                retries=False,
                redirect=False,
                preload_content=False,
                decode_content=False,
                timeout=urllib3.Timeout(
                    connect=exchange.limit(exchange.for_connection), read=exchange.limit(exchange.for_data)
                ),
            )
        except (HTTPError, OSError, http.client.HTTPException, ValueError) as error:
            raise self._failure(error, host, proxied) from error
        finally:
            self.in_flight = ""
        exchange.in_body = True
        assert exchange.raw is not None
        return Answer(response, exchange.raw, url, host, exchange)

    def open_connections(self) -> dict[str, int]:
        """How many connections are kept open to each host; the one of a request under way is not among them."""
        found: dict[str, int] = {}
        for pool in self._pools():
            kept = list(pool.pool.queue) if pool.pool is not None else []
            number = sum(1 for each in kept if each is not None and not each.is_closed)
            if number:
                found[f"{pool.host}:{pool.port}"] = number
        return found

    def close(self) -> None:
        """Close all connections."""
        for pool in self._pools():
            pool.close()
        self._managers.clear()

    def _pools(self) -> Iterator[urllib3.HTTPConnectionPool]:
        for manager in self._managers.values():
            for key in manager.pools.keys():  # noqa: SIM118  (it cannot be iterated itself)
                pool = manager.pools.get(key)
                if pool is not None:
                    yield pool

    def _manager(self, proxied: bool, url: str) -> PoolManager:
        manager = self._managers.get(proxied)
        if manager is None:
            manager = self._new_manager(proxied)
            manager.pool_classes_by_scheme = self._classes
            self._managers[proxied] = manager
        if url.startswith("https:") and "ssl_context" not in manager.connection_pool_kw:
            manager.connection_pool_kw["ssl_context"] = self._tls()
        return manager

    def _new_manager(self, proxied: bool) -> PoolManager:
        if not proxied:
            return urllib3.PoolManager(MAX_HOSTS, maxsize=1)
        secret = user_info(self._proxy_url)
        headers = urllib3.make_headers(proxy_basic_auth=secret) if secret else None
        context = self._tls() if self._proxy_url.startswith("https:") else None
        return urllib3.ProxyManager(
            redact_url(self._proxy_url), MAX_HOSTS, maxsize=1, proxy_headers=headers, proxy_ssl_context=context
        )

    def _tls(self) -> ssl.SSLContext:
        if self._context is None:
            context = ssl.create_default_context()
            for path in self._ca_files:
                try:
                    context.load_verify_locations(cafile=path)
                except (OSError, ValueError) as error:
                    raise ConfigError(f"ca_cert_files: {path}: no certificates in PEM form ({error})") from error
            if self._skip_verify:
                # It is what the configuration says; urllib3 would warn at each request.
                urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            self._context = context
        return self._context

    def _failure(self, error: Exception, host: str, proxied: bool) -> Failure:
        """What an exception of urllib3 means. The text has no URL in it."""
        if self._exchange.over():
            return Failure(Kind.DEADLINE, host, "no time left for an answer", host_failed=self._exchange.was_fair())
        cause: BaseException = error
        if isinstance(error, ProxyError):
            cause = error.original_error
        if isinstance(cause, LocationParseError | LocationValueError | http.client.InvalidURL):
            return Failure(Kind.PERMANENT, host, "the URL cannot be used")
        where = "by the proxy" if proxied else "to it"
        tls = _cause(cause, ssl.SSLError)
        if isinstance(tls, ssl.SSLCertVerificationError):
            return Failure(
                Kind.PERMANENT, host, f"its certificate is not trusted: {tls.verify_message}", tls_or_refused=True
            )
        if isinstance(cause, SSLError) or tls is not None:
            what = f"TLS failed: {getattr(tls, 'reason', None) or type(cause).__name__}"
            return Failure(Kind.TRANSIENT, host, what, tls_or_refused=True, host_failed=True)
        if isinstance(cause, NameResolutionError):
            return Failure(Kind.TRANSIENT, host, "its name cannot be looked up", host_failed=True)
        refused = _cause(cause, ConnectionRefusedError) is not None
        if isinstance(cause, NewConnectionError):
            return Failure(
                Kind.TRANSIENT,
                host,
                f"no connection {where} ({_text(cause)})",
                tls_or_refused=refused,
                host_failed=True,
            )
        if isinstance(cause, ConnectTimeoutError):
            return Failure(Kind.TRANSIENT, host, f"no connection {where} in time", host_failed=True)
        if isinstance(cause, urllib3.exceptions.TimeoutError | TimeoutError):
            return Failure(Kind.TRANSIENT, host, "no answer in time", host_failed=True, slow=True)
        if isinstance(cause, ValueError) and not isinstance(cause, UnicodeError | HTTPError):
            return Failure(Kind.PERMANENT, host, "the request cannot be written (header or URL)")
        return Failure(Kind.TRANSIENT, host, f"the connection broke ({_text(cause)})", host_failed=True)


def host_of(url: str) -> str:
    """`host:port` or `host` of an URL, as messages name it: without user-info, path and query."""
    return url.partition("://")[2].partition("/")[0].partition("?")[0].rpartition("@")[2][:255]


def _cause(error: BaseException | None, wanted: type[OSError]) -> OSError | None:
    """The first error of a type among the causes of another."""
    for _ in range(8):
        if error is None or isinstance(error, wanted):
            return error
        inner = error.args[-1] if error.args and isinstance(error.args[-1], BaseException) else None
        error = inner or error.__cause__ or error.__context__
    return None


def _text(error: BaseException) -> str:
    found = _cause(error, OSError)
    return (found.strerror or type(found).__name__) if found is not None else type(error).__name__


def _pool_classes(
    shared_exchange: Exchange, shared_resolver: Resolver, socket_path: str
) -> dict[str, type[urllib3.HTTPConnectionPool]]:
    """The classes that urllib3 is to make its pools and connections of, bound to one transport."""

    class Plain(_Mixin, HTTPConnection):
        exchange = shared_exchange
        resolver = shared_resolver
        unix_socket = socket_path

        def _new_conn(self) -> socket.socket:
            # The documented place to make the socket differently.
            self.response_class = self._raw_response  # type: ignore[assignment]
            try:
                return self.open_socket(self.host, self.port)
            except socket.gaierror as error:
                raise NameResolutionError(self.host, self, error) from error
            except TimeoutError as error:
                raise ConnectTimeoutError(self, "connect") from error
            except OSError as error:
                raise NewConnectionError(self, "connect") from error

    class Secure(Plain, HTTPSConnection):
        pass

    class PlainPool(urllib3.HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(urllib3.HTTPSConnectionPool):
        ConnectionCls = Secure

    return {"http": PlainPool, "https": SecurePool}
