"""Listening sockets: bound by the supervisor, served by another process, which may be replaced behind them."""

from __future__ import annotations

import logging
import os
import socket
import stat
import struct
from pathlib import Path
from typing import Self

from nydusd.errors import NydusError
from nydusd.storage.state.lock import start_time

log = logging.getLogger(__name__)


class Listener:
    """A unix stream socket with mode 0600 at `path`; a socket that is there already is replaced, anything else stays.

    Raises NydusError, which names the `option`, when it cannot be bound.
    """

    def __init__(self, path: str, option: str = "--apisock") -> None:
        self._path = Path(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            if self._path.exists() and not stat.S_ISSOCK(self._path.stat().st_mode):
                raise OSError("it exists and is not a socket")
            _warn_of_listener(path, option)
            self._path.unlink(missing_ok=True)
            self._socket.bind(path)
            self._socket.listen(128)
            self.inode = self._path.stat().st_ino
        except FileNotFoundError as e:
            self._socket.close()
            raise NydusError(f"{option} {path}: its folder does not exist") from e
        except (OSError, ValueError) as e:
            self._socket.close()
            raise NydusError(f"{option} {path}: {getattr(e, 'strerror', None) or e}") from e
        finally:
            os.umask(mask)

    @classmethod
    def adopt(cls, fd: int, path: str, inode: int) -> Self | None:
        """The socket that a daemon which was killed had bound there, as `fd`, which is ours; None if its name is gone."""
        adopted = cls.__new__(cls)
        adopted._path, adopted._socket, adopted.inode = Path(path), socket.socket(fileno=fd), inode
        try:
            if adopted._path.stat().st_ino == inode:
                return adopted
        except OSError:
            pass
        adopted._socket.close()
        return None

    def fileno(self) -> int:
        return self._socket.fileno()

    def accept(self) -> socket.socket:
        """Who has connected. Raises OSError."""
        return self._socket.accept()[0]

    def remove(self) -> None:
        """Stop listening and remove the socket, unless another daemon has bound its own there since."""
        self._socket.close()
        try:
            if self._path.stat().st_ino == self.inode:
                self._path.unlink()
        except OSError:
            pass


def _warn_of_listener(path: str, option: str) -> None:
    """Say who loses the socket: a process that lives, not a daemon that was killed, whose API process may answer still."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as line:
        try:
            line.connect(path)
            pid, _, _ = struct.unpack("3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        except OSError:
            return
    if pid not in (0, os.getpid()) and start_time(pid) > 0:
        log.warning("%s %s: process %d listens there, and cannot be reached by it any more", option, path, pid)


def metrics_socket(address: str) -> socket.socket | None:
    """A TCP socket that listens at `IP:PORT`, None for "". One that cannot be had is logged: no mount fails by that."""
    if not address:
        return None
    host, _, port = address.rpartition(":")
    try:
        sock = socket.socket(socket.AF_INET6 if host.startswith("[") else socket.AF_INET, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host.strip("[]"), int(port)))
            sock.listen(64)
        except BaseException:
            sock.close()
            raise
    except OSError as e:
        log.warning("nydusd.metrics_listen %s: %s; no metrics are served there", address, e.strerror or e)
        return None
    return sock
