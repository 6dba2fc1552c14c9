"""Reading a file that an operator named: bounded, and never hanging on what is not a plain file."""

from __future__ import annotations

import os
import stat

from nydusd.errors import ConfigError


def read_named_file(path: str, limit: int, where: str) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises `ConfigError` that begins with `where`."""
    try:
        # O_NONBLOCK: a named pipe must not hang the start.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: cannot be read: {_reason(error)}") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ConfigError(f"{where}: must be a regular file")
        with open(fd, "rb", closefd=False) as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {_reason(error)}") from error
    finally:
        os.close(fd)
    if len(data) > limit:
        raise ConfigError(f"{where}: has more than {limit} bytes")
    return data


def _reason(error: OSError | ValueError) -> str:
    return str(error.strerror) if isinstance(error, OSError) else "not a path"
