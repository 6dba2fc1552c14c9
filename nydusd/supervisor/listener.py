"""The API's listening socket: bound by the supervisor, served by the API process, which may be replaced behind it."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

from nydusd.errors import NydusError


class Listener:
    """A unix stream socket with mode 0600 at `path`; a socket that is there already is replaced, anything else stays.

    Raises NydusError when it cannot be bound.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            if self._path.exists() and not stat.S_ISSOCK(self._path.stat().st_mode):
                raise OSError("it exists and is not a socket")
            self._path.unlink(missing_ok=True)
            self._socket.bind(path)
            self._socket.listen(128)
            self._inode = self._path.stat().st_ino
        except (OSError, ValueError) as e:
            self._socket.close()
            raise NydusError(f"--apisock {path}: {getattr(e, 'strerror', None) or e}") from e
        finally:
            os.umask(mask)

    @property
    def fd(self) -> int:
        return self._socket.fileno()

    def remove(self) -> None:
        """Stop listening and remove the socket, unless another daemon has bound its own there since."""
        self._socket.close()
        try:
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()
        except OSError:
            pass
