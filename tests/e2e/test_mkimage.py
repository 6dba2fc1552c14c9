"""Images of our own small builder: read back by the kernel's EROFS and by the daemon, both give the source tree."""

from __future__ import annotations

import os
import random
import stat
from pathlib import Path

import pytest

from bench.erofs import erofs_mount
from bench.mkimage import build
from tests.support import manifest
from tests.support.daemon import Daemon


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with what makes layouts differ: sizes around chunks and blocks, many names, links, devices, attributes."""
    root = tmp_path / "tree"
    root.mkdir()
    source = random.Random(1)
    for size in (0, 1, 4095, 4096, 4097, 65536, 65537, 300_000):
        (root / f"random-{size}").write_bytes(source.randbytes(size))
        (root / f"text-{size}").write_bytes((b"the same again and again " * (size // 25 + 1))[:size])
    (root / "equal-chunks").write_bytes(bytes(200_000))
    os.link(root / "random-4097", root / "hard-link")
    os.symlink("random-1", root / "short-link")
    os.symlink("x" * 4090, root / "long-link")
    os.mkfifo(root / "fifo", 0o620)
    os.mknod(root / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    many = root / "many"
    many.mkdir(0o1777)
    for number in range(700):
        (many / f"{number:04}-{'n' * (number % 200)}").write_bytes(b"%d" % number)
    (root / "-sorts before the dots").touch()
    (root / ("l" * 255)).mkdir()
    for depth in range(1, 41):
        root.joinpath(*[f"d{level}" for level in range(depth)]).mkdir()
    os.fsencode(root)
    (root / os.fsdecode(b"bytes-\xff\xfe")).write_bytes(b"name that is no text")
    os.setxattr(root / "text-1", "user.note", b"\0value" * 30)
    os.setxattr(root / "text-1", "trusted.t", b"")
    os.setxattr(many, "user.folder", b"f")
    os.chown(root / "text-4096", 70_000, 3_000_000_000)
    os.utime(root / "text-4095", ns=(1, 1_234_567_890_123_456_789))
    return root


@pytest.mark.parametrize("chunk_size", [4096, 65536, 1 << 20])
def test_kernel_and_daemon_read_back_the_source_tree(tree: Path, tmp_path: Path, chunk_size: int) -> None:
    expected = manifest.walk(tree)
    built = build(tree, tmp_path / "image", chunk_size, plain=tmp_path / "plain")
    point = tmp_path / "mnt"
    point.mkdir()
    with erofs_mount(built.bootstrap, [tmp_path / "plain" / f"{built.blob.name}.blob.data"], point):
        assert manifest.differences(expected, manifest.walk(point)) == []
    with Daemon(built.bootstrap, built.blob.parent) as daemon:
        assert manifest.differences(expected, manifest.walk(daemon.mountpoint)) == []


def test_tree_without_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    with pytest.raises(ValueError, match="no file with content"):
        build(tmp_path / "tree", tmp_path / "image")


@pytest.mark.parametrize("chunk_size", [0, 2048, 5000, 32 << 20])
def test_impossible_chunk_size_is_refused(tmp_path: Path, chunk_size: int) -> None:
    with pytest.raises(ValueError, match="power of two from 4096 to 16 MiB"):
        build(tmp_path, tmp_path / "image", chunk_size)
