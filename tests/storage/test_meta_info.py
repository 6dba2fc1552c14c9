"""BlobMetaInfo: units, read-ahead and jobs, against plain definitions of them."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from nydusd.formats.model import ChunkFlag
from nydusd.storage.cache import meta_info
from nydusd.storage.cache.meta_info import BlobMetaInfo
from nydusd.storage.state.segment import EMPTY, READY
from tests.support.segments import Place, make_segment, segment_name

_GROUPED = ChunkFlag.BATCH | ChunkFlag.ZRAN


@st.composite
def _blobs(draw: st.DrawFn) -> list[Place]:
    """Chunks in runs: plain ones, batches and zran contexts; a group's chunks are neighbours."""
    places: list[Place] = []
    end = 0
    for ctx, (kind, sizes) in enumerate(
        draw(
            st.lists(
                st.tuples(
                    st.sampled_from([0, ChunkFlag.BATCH, ChunkFlag.ZRAN]), st.lists(st.integers(0, 90), min_size=1)
                ),
                max_size=6,
            )
        )
    ):
        for size in sizes:
            places.append(Place(end, size, size // 2 + 1, int(kind), ctx if kind else 0))
            end += size
    return places


def _unit(places: list[Place], chunk: int) -> list[int]:
    place = places[chunk]
    if not place.flags & _GROUPED:
        return [chunk]
    return [i for i, other in enumerate(places) if (other.flags, other.ctx) == (place.flags, place.ctx)]


@settings(max_examples=80)
@given(places=_blobs(), data=st.data())
def test_units_are_what_is_decoded_together(places: list[Place], data: st.DataObject) -> None:
    with segment_name() as name:
        segment = make_segment(name, places)
        meta = BlobMetaInfo(segment)
        assert [list(meta.unit(i)) for i in range(len(places))] == [_unit(places, i) for i in range(len(places))]
        chosen = data.draw(st.lists(st.integers(0, len(places) - 1))) if places else []
        assert meta.with_units(chosen) == sorted({i for chunk in chosen for i in _unit(places, chunk)})
        segment.close()


@settings(max_examples=80)
@given(places=_blobs(), limit=st.integers(0, 400), data=st.data())
def test_jobs_hold_each_chunk_once_and_whole_units(places: list[Place], limit: int, data: st.DataObject) -> None:
    with segment_name() as name:
        segment = make_segment(name, places)
        meta = BlobMetaInfo(segment)
        chosen = data.draw(st.sets(st.integers(0, len(places) - 1))) if places else set()
        chunks = meta.with_units(chosen)
        jobs = meta.split(chunks, limit)
        assert [chunk for job in jobs for chunk in job] == chunks
        assert all(jobs)
        for job in jobs:
            for chunk in job:
                assert set(_unit(places, chunk)) <= set(job), "a unit was cut"
            size = sum(places[chunk].usize for chunk in job)
            units = {sum(places[i].usize for i in _unit(places, chunk)) for chunk in job}
            assert size <= limit or size - max(units) <= limit, "more than a job's worth and a unit"
        segment.close()


@settings(max_examples=80)
@given(places=_blobs(), budget=st.integers(0, 300), data=st.data())
def test_ahead_gives_what_is_missing_within_the_budget(places: list[Place], budget: int, data: st.DataObject) -> None:
    state = bytes(data.draw(st.lists(st.sampled_from([EMPTY, READY]), min_size=len(places), max_size=len(places))))
    after = data.draw(st.integers(-1, len(places)))
    with segment_name() as name:
        segment = make_segment(name, places, state=state)
        expected = []
        spent = 0
        for i in range(after + 1, len(places)):
            spent += places[i].usize if places[i].flags & _GROUPED else places[i].csize
            if spent > budget:
                break
            if state[i] == EMPTY:
                expected.append(i)
        meta = BlobMetaInfo(segment)
        assert meta.ahead(after, budget)[0] == expected
        assert meta.bytes_of(segment.state) == sum(p.usize for p, s in zip(places, state, strict=True) if s == READY)
        segment.close()


def test_table_of_tiny_chunks_costs_the_supervisor_a_bounded_number_of_steps() -> None:
    many = meta_info._MANY
    one_unit = [Place(i, 1, 1, int(ChunkFlag.BATCH), 0) for i in range(5 * many)]
    with segment_name() as name:
        segment = make_segment(name, one_unit)
        meta = BlobMetaInfo(segment)
        unit = meta.unit(2 * many)
        assert 2 * many in unit and len(unit) <= 2 * many
        assert max(map(len, meta.split(range(5 * many), 1 << 30))) <= many
        assert len(meta.ahead(0, 1 << 30)[0]) <= many
        segment.close()
