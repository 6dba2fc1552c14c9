"""Which build this is: other code has another name.

`BUILT` is a hash of the sources and of the pinned libraries, which setup.py writes into what is installed (`make install`,
`make deb`, pipx). In a checkout it is empty, and names, sizes and times of the sources are hashed when a process begins: that
takes a millisecond or two, and no file is read for it. Imports next to nothing, for the stub is in the way of a daemon's start.
Nothing is kept anywhere, so a SIGKILL leaves nothing.
"""

from __future__ import annotations

import os

BUILT = ""

FILE = os.path.abspath(__file__)
_ROOT = os.path.dirname(os.path.dirname(FILE))
_PACKAGES = ("nydusd", "workers")
_first = ""
"""What the sources were when this process first looked."""


def on_disk() -> str:
    """Twelve hexadecimal digits, those of the build that a process started now would be. Raises OSError."""
    with open(FILE, encoding="utf-8") as file:
        built = file.read().partition('\nBUILT = "')[2].partition('"')[0]
    return built or _of_checkout()


def loaded() -> str:
    """Those of the build that this process is: asked when it begins, before the sources can have changed. Raises OSError."""
    return BUILT or _first or _of_checkout()


def _of_checkout() -> str:
    global _first
    from _blake2 import blake2b  # `hashlib` would load OpenSSL

    folders = [f"{_ROOT}/{name}" for name in _PACKAGES]
    rows = []
    for folder in folders:  # which grows meanwhile
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith(".py"):
                    status = entry.stat()
                    rows.append(f"{entry.path[len(_ROOT) :]} {status.st_size} {status.st_mtime_ns}")
                elif entry.name != "__pycache__" and entry.is_dir():
                    folders.append(entry.path)
    rows.sort()
    found = blake2b(os.fsencode("\n".join(rows)), digest_size=6).hexdigest()
    _first = _first or found
    return found
