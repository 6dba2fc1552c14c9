"""Folders of files from which tests make images."""

from __future__ import annotations

import random
from pathlib import Path


def random_tree(root: Path, files: int, size: int) -> Path:
    """Files `00`, `01`, … of bytes that differ everywhere: a hole, or another chunk's bytes, cannot pass for them."""
    source = random.Random(3)
    for number in range(files):
        (root / f"{number:02}").write_bytes(source.randbytes(size))
    return root


def half_random_tree(root: Path, files: int, size: int, chunk: int) -> Path:
    """Files `00`, `01`, … of chunks, every second of which does not compress."""
    source = random.Random(2)
    for number in range(files):
        pieces = [
            source.randbytes(chunk) if index % 2 else source.randbytes(16) * (chunk // 16)
            for index in range(size // chunk)
        ]
        (root / f"{number:02}").write_bytes(b"".join(pieces))
    return root
