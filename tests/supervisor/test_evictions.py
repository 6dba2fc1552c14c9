"""Evictions whose worker died on the way: what may have been punched is never ready again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from nydusd.storage.cache.requests import Answer, Job
from nydusd.storage.state.segment import EMPTY, PENDING, READY
from nydusd.supervisor.evictions import Evictions


class _Map:
    """The state bytes of four chunks."""

    def __init__(self) -> None:
        self.state = [READY] * 4
        self.count = 4

    def is_ready(self, chunk: int) -> bool:
        return self.state[chunk] == READY

    def claim_ready(self, chunks: list[int]) -> int:
        for chunk in chunks:
            self.state[chunk] = PENDING
        return 7

    def keep_claimed(self, chunk: int, doubts: int) -> None:
        assert doubts == 7
        self.state[chunk] = READY

    def taken_out(self, chunk: int) -> None:
        self.state[chunk] = EMPTY


def _never(*_: object) -> None:
    raise AssertionError("nobody waits, and the file is the same")


@pytest.mark.parametrize(("attempts", "kills", "state"), [(0, 0, READY), (1, 0, EMPTY), (0, 1, EMPTY)])
def test_chunks_that_others_use_stay_ready_unless_a_worker_died_over_them(
    attempts: int, kills: int, state: int
) -> None:
    jobs: list[Job] = []
    chunk_map = _Map()
    cache = SimpleNamespace(
        state="ready",
        segment=SimpleNamespace(epoch=[0], name="/segment", inode=7, records=bytes(160), digests=bytes(128)),
        others=list,
        checkpointing=False,
        pinned=False,
        jobs={},
        waiters={},
        chunk_map=chunk_map,
        spec=SimpleNamespace(info=SimpleNamespace(blob_id="b" * 64)),
        stored=4,
    )
    evictions = Evictions(cast(Any, SimpleNamespace(submit=jobs.append)), _never, _never)
    answers: list[Answer] = []
    assert evictions.start(cast(Any, cache), [1, 2], {}, answers.append) == 2
    (job,) = jobs
    assert job.payload["covered"] == {"/segment": 7}
    assert chunk_map.state == [READY, PENDING, PENDING, READY]
    job.attempts, job.kills = attempts, kills
    job.done(job, {"kept": "process 1"})
    assert chunk_map.state == [READY, state, state, READY]
    assert cache.stored == (4 if state == READY else -1)
    assert answers == [{"kept": "process 1"}] and not cache.jobs
