"""Walks the tree below an inode of any bootstrap, in bounded time and memory, whatever the bytes say.

Pure; used to turn the entries of a prefetch list into files. Runs in whichever process plans the prefetch.
"""

from __future__ import annotations

from collections.abc import Iterator, Set

from nydusd.errors import FormatError
from nydusd.formats.model import NAME_LEAST, Bootstrap, DirEntry
from nydusd.formats.superblock import S_IFDIR, S_IFMT, S_IFREG

MAX_DEPTH = 2048
"""Deepest folder that a path of 4,096 bytes can name."""


def walk(bootstrap: Bootstrap, ino: int, limit: int, where: str = "bootstrap") -> Iterator[int]:
    """The regular files at or below `ino`, each once (hard links too), in the order of names, folders in place.

    At most `limit` directory entries are looked at. Raises `FormatError` when there are more, when a directory is
    reached twice (it would be its own ancestor, or have two parents), and below 2,048 levels; also what the bootstrap
    itself raises.
    """
    mode = bootstrap.inode(ino).mode
    if mode & S_IFMT != S_IFDIR:
        if mode & S_IFMT == S_IFREG:
            yield ino
        return
    directories = {ino}
    files: set[int] = set()
    open_directories: list[Iterator[DirEntry]] = [bootstrap.readdir(ino, 0)]
    while open_directories:
        entry = next(open_directories[-1], None)
        if entry is None:
            open_directories.pop()
            continue
        if entry.name in (b".", b".."):
            continue
        limit -= 1
        if limit < 0:
            raise FormatError(where, "tree", f"more entries below inode {ino} than expected")
        mode = bootstrap.inode(entry.ino).mode
        if mode & S_IFMT == S_IFDIR:
            if entry.ino in directories:
                raise FormatError(where, "tree", f"directory {entry.ino} ({entry.name!r}) is reached twice")
            if len(open_directories) >= MAX_DEPTH:
                raise FormatError(where, "tree", f"directory {entry.ino} is more than {MAX_DEPTH} levels deep")
            directories.add(entry.ino)
            open_directories.append(bootstrap.readdir(entry.ino, 0))
        elif mode & S_IFMT == S_IFREG and entry.ino not in files:
            files.add(entry.ino)
            yield entry.ino


def paths_of(bootstrap: Bootstrap, inodes: Set[int]) -> dict[int, bytes]:
    """A path from the root ("/usr/bin/env") for each of these inodes that is in the tree: the first in the walk's order.

    Ends as soon as all are found. Raises what `walk` raises.
    """
    limit = bootstrap.length // NAME_LEAST
    names: dict[int, bytes] = {}
    stack: list[tuple[bytes, Iterator[DirEntry]]] = [(b"/", bootstrap.readdir(bootstrap.root_ino, 0))]
    directories = {bootstrap.root_ino}
    while stack and len(names) < len(inodes):
        folder, entries = stack[-1]
        entry = next(entries, None)
        if entry is None:
            stack.pop()
            continue
        if entry.name in (b".", b".."):
            continue
        limit -= 1
        if limit < 0:
            raise FormatError("bootstrap", "tree", "more entries than there is room for: folders share them")
        if entry.ino in inodes:
            names.setdefault(entry.ino, folder + entry.name)
        if bootstrap.inode(entry.ino).mode & S_IFMT == S_IFDIR:
            if entry.ino in directories:
                raise FormatError("bootstrap", "tree", f"directory {entry.ino} ({entry.name!r}) is reached twice")
            if len(stack) >= MAX_DEPTH:
                raise FormatError("bootstrap", "tree", f"directory {entry.ino} is more than {MAX_DEPTH} levels deep")
            directories.add(entry.ino)
            stack.append((folder + entry.name + b"/", bootstrap.readdir(entry.ino, 0)))
    return names
