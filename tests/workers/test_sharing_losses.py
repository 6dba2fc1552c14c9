"""What is synced, lost and doubted of a cache file is so for all images that have it."""

from __future__ import annotations

import errno
import fcntl
import os

import pytest

from nydusd.errors import CacheError
from nydusd.storage.state import doubts, map_file
from nydusd.storage.state.segment import EMPTY, READY, TAKEN_OVER, VERIFY
from tests.workers.harness import Jobs
from tests.workers.shared_file import KilledError, twin


def test_sync_that_nobody_heard_the_end_of_makes_all_doubtful(made: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker is killed when the kernel had told it, and nobody else ever, that data was lost."""

    def killed(_fd: int) -> None:
        raise KilledError

    with twin(made) as other:
        other.state[5] = READY
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", killed)
            with pytest.raises(KilledError):
                made.checkpoint()
        assert made.checkpoint() == {"stored": 0}
        assert set(made.states()) == {VERIFY} and other.state[5] == VERIFY


@pytest.mark.parametrize("mark", ["syncing", "lost"])
def test_loss_that_another_image_heard_of_is_doubted_before_anything_is_stored(
    made: Jobs, monkeypatch: pytest.MonkeyPatch, mark: str
) -> None:
    """The kernel does not tell it again to a worker that opens the file after that, so that one's sync ends well."""
    synced = os.fdatasync

    def look(fd: int) -> None:
        monkeypatch.setattr(os, "fdatasync", synced)
        assert set(made.states()) == {VERIFY} and other.state[5] == VERIFY
        assert other.syncing[0] == 1 and other.dirty[0] == other.lost[0] == 0
        synced(fd)

    with twin(made) as other:
        other.state[5] = READY
        getattr(other, mark)[0] = 1
        monkeypatch.setattr(os, "fdatasync", look)
        assert made.checkpoint() == {"stored": 0}
        assert other.syncing[0] == 0 and other.doubts[0] == 2


def test_sync_of_a_file_is_of_what_all_images_have_in_it(made: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is just being made looks for itself."""
    with twin(made) as other:
        other.state[5] = READY
        other.dirty[0] = 1
        made.checkpoint()
        assert other.dirty[0] == other.syncing[0] == other.doubts[0] == 0
        other.dirty[0], other.syncing[0] = 1, TAKEN_OVER
        assert "others" not in made.checkpoint()
        assert (other.dirty[0], other.syncing[0], other.doubts[0]) == (1, TAKEN_OVER, 0)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fails)
            with pytest.raises(CacheError):
                made.checkpoint()
        assert (other.dirty[0], other.syncing[0], other.doubts[0]) == (1, TAKEN_OVER, 2)


def fails(_fd: int) -> None:
    raise OSError(errno.EIO, "Input/output error")


def test_who_syncs_a_file_does_it_alone(made: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is killed at it holds up nobody; who does it for too long costs a checkpoint."""
    with open(made.data, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with monkeypatch.context() as patch:
            patch.setattr(doubts, "_PATIENCE", 0.05)
            with pytest.raises(CacheError, match="another process is syncing it"):
                made.checkpoint()
        assert set(made.states()) == {READY} and not made.spec.map_path.exists()
        made.prepare()  # nobody who only looks at it waits
    assert made.checkpoint()["stored"] == len(made.states())


def test_loss_that_a_front_end_heard_of_is_doubted_once_for_all(made: Jobs) -> None:
    """It has told all of them, for it does not know by which the file is synced."""
    with twin(made) as other, made.segment() as segment:
        other.state[5] = READY
        segment.lost[0] = other.lost[0] = 1
        made.checkpoint()
        assert set(segment.state) == {VERIFY} and other.state[5] == VERIFY
        assert segment.lost[0] == other.lost[0] == 0
        other.state[5] = READY
        assert made.checkpoint()["others"] == {other.name: (other.inode, 1)}


def test_checkpoint_tells_of_what_others_have_in_the_file(made: Jobs) -> None:
    made.checkpoint()
    with twin(made) as other:
        other.state[5] = READY
        with made.segment() as segment:
            segment.state[5] = EMPTY
        assert made.checkpoint()["others"] == {other.name: (other.inode, 1)}
        with made.segment() as segment:
            assert map_file.load(made.spec.map_path, segment.count, segment.identity)[5] == READY
