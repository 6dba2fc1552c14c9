"""One cache file of several mounts at once: a reader passes if an image says so that lists what is read."""

from __future__ import annotations

import errno

import pytest

from nydusd.storage.api.io import ChunkRun
from nydusd.storage.state.names import remove
from nydusd.storage.state.segment import EMPTY, READY
from tests.erofs.shared_file import ALL, CHUNK, COUNT, FAILS, PASSES, Kernel


@pytest.mark.parametrize("gone", [False, True])
def test_what_cannot_be_had_for_the_latest_image_is_asked_for_by_another_one(kernel: Kernel, gone: bool) -> None:
    """Its image was unmounted, or its backend fails."""
    segment = kernel.mount(1, 7)
    kernel.mount(2, 9)
    assert kernel.read(1) == [] and kernel.asked() == [ChunkRun(9, 1, 1)]
    if gone:
        kernel.umount(2)
    assert kernel.answered(9, errno.EIO) == [] and kernel.asked() == [ChunkRun(7, 1, 1)]
    segment.state[1] = READY
    assert kernel.answered(7) == [PASSES]
    assert kernel.read(2) == []
    assert kernel.answered(9, errno.EIO) == []
    assert kernel.answered(7, errno.EIO) == [FAILS] and kernel.asked() == []


def test_a_chunk_is_there_if_an_image_says_so_that_lists_it(kernel: Kernel) -> None:
    lists_it = kernel.mount(1, 7)
    other = kernel.mount(2, 9, lists=[0, 1, 3], ready=[2])
    assert kernel.read(2) == [] and kernel.asked() == [ChunkRun(7, 2, 1)], "nobody has compared it with a digest"
    assert kernel.answered(7, errno.EIO) == [FAILS]
    lists_it.state[2] = READY
    assert kernel.read(2) == [PASSES]
    other.state[0] = READY
    assert kernel.read(0) == [PASSES], "both have the same digest of it"


def test_no_image_is_asked_for_chunks_that_it_does_not_list_and_another_does(kernel: Kernel) -> None:
    first = kernel.mount(1, 7, lists=[1, 2])
    second = kernel.mount(2, 9, lists=[0, 3])
    assert kernel.read(0, COUNT) == []
    assert kernel.asked() == [ChunkRun(9, 0, 1), ChunkRun(7, 1, 2), ChunkRun(9, 3, 1)]
    for chunk in (0, 3):
        second.state[chunk] = READY
    assert kernel.answered(9) == []
    for chunk in (1, 2):
        first.state[chunk] = READY
    assert kernel.answered(7) == [PASSES]
    blob = kernel.blob()
    assert blob.complete() and blob.whole(0, CHUNK * COUNT)
    first.state[2] = EMPTY
    assert not blob.complete() and not blob.whole(0, CHUNK * COUNT) and blob.whole(CHUNK * 3, CHUNK * COUNT)


@pytest.mark.parametrize("chunk", [0, 2, 3])
def test_nobody_reads_what_only_an_image_describes_of_which_nothing_is_known(kernel: Kernel, chunk: int) -> None:
    """There is no segment of it now, as while a worker replaces it."""
    others = [i for i in ALL if i != chunk]
    kernel.mount(1, 7, lacks=[chunk], ready=others)
    kernel.mount(2, 9, lacks=others)
    remove(kernel._names[2])
    blob = kernel.blob()
    assert kernel.read(chunk) == [FAILS] and kernel.read(0, COUNT) == [FAILS]
    assert not blob.whole(CHUNK * chunk, CHUNK * (chunk + 1)) and not blob.complete()
    assert all(kernel.read(other) == [PASSES] for other in others)
    assert all(blob.whole(CHUNK * other, CHUNK * (other + 1)) for other in others)
    kernel.publish(2, lacks=others)
    assert kernel.read(chunk) == [] and kernel.asked() == [ChunkRun(9, chunk, 1)]
    assert kernel.answered(9, errno.EIO) == [FAILS]


def test_a_range_is_whole_without_what_no_file_refers_to_if_that_is_known(kernel: Kernel) -> None:
    for index, handle in ((1, 7), (2, 9)):
        segment = kernel.mount(index, handle, lists=[0, 1, 2], ready=[0, 1, 2])
        kernel.says(index, listed=False)
        assert not kernel.blob().complete() and not kernel.blob().whole(0, CHUNK * COUNT)
        assert kernel.read(3) == [] and kernel.asked() == [ChunkRun(handle, 3, 1)], (
            "it may be damaged, and right all the same"
        )
        assert kernel.answered(handle, errno.EIO)[-1:] == ([FAILS] if index == 1 else [])
        kernel.says(index, listed=True)
        assert kernel.blob().complete() and kernel.blob().whole(0, CHUNK * COUNT)
        segment.state[1] = EMPTY
        assert kernel.blob().complete() == (index == 2)
        segment.state[1] = READY
    assert kernel.asked() == [ChunkRun(7, 3, 1)]
    assert kernel.answered(7, errno.EIO) == [FAILS]


def test_who_wants_digests_checked_believes_only_others_who_do(kernel: Kernel) -> None:
    checks = kernel.mount(1, 7)
    kernel.mount(2, 9, ready=ALL)
    assert kernel.read(0) == [PASSES]
    kernel.umount(2)
    kernel.mount(3, 10, ready=ALL)
    kernel.says(1, verifies=True)
    assert kernel.read(0) == [] and kernel.asked() == [ChunkRun(7, 0, 1)]
    checks.state[0] = READY
    assert kernel.answered(7) == [PASSES]
