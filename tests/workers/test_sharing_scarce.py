"""Several tables of chunks over one cache file while a worker can open nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nydusd.errors import ScarceError
from nydusd.storage.state import sharing
from nydusd.storage.state.segment import READY, VERIFY, Segment, file_of
from tests.workers.harness import Jobs
from tests.workers.shared_file import again, job_to_evict, twin
from workers.evict import evict, survey


class TestNothingCanBeOpenedNow:
    """File descriptors or memory are used up: what cannot be seen then may be there."""

    @pytest.fixture(params=["looked at", "mapped"])
    def scarce(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
        """Until it is undone, segments of others cannot be seen, as their names are new or they are too large."""
        real = Segment.open

        def look(path: Path) -> tuple[int, int] | None:
            if ".other" in path.name:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return file_of(path)

        def opened(name: str) -> Segment | None:
            if ".other" in name:
                raise ScarceError(name, errno.ENOMEM)
            return real(name)

        with monkeypatch.context() as patch:
            if request.param == "looked at":
                patch.setattr(sharing, "file_of", look)
            else:
                patch.setattr(Segment, "open", opened)
            yield patch

    def test_nothing_is_taken_out_and_the_next_one_sees_who_uses_it(
        self, made: Jobs, scarce: pytest.MonkeyPatch
    ) -> None:
        before = made.data.stat().st_blocks
        with twin(made) as other:
            job = job_to_evict(made)
            with pytest.raises(ScarceError):
                evict(made.open, job)
            unused = {"folder": str(made.work_dir), "limit": 1, "target": 0, "unused": True, "mounted": {}}
            pids = [os.getpid()]
            answer = survey(made.open, unused | {"now": 10**6, "keep": 0, "strays": {}, "pids": pids})
            assert answer["removed"] == [] and made.data.stat().st_blocks == before
            scarce.undo()
            assert evict(made.open, job)["kept"] == other.name

    def test_file_is_not_shared_with_whom_it_may_contradict(self, made: Jobs, scarce: pytest.MonkeyPatch) -> None:
        with twin(made, 7, {"coff": 1}):
            with pytest.raises(ScarceError):
                again(made)
            scarce.undo()
            assert "another place" in again(made)

    def test_checkpoint_stores_nothing_until_it_can_see_whether_another_heard_of_a_loss(
        self, made: Jobs, scarce: pytest.MonkeyPatch
    ) -> None:
        with twin(made) as other:
            other.state[5] = READY
            with pytest.raises(ScarceError):
                made.checkpoint()
            assert not made.spec.map_path.exists() and set(made.states()) == {READY}
            scarce.undo()
            assert made.checkpoint()["others"] == {other.name: (other.inode, 1)}

    def test_doubt_reaches_others_when_they_can_be_seen(self, made: Jobs, scarce: pytest.MonkeyPatch) -> None:
        with twin(made) as other:
            other.state[5] = READY
            with made.segment() as segment:
                segment.syncing[0] = 1
            with pytest.raises(ScarceError):
                made.checkpoint()
            assert set(made.states()) == {VERIFY} and other.state[5] == READY
            scarce.undo()
            made.checkpoint()
            assert other.state[5] == VERIFY
