"""Addresses of hosts, as the system knows them, with the last good ones for when it does not. Run by fetch workers.

The system's resolver is asked for each new connection: connections are kept, so that is seldom, and changes are seen.
Its own time-outs apply (resolv.conf), nothing here can cut them short.
"""

from __future__ import annotations

import logging
import socket
import time
from typing import Final, TypeVar

log = logging.getLogger(__name__)

NEGATIVE_SECONDS: Final = 1.0
"""How long a failed look-up is not repeated."""
_MAX_HOSTS: Final = 64
_MAX_ADDRESSES: Final = 8

Key = tuple[str, int]
V = TypeVar("V")
Address = tuple[socket.AddressFamily, tuple[str, int]]


class Resolver:
    """Looks up hosts for one process."""

    def __init__(self) -> None:
        self._good: dict[Key, list[Address]] = {}
        self._bad: dict[Key, tuple[float, socket.gaierror]] = {}

    def addresses(self, host: str, port: int) -> list[Address]:
        """The addresses to try, best first, at least one. Raises `socket.gaierror` if there never were any."""
        key = (host, port)
        until, error = self._bad.get(key, (0.0, socket.gaierror()))
        if time.monotonic() >= until:
            try:
                return self._look_up(key)
            except UnicodeError:
                raise socket.gaierror(socket.EAI_NONAME, "not a host name") from None
            except socket.gaierror as failed:
                error = failed
                self._remember(self._bad, key, (time.monotonic() + NEGATIVE_SECONDS, failed))
                if key in self._good:
                    log.warning("%s: look-up failed (%s), using the last address known", host, failed.strerror)
        if key in self._good:
            return self._good[key]
        raise error

    def _look_up(self, key: Key) -> list[Address]:
        host, port = key
        found: list[Address] = []
        for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            entry = (family, address)
            if family in (socket.AF_INET, socket.AF_INET6) and entry not in found:
                found.append(entry)  # type: ignore[arg-type]  # addresses of IPv6 have two more fields
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "no address")
        del found[_MAX_ADDRESSES:]
        self._remember(self._good, key, found)
        self._bad.pop(key, None)
        return found

    @staticmethod
    def _remember(table: dict[Key, V], key: Key, value: V) -> None:
        table[key] = value
        if len(table) > _MAX_HOSTS:
            del table[next(iter(table))]
