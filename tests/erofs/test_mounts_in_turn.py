"""One cache file of one mount after the other: readers pass by what is said of the very file now."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from nydusd.errors import MountError
from nydusd.frontends.erofs import session
from nydusd.storage.api.io import ChunkRun
from nydusd.storage.state.names import remove
from nydusd.storage.state.segment import READY
from nydusd.supervisor.kernel_images import file_at
from tests.erofs.shared_file import ALL, FAILS, PASSES, Kernel


@pytest.mark.parametrize("births", [(1, 2), (1, 1), (None, None)])
def test_what_is_known_of_a_file_says_nothing_of_the_next_one_of_its_number(
    kernel: Kernel, births: tuple[int | None, int | None]
) -> None:
    """Also if it is the same file: others may have taken something out of it while nobody had it mounted."""
    kernel.mount(1, 7, ready=ALL, birth=births[0])
    assert kernel.read(0) == [PASSES]
    kernel.umount(1)
    segment = kernel.mount(2, 9, birth=births[1])
    assert kernel.read(0) == [] and kernel.asked() == [ChunkRun(9, 0, 1)]
    segment.state[0] = READY
    assert kernel.answered(9) == [PASSES]


def test_a_mount_that_has_ended_and_is_not_forgotten_says_nothing_of_the_next_file_of_its_number(
    kernel: Kernel,
) -> None:
    kernel.mount(1, 7, ready=ALL, birth=1)
    assert kernel.read(0) == [PASSES]
    kernel.mount(2, 9, birth=2)
    assert kernel.read(0) == [] and kernel.asked() == [ChunkRun(9, 0, 1)]
    assert kernel.answered(9, errno.EIO) == [FAILS]


def test_what_is_cached_is_read_on_while_other_mounts_come_and_go(kernel: Kernel) -> None:
    """Its segment has lost its name: the cache file was deleted and made again, under the mount."""
    kernel.mount(1, 7, ready=ALL)
    assert kernel.read(0) == [PASSES]
    remove(kernel._names[1])
    kernel.mount(2, 9, lists=[])
    assert kernel.read(0) == [PASSES]
    kernel.umount(2)
    assert kernel.read(1) == [PASSES]


def test_a_cache_file_that_was_made_anew_before_the_mount_is_not_mounted(tmp_path: Path) -> None:
    path = tmp_path / "blob.data"
    path.write_bytes(b"x")
    number, inode, birth = file_at(str(path))
    for other in ((number, inode + 1, birth), (number, inode, birth + 1)):
        with pytest.raises(MountError, match=r"blob\.data: it was deleted or replaced"):
            session.make(-1, "/nonexistent", [session.Range(str(path), other)], "test")
