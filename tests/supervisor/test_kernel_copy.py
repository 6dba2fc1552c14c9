"""The copy of an image's metadata that workers make and send, whatever becomes of the workers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nydusd.errors import CacheError
from nydusd.storage.api.image import inspect
from nydusd.storage.cache.requests import Answer, Job
from nydusd.supervisor.kernel_copy import Cuts, make_copy
from tests.support.oracle import image
from workers.blobs import OpenBlobs
from workers.split import split_image

IMAGE = image("v6-zstd-blake3")
NO_BLOBS = cast(OpenBlobs, None)


class World:
    """A pool whose jobs the test does. `made`: what came of them, the bytes of what is to be mounted first."""

    def __init__(self, folder: Path) -> None:
        self.jobs: list[Job] = []
        self.made: list[tuple[bytes, Cuts, Sequence[bool]]] = []
        facts = inspect(str(IMAGE.bootstrap), [])
        cache = SimpleNamespace(spec=SimpleNamespace(work_dir=folder))
        what = SimpleNamespace(metadata=facts, caches=[cache], source=facts.bootstrap)
        make_copy(cast(Any, SimpleNamespace(submit=self.jobs.append)), cast(Any, what), self._take)

    def _take(self, path: str, cuts: Cuts, listed: Sequence[bool]) -> None:
        self.made.append((Path(path).read_bytes(), cuts, listed))

    def work(self) -> Answer:
        return split_image(NO_BLOBS, self.jobs[0].payload)

    def answer(self, answer: Answer) -> None:
        self.jobs[0].done(self.jobs[0], answer)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(os, "getppid", os.getpid)  # we are the worker, too
    return World(tmp_path)


def test_the_copy_of_the_last_worker_is_the_one_where_another_was_killed_that_had_sent_one(world: World) -> None:
    world.work()
    answer = world.work()
    world.answer(answer)
    ((copy, cuts, listed),) = world.made
    assert (cuts, listed) == (answer["cuts"], answer["listed"])
    assert cuts and copy != IMAGE.bootstrap.read_bytes()


def test_without_a_copy_the_image_itself_is_mounted_and_a_sent_one_is_closed(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.work()
    world.answer({"error": "too many workers died"})
    assert world.made == [(IMAGE.bootstrap.read_bytes(), None, ())]
    assert "watched as a whole: too many workers died" in caplog.text


def test_a_copy_for_which_there_is_no_file_descriptor_is_none(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.answer({"cuts": [[0]], "listed": [True]})
    assert world.made == [(IMAGE.bootstrap.read_bytes(), None, ())]
    assert "no file descriptor is left" in caplog.text


def test_a_folder_that_takes_no_copy_is_an_error_of_the_worker(world: World) -> None:
    world.jobs[0].payload["folder"] = "/proc"
    with pytest.raises(CacheError, match=r"a copy of .* for the kernel"):
        world.work()
    world.answer({"error": "no room"})
