"""Random reads through the real mount, three ways each, against the truth of the oracle."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.daemon import Daemon
from tests.support.oracle import Image, fewer_images, truth

READS_PER_FILE = 40
READS_PER_FILE_OF_LARGER = 20
SMALLEST = 4096
"""Files of at least this size are read at random (the manifest test reads all others in one piece)."""


def read_direct(path: bytes, offset: int, length: int) -> bytes:
    """Past the page cache: the request reaches the daemon as it is."""
    return _read(path, os.O_RDONLY | os.O_DIRECT, offset, length)


def read_buffered(path: bytes, offset: int, length: int) -> bytes:
    """Through the page cache, emptied before: the kernel rounds to pages and reads ahead."""
    return _read(path, os.O_RDONLY, offset, length)


def read_mapped(path: bytes, offset: int, length: int) -> bytes:
    """By page faults."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapping:
            return mapping[offset : offset + length]
    finally:
        os.close(fd)


def _read(path: bytes, flags: int, offset: int, length: int) -> bytes:
    fd = os.open(path, flags)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)


def check_random_reads(path: bytes, content: bytes, reads: int) -> None:
    """Draw (offset, length) pairs, some past the end, and read each in all three ways."""
    near_pages = st.integers(0, len(content) // 4096).map(lambda page: page * 4096)
    offsets = st.integers(0, len(content) + 4096) | st.builds(
        lambda page, step: max(0, page + step), near_pages, st.integers(-2, 2)
    )
    lengths = st.integers(0, 300) | st.integers(0, 1 << 17) | st.integers(0, len(content) + 4096)

    @settings(max_examples=reads, database=None)
    @given(offsets, lengths)
    def check(offset: int, length: int) -> None:
        want = content[offset : offset + length]
        for read in (read_direct, read_buffered, read_mapped):
            have = read(path, offset, length)
            # comparing flags, not 100 KB literals: pytest would take minutes to explain the difference
            assert len(have) == len(want), f"{read.__name__}: {len(have)} bytes, must be {len(want)}"
            assert (have == want) is True, f"{read.__name__}: wrong byte at {first_difference(have, want)}"

    check()


def first_difference(have: bytes, want: bytes) -> int:
    return next(index for index, (a, b) in enumerate(zip(have, want, strict=True)) if a != b)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("image", fewer_images(), ids=lambda image: image.name)
def test_random_reads_match_the_oracle(image: Image, tmp_path: Path) -> None:
    contents = {path: content for path, content in truth(image.name).items() if len(content) >= SMALLEST}
    assert len(contents) >= 8
    reads = READS_PER_FILE_OF_LARGER if image.name.startswith("large:") else READS_PER_FILE
    with Daemon(image.bootstrap, image.blobs, cache=tmp_path / "cache") as daemon:
        for path, content in contents.items():
            check_random_reads(os.path.join(os.fsencode(daemon.mountpoint), path), content, reads)
