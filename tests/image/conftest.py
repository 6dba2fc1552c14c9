"""Trees to make images of: one with every kind of entry, and the tree that the packed images were made from."""

from __future__ import annotations

import os
import random
import socket
import stat
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support import manifest, oracle
from tests.support.manifest import Row


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What makes layouts differ: sizes around chunks and blocks, many names, links, devices, attributes, deep folders."""
    root = tmp_path_factory.mktemp("image") / "tree"
    root.mkdir()
    source = random.Random(1)
    for size in (0, 1, 15, 4095, 4096, 4097, 65536, 65537, 300_000):
        (root / f"random-{size}").write_bytes(source.randbytes(size))
        (root / f"text-{size}").write_bytes((b"the same again and again " * (size // 25 + 1))[:size])
    (root / "equal-chunks").write_bytes(bytes(200_000))
    with open(root / "sparse", "wb") as file:
        file.seek(2_000_000)
        file.write(b"end")
        file.truncate(3_000_000)
    os.link(root / "random-4097", root / "hard-link")
    os.symlink("random-1", root / "short-link")
    os.symlink("x" * 4090, root / "long-link")
    os.mkfifo(root / "fifo", 0o620)
    os.mknod(root / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mknod(root / "block", stat.S_IFBLK | 0o600, os.makedev(7, 300))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "socket"))
    many = root / "many"
    many.mkdir(0o1777)
    for number in range(300):
        (many / f"{number:04}-{'n' * (number % 200)}").write_bytes(b"%d" % number)
    os.link(root / "random-1", many / "link to another folder")
    (root / "-sorts before the dots").touch()
    (root / ("l" * 255)).mkdir()
    for depth in range(1, 41):
        root.joinpath(*[f"d{level}" for level in range(depth)]).mkdir()
    (root / os.fsdecode(b"bytes-\xff\xfe")).write_bytes(b"name that is no text")
    os.setxattr(root / "text-1", "user.note", b"\0value" * 30)
    os.setxattr(root / "text-1", "trusted.t", b"")
    os.setxattr(many, "user.folder", b"f")
    os.chown(root / "text-4096", 70_000, 3_000_000_000)
    os.chmod(root / "text-15", 0o6755)
    os.utime(root / "text-4095", ns=(1, 1_234_567_890_123_456_789))
    return root


@pytest.fixture(scope="session")
def expected(tree: Path) -> dict[str, Row]:
    """The manifest of `tree`."""
    return manifest.walk(tree)


@pytest.fixture(scope="session")
def small_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the packed images in tests/data were made from, made again from their manifest."""
    top = os.fsencode(tmp_path_factory.mktemp("small") / "tree")
    rows = manifest.load(oracle.SMALL / "manifest.jsonl")
    contents = oracle.truth("v6-none-sha256")
    links = [row for row in rows.values() if row.get("same_inode_as", row["path"]) != row["path"]]
    for row in [*(row for row in rows.values() if row not in links), *links]:
        _make(os.path.join(top, manifest.unescape(str(row["path"]))), row, top, contents)
    for row in reversed(rows.values()):
        path, time = os.path.normpath(os.path.join(top, manifest.unescape(str(row["path"])))), int(str(row["mtime_ns"]))
        os.utime(path, ns=(time, time), follow_symlinks=False)
    return Path(os.fsdecode(top))


def _make(path: bytes, row: Row, top: bytes, contents: Mapping[bytes, bytes]) -> None:
    path = os.path.normpath(path)
    mode = int(str(row["mode"]), 8)
    first = row.get("same_inode_as", row["path"])
    if first != row["path"]:
        os.link(os.path.join(top, manifest.unescape(str(first))), path, follow_symlinks=False)
        return
    if stat.S_ISDIR(mode):
        os.makedirs(path, exist_ok=True)
    elif stat.S_ISREG(mode):
        with open(path, "wb") as file:
            file.write(contents[manifest.unescape(str(row["path"]))])
    elif stat.S_ISLNK(mode):
        os.symlink(manifest.unescape(str(row["target"])), path)
    else:
        device = row.get("rdev", [0, 0])
        assert isinstance(device, list)
        os.mknod(path, mode, os.makedev(*device))
    os.chown(path, int(str(row["uid"])), int(str(row["gid"])), follow_symlinks=False)
    if not stat.S_ISLNK(mode):
        os.chmod(path, stat.S_IMODE(mode))
    xattrs = row.get("xattrs", {})
    assert isinstance(xattrs, dict)
    for name, value in xattrs.items():
        os.setxattr(path, name, bytes.fromhex(value), follow_symlinks=False)
