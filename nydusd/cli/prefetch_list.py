"""Reading the list named by `--prefetch-files`: one absolute path a line, blank lines skipped, blanks around it cut."""

from __future__ import annotations

import os
import stat
from typing import Final

from nydusd.errors import ConfigError

MAX_BYTES: Final = 16 << 20
"""Longest list: some 200,000 paths, more than the files of any usual image."""
MAX_PATH: Final = 4096


def read_prefetch_list(path: str) -> list[bytes]:
    """The paths of a list, as bytes like the names in an image. Raises `ConfigError` with the number of the wrong line."""
    try:
        # O_NONBLOCK: a named pipe must not hang the start.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ConfigError(f"--prefetch-files {path}: must be a regular file")
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a path"
        raise ConfigError(f"--prefetch-files {path}: cannot be read: {reason}") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"--prefetch-files {path}: has more than {MAX_BYTES} bytes")
    found = []
    for number, line in enumerate(data.split(b"\n"), 1):
        name = line.strip()
        if not name:
            continue
        if not name.startswith(b"/") or b"\0" in name or len(name) > MAX_PATH:
            rule = f"an absolute path of at most {MAX_PATH} bytes without NUL"
            raise ConfigError(f"--prefetch-files {path}: line {number} must be {rule}, but is {name[:64]!r}")
        found.append(name)
    return found
