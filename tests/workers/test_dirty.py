"""What is said of data that may not be on its disk: before it is ready, and until a checkpoint has it there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from nydusd import points
from nydusd.errors import CacheError
from nydusd.storage.state.segment import EMPTY, READY, VERIFY
from tests.workers.harness import Jobs, jobs

NAME = "v6-zstd-blake3"


def dirty(image: Jobs) -> int:
    with image.segment() as segment:
        return int(segment.dirty[0])


def test_disk_may_lack_what_is_ready_until_a_checkpoint_has_it_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = os.fdatasync

    def fill_meanwhile(fd: int) -> None:
        assert dirty(image) == 0
        synced(fd)
        monkeypatch.setattr(os, "fdatasync", synced)
        image.fill([1])

    with jobs(NAME, folder) as image:
        image.prepare()
        assert dirty(image) == 0
        image.fill([0])
        assert dirty(image) == 1
        image.checkpoint()
        assert dirty(image) == 0
        monkeypatch.setattr(os, "fdatasync", fill_meanwhile)
        image.checkpoint()
        assert dirty(image) == 1 and image.states()[:2] == [READY, READY]
        image.checkpoint()
        assert dirty(image) == 0


def test_disk_that_did_not_take_it_may_lack_what_others_are_about_to_mark(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with jobs(NAME, folder) as image:
        image.prepare()
        image.fill([0])
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fails)
            with pytest.raises(CacheError):
                image.checkpoint()
        assert dirty(image) == 1 and image.states()[0] == VERIFY
        image.checkpoint()
        assert dirty(image) == 0
        image.fill([0], verify=[0])
        assert dirty(image) == 1 and image.states()[0] == READY


def test_disk_may_lack_what_a_segment_has_from_another_one_and_not_what_it_has_from_the_map(folder: Path) -> None:
    with jobs(NAME, folder) as image:
        count = image.prepare()["count"]
        image.fill_all()
        image.new_daemon(same_boot=True)
        assert image.prepare()["ready"] == count and dirty(image) == 1
        image.checkpoint()
        image.new_daemon()
        assert image.prepare()["ready"] == count and dirty(image) == 0


@pytest.mark.parametrize(
    ("name", "point", "after"),
    [
        (NAME, "fill: written", VERIFY),
        (NAME, "fill: marked", VERIFY),
        (NAME, "fill: verified", VERIFY),
        ("v6-tarfs", "fill: written", EMPTY),
    ],
)
def test_what_was_written_before_all_was_doubted_is_doubted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, point: str, after: int
) -> None:
    """The kernel may have dropped it, and told whoever doubted, who passed over the chunk: it was not ready yet."""
    real = points.reach

    def reach(reached: str) -> None:
        real(reached)
        if reached == point:
            with image.segment() as segment:
                segment.doubts[0] += 2

    with jobs(name, folder) as image:
        image.prepare()
        looked = [0] if point == "fill: verified" else []
        if looked:
            image.fill([0])
            with image.segment() as segment:
                segment.state[0] = VERIFY
        with monkeypatch.context() as patch:
            patch.setattr(points, "reach", reach)
            image.fill([] if looked else [0], verify=looked)
        assert image.states()[0] == after
        image.fill([0], verify=[0] if after == VERIFY else [])
        assert image.states()[0] == READY
