"""A cache file that may have lost writes, and is of several mounts: nobody relies on it until all was doubted."""

from __future__ import annotations

import errno
import os

import pytest

from nydusd.errors import LostWritesError
from nydusd.frontends.erofs import losses
from nydusd.frontends.erofs.synced import Syncs
from nydusd.ipc.messages import LOST, SYNC
from nydusd.storage.api.io import ChunkRun
from nydusd.storage.state.segment import READY, VERIFY
from tests.erofs.shared_file import ALL, PASSES, Kernel


def test_a_lost_write_is_not_forgotten_when_mounts_come_and_go(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    segment = kernel.mount(1, 7, ready=ALL)
    assert kernel.read(0) == [PASSES]
    with monkeypatch.context() as patch:
        patch.setattr(losses, "has_lost_writes", lambda fd: True)
        assert kernel.read(0) == [] and kernel.asked() == []
    segment.syncing[0], segment.lost[0] = 1, 0  # as a worker does before it doubts
    kernel.mount(2, 9, lists=[])
    assert kernel.front is not None
    kernel.front._known.look(kernel.line.request)
    assert kernel.line.flags == [SYNC | LOST]
    assert kernel.read(1) == []
    segment.doubts[0] += 2
    assert kernel.read(1) == [PASSES]


def test_a_loss_is_heard_of_by_the_file_that_was_open_before_though_a_worker_was_told_already(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker's sync has failed, and nothing is doubted yet; files that are opened from now on are not told."""
    segment = kernel.mount(1, 7, ready=ALL)
    assert kernel.read(0) == [PASSES]
    before = {int(number) for number in os.listdir("/proc/self/fd")}
    segment.syncing[0] = 1
    with monkeypatch.context() as patch:
        patch.setattr(losses, "has_lost_writes", lambda fd: fd in before)
        assert kernel.read(1) == []
    segment.doubts[0] += 2
    segment.syncing[0] = segment.lost[0] = 0
    assert kernel.read(1) == [PASSES]


def test_a_successor_relies_on_nothing_until_who_syncs_the_file_is_done(kernel: Kernel) -> None:
    segment = kernel.mount(1, 7, ready=ALL)
    segment.syncing[0] = 1
    assert kernel.read(0) == []
    segment.syncing[0] = 0
    assert kernel.read(1) == [PASSES]


def test_what_was_there_of_a_range_and_is_doubted_while_the_rest_is_fetched_is_asked_for(kernel: Kernel) -> None:
    segment = kernel.mount(1, 7, ready=[0])
    assert kernel.read(0, 2) == [] and kernel.asked() == [ChunkRun(7, 1, 1)]
    segment.state[0], segment.state[1] = VERIFY, READY
    assert kernel.answered(7) == [] and kernel.asked() == [ChunkRun(7, 0, 1)]
    segment.state[0] = READY
    assert kernel.answered(7) == [PASSES]


def test_a_sync_counts_for_nothing_while_another_one_of_the_file_may_have_heard_of_a_loss(kernel: Kernel) -> None:
    kernel.mount(1, 7, ready=ALL)
    other = kernel.mount(2, 9)
    blob = kernel.blob()
    ready = blob.look()
    other.syncing[0] = 1
    assert not blob.synced(ready)
    other.syncing[0] = 0
    assert not blob.is_stored()
    assert blob.synced(ready) and blob.is_stored()


def test_a_file_is_synced_by_another_image_where_one_is_refused(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The latest was unmounted while files were open, and the supervisor is another one by now."""
    one = kernel.mount(1, 7, ready=ALL)
    two = kernel.mount(2, 9, ready=ALL)
    blob, syncs = kernel.blob(), Syncs()

    def ask() -> list[ChunkRun]:
        syncs.ask(blob, kernel.line.request)
        return kernel.asked()

    assert ask() == [ChunkRun(9, 0, 1)]
    syncs.answered(1, errno.EIO)
    assert ask() == [ChunkRun(9, 0, 1), ChunkRun(7, 0, 1)]
    syncs.answered(2, errno.EIO)
    assert len(ask()) == 2, "there is no other"
    with monkeypatch.context() as patch:
        patch.setattr(losses, "has_lost_writes", lambda fd: True)
        with pytest.raises(LostWritesError):
            blob.check()
    assert one.lost[0] == two.lost[0] == 1
    assert ask()[-1] == ChunkRun(9, 0, 1), "all of them are asked again"
    syncs.answered(3, errno.EIO)
    assert ask()[-1] == ChunkRun(7, 0, 1)
    for segment in (one, two):
        segment.lost[0] = 0
        segment.doubts[0] += 2
    blob.check()
    syncs.answered(4, 0)
    assert not blob.is_stored()
    assert ask()[-1] == ChunkRun(7, 0, 1) and kernel.line.flags[-1] == SYNC, "the other was refused"
    syncs.answered(5, 0)
    assert blob.is_stored()
