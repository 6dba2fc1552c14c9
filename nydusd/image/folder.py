"""Reads a folder of the host into a tree of nodes. Runs in the process of the command; file contents are not read here."""

from __future__ import annotations

import errno
import os
import stat

from nydusd.image.errors import ImageError, SourceError
from nydusd.image.node import Node
from nydusd.image.whiteout import Whiteouts, drops

_NO_XATTRS = (errno.ENOTSUP, errno.EOPNOTSUPP)


def scan(top: bytes, *, owners: bool, whiteouts: Whiteouts) -> Node:
    """The tree of the folder `top`; names of one inode (hard links) share a node.

    `owners` False leaves user and group 0. Marks of removed files are left out as `whiteouts` says: they mean something
    in a layer only. The root's mtime is 0, because it is that of whoever made the folder. Raises `SourceError`.
    """
    try:
        if not stat.S_ISDIR(os.stat(top).st_mode):
            raise ImageError(f"{os.fsdecode(top)}: must be a folder")
        info = os.stat(top)
    except OSError as error:
        raise ImageError(f"{os.fsdecode(top)}: {error.strerror}") from error
    seen: dict[tuple[int, int], Node] = {}
    root = _node(top, b"", None, info, owners)
    root.mtime = root.mtime_ns = 0
    todo = [(root, top)]
    while todo:
        folder, path = todo.pop()
        for name in _listing(path, folder):
            place = path + b"/" + name
            try:
                info = os.lstat(place)
            except OSError as error:
                raise SourceError(_shown(folder, name), f"cannot be looked at: {error.strerror}") from error
            links = info.st_nlink > 1 and not stat.S_ISDIR(info.st_mode)
            known = seen.get((info.st_dev, info.st_ino)) if links else None
            node = known or _node(place, name, folder, info, owners)
            if whiteouts is not Whiteouts.NONE and drops(whiteouts, name, node):
                continue
            folder.children[name] = node
            if links:
                seen[info.st_dev, info.st_ino] = node
            elif node.is_folder:
                todo.append((node, place))
    return root


def _shown(folder: Node, name: bytes) -> bytes:
    return folder.path + b"/" + name if folder.parent is not None else name


def _listing(path: bytes, folder: Node) -> list[bytes]:
    try:
        return sorted(os.listdir(path))
    except OSError as error:
        raise SourceError(folder.path or b"/", f"the folder cannot be listed: {error.strerror}") from error


def _node(path: bytes, name: bytes, folder: Node | None, info: os.stat_result, owners: bool) -> Node:
    mtime, mtime_ns = divmod(info.st_mtime_ns, 1_000_000_000)
    node = Node(
        name,
        folder,
        info.st_mode,
        uid=info.st_uid if owners else 0,
        gid=info.st_gid if owners else 0,
        mtime=mtime,
        mtime_ns=mtime_ns,
    )
    try:
        listed = os.listxattr(path, follow_symlinks=False)
        if listed:
            node.xattrs = {os.fsencode(key): os.getxattr(path, key, follow_symlinks=False) for key in listed}
    except OSError as error:
        if error.errno not in _NO_XATTRS:
            raise SourceError(node.path or b"/", f"its attributes cannot be read: {error.strerror}") from error
    if node.is_file:
        node.size = info.st_size
    elif node.is_symlink:
        try:
            node.target = os.readlink(path)
        except OSError as error:
            raise SourceError(node.path, f"the symlink cannot be read: {error.strerror}") from error
    elif stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode):
        node.rdev = info.st_rdev
    return node
