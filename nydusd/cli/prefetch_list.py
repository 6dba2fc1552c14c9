"""Reading the list named by `--prefetch-files`: one absolute path a line, blank lines skipped, blanks around it cut."""

from __future__ import annotations

from typing import Final

from nydusd.config.file import read_named_file
from nydusd.errors import ConfigError

MAX_BYTES: Final = 16 << 20
"""Longest list: some 200,000 paths, more than the files of any usual image."""
MAX_PATH: Final = 4096


def read_prefetch_list(path: str) -> list[bytes]:
    """The paths of a list, as bytes like the names in an image. Raises `ConfigError` with the number of the wrong line."""
    data = read_named_file(path, MAX_BYTES, f"--prefetch-files {path}")
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
