"""What the front end takes for being on the disk: what was ready before a sync that went well, and not doubted since."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nydusd.errors import CacheError, LostWritesError, SyncingError
from nydusd.formats.model import ChunkFlag
from nydusd.frontends.erofs import losses, synced
from nydusd.frontends.erofs.device import Blob
from nydusd.frontends.erofs.synced import Syncs
from nydusd.frontends.erofs.table import File
from nydusd.ipc.messages import LOST, SYNC
from nydusd.storage.api.io import ChunkRun
from nydusd.storage.state import doubts, map_file
from nydusd.storage.state.segment import READY, RECORD, SYNCING, VERIFY, Segment
from tests.workers.harness import Jobs, jobs


class Asked:
    """A supervisor that notes what it is asked for."""

    def __init__(self) -> None:
        self.requests: list[tuple[ChunkRun, int]] = []

    def send(self, run: ChunkRun, flags: int) -> int:
        self.requests.append((run, flags))
        return len(self.requests)


def blob_of(image: Jobs) -> Blob:
    st = image.data.stat()
    return Blob([File(0, image.info.blob_id, 7, image.prefix, str(image.data), st.st_dev, st.st_ino)], 0)


@contextmanager
def all_asked_for(folder: Path) -> Iterator[tuple[Jobs, Blob, Syncs, Asked]]:
    """All of a blob is ready, and its supervisor was asked for the first sync."""
    with jobs("v6-lz4-sha256", folder) as image:
        image.prepare()
        blob, syncs, asked = blob_of(image), Syncs(), Asked()
        image.fill_all()
        syncs.ask(blob, asked.send)
        yield image, blob, syncs, asked


def test_only_what_was_ready_before_a_sync_that_went_well_is_on_the_disk(tmp_path: Path) -> None:
    with jobs("v6-lz4-sha256", tmp_path) as image:
        count = image.prepare()["count"]
        blob, syncs, asked = blob_of(image), Syncs(), Asked()
        image.fill(range(count // 2))
        with image.segment() as segment:
            middle = segment.record(count // 2 - 1).uoff
            assert segment.record(0).usize
        assert blob.whole(0, middle) and not blob.is_stored(0, middle)
        syncs.ask(blob, asked.send)
        syncs.ask(blob, asked.send)
        assert asked.requests == [(ChunkRun(7, 0, 1), SYNC)], "one at a time, and of a chunk that is there"
        image.fill(range(count // 2, count))
        image.checkpoint()
        syncs.answered(99, 0)
        assert not blob.is_stored(0, middle), "it was an answer to another request"
        syncs.answered(1, 0)
        assert blob.is_stored(0, middle)
        assert blob.complete() and not blob.is_stored(), "the rest became ready after the request"
        syncs.ask(blob, asked.send)
        syncs.answered(2, errno.EIO)
        assert not blob.is_stored()
        syncs.ask(blob, asked.send)
        assert len(asked.requests) == 2, "it has just failed"
        blob.close()


def test_what_was_doubted_since_is_not_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with jobs("v6-lz4-sha256", tmp_path) as image:
        count = image.prepare()["count"]
        blob, syncs, asked = blob_of(image), Syncs(), Asked()
        image.fill_all()
        syncs.ask(blob, asked.send)
        image.checkpoint()
        syncs.answered(1, 0)
        assert blob.is_stored()

        def fails(_fd: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fails)
            with pytest.raises(CacheError, match="Input/output error"):
                image.checkpoint()
        image.fill(range(count), verify=range(count))
        assert set(image.states()) == {READY}
        assert blob.complete() and not blob.is_stored()
        blob.close()


def test_what_was_asked_of_a_file_that_was_replaced_says_nothing_of_it(tmp_path: Path) -> None:
    with all_asked_for(tmp_path) as (image, blob, syncs, asked):
        image.data.unlink()
        image.generation += 1
        image.prepare()
        image.checkpoint()
        syncs.answered(1, 0)
        assert not blob.is_stored()
        syncs.ask(blob, asked.send)
        assert len(asked.requests) == 1, "nor would the next one, a moment later"
        blob.close()


def test_an_answer_counts_however_late_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk may take longer than it takes us to ask again."""
    monkeypatch.setattr(synced, "_AGAIN", 0.0)
    with jobs("v6-lz4-sha256", tmp_path) as image:
        count = image.prepare()["count"]
        blob, syncs, asked = blob_of(image), Syncs(), Asked()
        image.fill(range(count // 2))
        with image.segment() as segment:
            middle = segment.record(count // 2 - 1).uoff
        syncs.ask(blob, asked.send)
        syncs.ask(blob, asked.send)
        image.fill_all()
        syncs.ask(blob, asked.send)
        image.checkpoint()
        syncs.answered(2, 0)
        assert blob.is_stored(0, middle) and not blob.is_stored()
        syncs.answered(3, 0)
        assert blob.is_stored()
        syncs.answered(1, 0)
        assert blob.is_stored(), "what is known by now says more than an answer to an earlier request"
        for _ in range(20):
            syncs.ask(blob, asked.send)
        assert len(syncs._asked) == 8, "nobody answers"
        syncs.forget(blob)
        assert not syncs._asked
        blob.close()


def test_a_reader_waits_from_a_lost_write_on_until_what_is_ready_was_doubted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with jobs("v6-lz4-sha256", tmp_path) as image:
        image.prepare()
        blob, syncs, asked = blob_of(image), Syncs(), Asked()
        image.fill_all()
        blob.check()
        syncs.ask(blob, asked.send)
        with monkeypatch.context() as patch:
            patch.setattr(losses, "has_lost_writes", lambda fd: True)
            with pytest.raises(LostWritesError, match="did not take"):
                blob.check()
        with pytest.raises(LostWritesError):
            blob.check()
        syncs.ask(blob, asked.send)
        assert [flags for _, flags in asked.requests] == [SYNC, SYNC | LOST], "at once"
        image.checkpoint()
        assert set(image.states()) == {VERIFY}
        blob.check()
        syncs.answered(2, 0)
        assert not blob.is_stored()
        blob.close()


def test_a_sync_is_asked_for_again_soon_after_another_one_of_the_file_was_in_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synced, "_SOON", 0.0)
    with all_asked_for(tmp_path) as (image, blob, syncs, asked):
        image.checkpoint()
        with image.segment() as segment:
            segment.syncing[0] = 1
            assert not syncs.answered(1, 0)
            syncs.ask(blob, asked.send)
            assert len(asked.requests) == 2 and not blob.is_stored()
            segment.syncing[0] = 0
        assert syncs.answered(2, 0) and blob.is_stored()
        blob.close()


def test_data_is_on_its_disk_though_the_map_cannot_be_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else may have the map locked, or there is no room for it."""
    with jobs("v6-lz4-sha256", tmp_path) as image:
        image.prepare()
        image.fill_all()

        def fails(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(map_file, "_open_locked", fails)
            answer = image.checkpoint()
        assert answer["synced"] and "stored" not in answer
        assert answer["type"] == "CacheError" and "No space left" in answer["error"]
        with image.segment() as segment:
            assert not segment.syncing[0]
        assert set(image.states()) == {READY}


@pytest.mark.parametrize("name", ["v6-lz4-sha256", "v6-zstd-blake3"])
def test_what_is_on_the_disk_is_told_by_digests_whatever_is_said_of_it(name: str, tmp_path: Path) -> None:
    with jobs(name, tmp_path) as image, contextlib.ExitStack() as opened:

        def blob() -> Blob:
            made = blob_of(image)
            opened.callback(made.close)
            return made

        image.prepare()
        assert not blob().is_on_disk(0, 1), "nothing is there"
        image.fill_all()
        with image.segment() as segment:
            size = segment.identity.size
            segment.syncing[0] = SYNCING  # and whoever does that was killed
            suspect = blob()
            with pytest.raises(SyncingError):
                suspect.check()
            assert suspect.is_on_disk(0, size)
            assert not suspect.is_on_disk(size + 4096, 1)
            doubts.doubt(segment)
            assert set(image.states()) == {VERIFY} and blob().is_on_disk(0, size)
            first, second, last = segment.record(0), segment.record(1), segment.record(segment.count - 1)
            for flags, is_told in ((ChunkFlag.CRC, True), (0, False), (first.flags, True)):
                RECORD.pack_into(segment.records, 0, *first._replace(flags=int(flags)))
                assert blob().is_on_disk(0, 1) == is_told
            with open(image.data, "r+b", buffering=0) as data:
                data.write(bytes(first.usize))
                assert not blob().is_on_disk(0, 1) and blob().is_on_disk(second.uoff, 1)
                assert not blob().is_on_disk(0, size) and suspect.is_on_disk(0, 1), "it was seen there"
                data.truncate(last.uoff)
                assert not blob().is_on_disk(last.uoff, 1)
        late = blob()
        image.data.unlink()
        assert not late.is_on_disk(second.uoff, 1)


def test_nothing_is_on_the_disk_at_any_time_between_a_loss_and_the_doubt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker has taken the note of the loss away, and doubts nothing yet; or it was killed there."""
    with all_asked_for(tmp_path) as (image, blob, syncs, _asked):
        image.checkpoint()
        syncs.answered(1, 0)
        assert blob.is_stored()
        with image.segment() as segment:
            segment.lost[0] = 1
        assert not blob.is_stored()
        between = []

        def then_doubted(segment: Segment) -> None:
            assert not segment.lost[0]
            between.append(blob.is_stored())
            doubt(segment)
            between.append(blob.is_stored())

        doubt = doubts.doubt
        monkeypatch.setattr(doubts, "doubt", then_doubted)
        image.checkpoint()
        assert between == [False, False] and not blob.is_stored()
        blob.close()
