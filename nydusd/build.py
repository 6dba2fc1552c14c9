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
    if not FILE.endswith(".py"):  # installed without sources
        return loaded()
    with open(FILE, encoding="utf-8", errors="replace") as file:
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
        for entry in _entries(folder):
            if entry.name.endswith(".py"):
                rows.append(f"{entry.path[len(_ROOT) :]} {_facts(entry)}")
            elif entry.name != "__pycache__" and entry.is_dir():
                folders.append(entry.path)
    rows.sort()
    found = blake2b(os.fsencode("\n".join(rows)), digest_size=6).hexdigest()
    _first = _first or found
    return found


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:  # it is being replaced
        return []


def _facts(entry: os.DirEntry[str]) -> str:
    try:
        status = entry.stat()
    except FileNotFoundError:  # it is being replaced, or is the dangling link by which an editor locks a file
        return "gone"
    return f"{status.st_size} {status.st_mtime_ns}"
