"""Manifests: what a reader of a mount must see, one row an entry, and the walk that computes the same from a tree.

A row has `path` (relative, escaped so that any byte string fits into JSON), `mode` (octal, with the file type), `uid`,
`gid`, `mtime_ns`; `nlink` unless a folder; `size` and `sha256` of regular files; `target` of symlinks; `rdev` of devices;
`same_inode_as` (first path of the inode) of hard links; `xattrs` (values in hex).
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path

Row = dict[str, object]


def escape(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape").encode("unicode_escape").decode("ascii")


def unescape(text: str) -> bytes:
    return text.encode("ascii").decode("unicode_escape").encode("utf-8", "surrogateescape")


def load(path: Path) -> dict[str, Row]:
    """The rows of a manifest file by their (escaped) path."""
    rows: dict[str, Row] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        rows[row["path"]] = row
    return rows


def walk(root: Path) -> dict[str, Row]:
    """The rows of a tree by their (escaped) path. Reads every file to its end."""
    top = os.fsencode(root)
    rows: dict[str, Row] = {}
    first_path: dict[int, str] = {}
    for folder, folders, files in os.walk(top, onerror=_raise):
        names = sorted(folders + files)
        for path in ([top] if folder == top else []) + [os.path.join(folder, name) for name in names]:
            row = _row(path, escape(os.path.relpath(path, top)), first_path)
            rows[str(row["path"])] = row
    return rows


def _raise(error: OSError) -> None:
    raise error


def _row(path: bytes, name: str, first_path: dict[int, str]) -> Row:
    info = os.lstat(path)
    row: Row = {
        "path": name,
        "mode": oct(info.st_mode),
        "uid": info.st_uid,
        "gid": info.st_gid,
        "mtime_ns": info.st_mtime_ns,
    }
    if not stat.S_ISDIR(info.st_mode):
        row["nlink"] = info.st_nlink
        if info.st_nlink > 1:
            row["same_inode_as"] = first_path.setdefault(info.st_ino, name)
    if stat.S_ISREG(info.st_mode):
        row["size"] = info.st_size
        with open(path, "rb") as file:
            row["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    elif stat.S_ISLNK(info.st_mode):
        row["target"] = escape(os.readlink(path))
    elif stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode):
        row["rdev"] = [os.major(info.st_rdev), os.minor(info.st_rdev)]
    names = os.listxattr(path, follow_symlinks=False)
    if names:
        row["xattrs"] = {name: os.getxattr(path, name, follow_symlinks=False).hex() for name in sorted(names)}
    return row


def differences(expected: dict[str, Row], seen: dict[str, Row]) -> list[str]:
    """Sentences about every row that differs. The root's mtime is the time of the build and does not count."""
    found = [f"missing: {path}" for path in sorted(expected.keys() - seen.keys())]
    found += [f"not in the manifest: {path}" for path in sorted(seen.keys() - expected.keys())]
    for path in sorted(expected.keys() & seen.keys()):
        want, have = expected[path], seen[path]
        for key in sorted(want.keys() | have.keys()):
            if (path, key) != (".", "mtime_ns") and want.get(key) != have.get(key):
                found.append(f"{path}: {key} is {have.get(key)!r}, must be {want.get(key)!r}")
    return found
