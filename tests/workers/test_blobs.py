"""What a worker keeps open from job to job, and for how long."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from tests.workers.harness import Jobs, jobs

NAME = "v6-zstd-blake3"


def _is_open(path: Path) -> bool:
    """Whether this process has the file open."""
    wanted = os.path.realpath(path)
    with os.scandir("/proc/self/fd") as fds:
        return any(os.path.realpath(fd.path) == wanted for fd in fds)


def _use(image: Jobs) -> None:
    image.prepare()
    assert image.fill([0])["reads"] == 1
    assert _is_open(image.blob)


def test_file_of_a_blob_that_no_image_uses_any_more_is_closed_while_its_backend_has_others(folder: Path) -> None:
    """It may have been deleted: it takes room on the disk as long as anybody has it open."""
    with jobs(NAME, folder) as image:
        _use(image)
        for handle, name in ((8, image.info.blob_id), (9, "another")):
            other = replace(image.spec, handle=handle, info=replace(image.info, blob_id=name, meta_blob_id=name))
            image.open.learn({"spec": other.to_json()})
        image.open.learn({"forget": [7]})
        assert _is_open(image.blob)
        image.open.learn({"forget": [8]})
        assert not _is_open(image.blob)


def test_files_of_blobs_are_closed_when_no_descriptor_is_left_and_opened_again(folder: Path) -> None:
    with jobs(NAME, folder) as image:
        _use(image)
        image.open.let_go()
        assert not _is_open(image.blob)
        assert image.fill([1])["reads"] == 1
