"""ChunkMap and RangeMap against models: two mappings of one segment, in one process and in two."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from nydusd.errors import CacheError
from nydusd.formats.model import ChunkFlag
from nydusd.storage.state import lock
from nydusd.storage.state.chunk_map import ChunkMap
from nydusd.storage.state.range_map import RangeMap
from nydusd.storage.state.segment import EMPTY, FAILED, PENDING, READY, VERIFY, Segment
from tests.support.segments import Place, in_child, join, make_segment, segment_name

COUNT = 24
_CHUNKS = st.integers(0, COUNT - 1)


class _TwoMappings(RuleBasedStateMachine):
    """Each step goes through either of two mappings of the same name; both must show what the model says."""

    def __init__(self) -> None:
        super().__init__()
        self.deaths = 0
        self._name = segment_name()
        name = self._name.__enter__()
        self.model = [(EMPTY, VERIFY, FAILED)[i % 3] for i in range(COUNT)]
        self.segments = [make_segment(name, COUNT, state=bytes(self.model))]
        second = Segment.open(name)
        assert second is not None
        self.segments.append(second)
        self.maps = [ChunkMap(segment) for segment in self.segments]
        self.ranges = [RangeMap(segment) for segment in self.segments]

    def teardown(self) -> None:
        for segment in self.segments:
            segment.close()
        self._name.__exit__(None, None, None)

    def _claim(self, chunks: range | list[int]) -> list[int]:
        owned = [i for i in chunks if self.model[i] not in (PENDING, READY)]
        for i in owned:
            self.model[i] = PENDING
        return owned

    @rule(side=st.integers(0, 1), chunks=st.lists(_CHUNKS, unique=True))
    def claim(self, side: int, chunks: list[int]) -> None:
        assert self.maps[side].check_ready_and_mark_pending(chunks) == self._claim(chunks)

    @rule(side=st.integers(0, 1), first=_CHUNKS, last=_CHUNKS)
    def claim_range(self, side: int, first: int, last: int) -> None:
        first, last = sorted((first, last))
        start, count = self.ranges[side].chunks_of(100 * first + 99, 100 * (last - first) + 1)
        owned = self.maps[side].check_ready_and_mark_pending(range(start, start + count))
        assert owned == self._claim(range(first, last + 1))

    @rule(side=st.integers(0, 1), chunk=_CHUNKS)
    def ready(self, side: int, chunk: int) -> None:
        self.maps[side].set_ready(chunk)
        self.model[chunk] = READY

    @rule(side=st.integers(0, 1), chunk=_CHUNKS, to=st.sampled_from([EMPTY, FAILED, VERIFY]))
    def clear(self, side: int, chunk: int, to: int) -> None:
        self.maps[side].clear_pending(chunk, to)
        if self.model[chunk] == PENDING:
            self.model[chunk] = to

    @rule(side=st.integers(0, 1), chunk=_CHUNKS)
    def forget(self, side: int, chunk: int) -> None:
        self.maps[side].forget(chunk)
        if self.model[chunk] == READY:
            self.model[chunk] = EMPTY

    @precondition(lambda self: self.deaths < 3)
    @rule(side=st.integers(0, 1), chunks=st.lists(_CHUNKS, unique=True, max_size=6), done=st.integers(0, 6))
    def a_third_one_is_killed_in_its_claim_and_succeeded(self, side: int, chunks: list[int], done: int) -> None:
        """It holds the lock and has got half-way; `side` takes over, and all that was claimed is free."""
        name = self.segments[0].name
        self.deaths += 1

        def claim_and_die() -> None:
            segment = Segment.open(name)
            assert segment is not None
            with segment.lock():
                for chunk in chunks[:done]:
                    if segment.state[chunk] != READY:
                        segment.state[chunk] = PENDING
                os.kill(os.getpid(), signal.SIGKILL)

        assert join(in_child(claim_and_die)) == -signal.SIGKILL
        for chunk in chunks[:done]:
            self.model[chunk] = self.model[chunk] if self.model[chunk] == READY else PENDING
        self.both_show_the_model()
        assert self.maps[side].check_ready_and_mark_pending(chunks) == self._claim(chunks)
        self.maps[side].end_claims()
        self.model = [EMPTY if state == PENDING else state for state in self.model]

    @invariant()
    def both_show_the_model(self) -> None:
        for chunks, ranges in zip(self.maps, self.ranges, strict=True):
            assert list(chunks.states()) == self.model
            assert [chunks.is_ready(i) for i in range(COUNT)] == [s == READY for s in self.model]
            assert chunks.ready_count() == self.model.count(READY)
            assert chunks.is_all_ready() == (set(self.model) == {READY})
            assert sum(chunks.counts().values()) == COUNT
            assert ranges.chunks_of(500, 700) == (5, 7)


def test_two_mappings_of_one_segment_agree_with_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.001)
    run_state_machine_as_test(_TwoMappings, settings=settings(max_examples=60, stateful_step_count=30))


@pytest.fixture
def name() -> Iterator[str]:
    with segment_name() as chosen:
        yield chosen


def test_each_chunk_is_claimed_by_one_process(name: str) -> None:
    segment = make_segment(name, 2000)
    out, into = os.pipe()

    def claimer() -> None:
        own = Segment.open(name)
        assert own is not None
        chunks = ChunkMap(own)
        mine = []
        for first in range(0, 2000, 10):
            mine += chunks.check_ready_and_mark_pending(range(first, first + 10))
        for chunk in mine:
            chunks.set_ready(chunk)
        os.write(into, len(mine).to_bytes(4, "little"))

    children = [in_child(claimer) for _ in range(3)]
    assert [join(pid) for pid in children] == [0] * 3
    os.close(into)
    assert sum(int.from_bytes(os.read(out, 4), "little") for _ in children) == 2000
    os.close(out)
    assert ChunkMap(segment).is_all_ready()
    segment.close()


@st.composite
def _layouts(draw: st.DrawFn) -> list[Place]:
    places = []
    end = 0
    for gap, size in draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60)), max_size=12)):
        places.append(Place(end + gap if size else end, size))
        end = places[-1].uoff + size
    return places


@settings(max_examples=150)
@given(places=_layouts(), at=st.integers(0, 5000), size=st.integers(1, 400))
def test_range_means_exactly_the_chunks_that_touch_it(places: list[Place], at: int, size: int) -> None:
    with segment_name() as name:
        segment = make_segment(name, places)
        limit = -(-segment.identity.size // 4096) * 4096
        ranges = RangeMap(segment)
        if at + size > limit:
            with pytest.raises(CacheError, match="outside"):
                ranges.chunks_of(at, size)
        else:
            touching = [i for i, p in enumerate(places) if p.usize and p.uoff < at + size and p.uoff + p.usize > at]
            first, count = ranges.chunks_of(at, size)
            found = [i for i in range(first, first + count) if places[i].usize]
            assert found == touching
        segment.close()


@pytest.mark.parametrize(("offset", "size"), [(0, 0), (0, -1), (-1, 5), (4096, 1), (0, 4097), (1 << 64, 1)])
def test_range_outside_the_blob_is_refused(name: str, offset: int, size: int) -> None:
    segment = make_segment(name, 3)
    with pytest.raises(CacheError, match="outside the blob's 4096 bytes"):
        RangeMap(segment).chunks_of(offset, size)
    segment.close()


def test_blob_without_chunks_is_all_ready(name: str) -> None:
    segment = make_segment(name, 0)
    assert ChunkMap(segment).is_all_ready()
    with pytest.raises(CacheError):
        RangeMap(segment).chunks_of(0, 1)
    segment.close()


@pytest.mark.parametrize(("flags", "after"), [(0, EMPTY), (int(ChunkFlag.CRC), VERIFY)])
def test_what_was_doubted_while_it_was_claimed_is_doubted(flags: int, after: int) -> None:
    with segment_name() as name:
        segment = make_segment(name, [Place(0, 100, flags=flags)] * 2, state=bytes([READY, READY]))
        chunks = ChunkMap(segment)
        doubts = chunks.claim_ready([0])
        chunks.keep_claimed(0, doubts)
        assert bytes(segment.state) == bytes([READY, READY])
        doubts = chunks.claim_ready([0])
        segment.doubts[0] += 1
        for chunk in range(2):
            chunks.keep_claimed(chunk, doubts)
        assert bytes(segment.state) == bytes([after, READY])
        segment.close()
