"""PrefetchWorker and its limiter: order, what is passed over, what waits, and how fast."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nydusd.formats.model import ChunkFlag
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.cache.pace import Limiter, Pace
from nydusd.storage.cache.prefetch import PrefetchWorker
from nydusd.storage.cache.spec import BlobSpec
from nydusd.storage.state.segment import EMPTY, FAILED, PENDING, READY, VERIFY
from tests.support.blobs import blob_info
from tests.support.segments import Place, make_segment, segment_name

BATCH = 128 << 10


class Caches:
    """Makes blob caches that are open, with chunks of 32 KiB that are 10,000 bytes when stored."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.made: list[BlobCache] = []

    def __call__(self, chunks: int = 20, flags: int = 0, *, work_dir: str | None = "/nowhere") -> BlobCache:
        name = f"{self._name}-{len(self.made)}"
        places = [Place(i << 15, 1 << 15, 10_000, flags, i // 4) for i in range(chunks)]
        make_segment(name, places).close()
        cache = BlobCache(
            BlobSpec(
                handle=len(self.made),
                generation=1,
                info=blob_info(),
                segment=name,
                work_dir=work_dir,
                meta_dir="/nowhere",
                bootstrap="",
                path_id=None,
                extracted=False,
                backend="localfs",
                backend_config={},
                always_verify=False,
            )
        )
        cache.opened()
        self.made.append(cache)
        return cache


@pytest.fixture
def caches() -> Iterator[Caches]:
    with segment_name() as name:
        made = Caches(name)
        yield made
        for cache in made.made:
            cache.close()


def _drain(worker: PrefetchWorker, now: float = 0.0) -> list[tuple[BlobCache, list[int]]]:
    found = []
    while (taken := worker.take(now)) is not None:
        found.append((taken[0], list(taken[1])))
    return found


def test_runs_come_in_order_in_batches(caches: Caches) -> None:
    one, two = caches(), caches(6)
    worker = PrefetchWorker()
    assert worker.idle()
    worker.want(two, 3, 2)
    worker.want(one, 0, -1)
    worker.want(two, 5, 100)
    assert not worker.idle()
    assert _drain(worker) == [(two, [3, 4])] + [(one, list(range(i, i + 4))) for i in range(0, 20, 4)] + [(two, [5])]
    assert worker.idle()
    assert (worker.requests, worker.bytes) == (7, 23 << 15)


def test_chunks_that_are_there_or_under_way_are_passed_over(caches: Caches) -> None:
    cache = caches(10)
    assert cache.segment is not None
    cache.segment.state[:] = bytes([READY, EMPTY, PENDING, VERIFY, READY, READY, FAILED, EMPTY, READY, READY])
    worker = PrefetchWorker()
    worker.want(cache, 0, -1)
    assert _drain(worker) == [(cache, [1, 3, 7])]
    assert worker.idle()


def test_blob_that_is_not_open_waits_and_is_taken_up_in_its_place(caches: Caches) -> None:
    closed, opened = caches(2), caches(2)
    closed.state = "preparing"
    worker = PrefetchWorker()
    worker.want(closed, 0, 1)
    worker.want(opened, 0, 2)
    worker.want(closed, 1, 1)
    assert _drain(worker) == [(opened, [0, 1])]
    assert list(worker.aside()) == [closed] and not worker.idle()
    assert worker.wait(0.0) is None, "only an event can bring more"
    worker.want(opened, 0, 1)
    closed.state = "ready"
    assert _drain(worker) == [(closed, [0]), (closed, [1]), (opened, [0])]
    assert worker.idle() and not worker.aside()


def test_full_disk_and_dummy_cache_set_a_blob_aside(caches: Caches) -> None:
    full, dummy = caches(2), caches(2, work_dir=None)
    full.no_room_until = time.monotonic() + 1000
    worker = PrefetchWorker()
    for cache in (full, dummy):
        worker.want(cache, 0, -1)
    assert _drain(worker) == []
    assert set(worker.aside()) == {full, dummy}
    full.no_room_until = 0.0
    assert _drain(worker) == [(full, [0, 1])]


def test_failed_blob_is_looked_at_again_after_its_back_off(caches: Caches) -> None:
    cache = caches(2)
    cache.open_failed("away")
    worker = PrefetchWorker()
    worker.want(cache, 0, -1)
    assert _drain(worker) == []
    assert worker.wait(cache.retry_at - 0.25) == pytest.approx(0.25)


def test_cancelled_blob_is_forgotten_queued_or_aside(caches: Caches) -> None:
    gone, kept = caches(2), caches(2)
    worker = PrefetchWorker()
    worker.want(gone, 0, 1)
    gone.state = "preparing"
    assert _drain(worker) == []
    worker.want(gone, 1, 1)
    worker.want(kept, 0, 1)
    worker.cancel(gone)
    gone.state = "ready"
    assert _drain(worker) == [(kept, [0])]
    assert worker.idle()


@pytest.mark.parametrize(("flags", "cost"), [(0, 10_000), (ChunkFlag.BATCH, 1 << 15)])
def test_limit_counts_stored_bytes(caches: Caches, flags: int, cost: int) -> None:
    worker = PrefetchWorker()
    cache = caches(20, flags)
    cache.paces.append(Pace(BATCH, 100_000))
    worker.want(cache, 0, -1)
    now = 50.0
    taken = 0
    while not worker.idle():
        if worker.take(now) is None:
            wait = worker.wait(now)
            assert wait is not None and wait > 0
            now += wait + 1e-9
        else:
            taken += 1
    assert taken == 5
    # The last batch need not have been waited for; a tenth of a second's worth is for free.
    assert now - 50 == pytest.approx((16 * cost - 10_000) / 100_000)


def test_each_image_has_its_own_batches_and_limit_and_none_waits_for_another(caches: Caches) -> None:
    slow, slow_too, fast = caches(), caches(), caches(8)
    pace = Pace(BATCH, 10_000)
    for cache in (slow, slow_too):
        cache.paces.append(pace)
    fast.paces.append(Pace(4 * BATCH))
    worker = PrefetchWorker()
    for cache in (slow, slow_too, fast):
        worker.want(cache, 0, -1)
    assert _drain(worker, 50.0) == [(slow, [0, 1, 2, 3]), (fast, list(range(8)))], (
        "the image's limit is that of all its blobs"
    )
    assert not worker.idle()
    wait = worker.wait(50.0)
    assert wait == pytest.approx(3.9)
    assert _drain(worker, 50.0 + 3.9 + 1e-6) == [(slow, [4, 5, 6, 7])]


def test_of_several_mounts_of_one_image_the_last_one_says_how_fast_and_what_is_left_of_it_holds(caches: Caches) -> None:
    cache, first, second = caches(), Pace(), Pace()
    cache.paces += [first, second]
    assert cache.pace is second
    cache.leave(second)
    assert cache.pace is first
    cache.leave(first)
    assert cache.pace is first, "the kernel may read on, or a prefetch be under way"


@given(
    rate=st.integers(1, 10**9),
    steps=st.lists(st.tuples(st.floats(0, 10), st.integers(0, 10**9)), max_size=30),
)
def test_limiter_never_gives_more_than_its_rate(rate: int, steps: list[tuple[float, int]]) -> None:
    limiter = Limiter(rate)
    now = 100.0
    spent = 0
    last = 0
    for pause, size in steps:
        now += pause
        now += limiter.wait(now)
        assert spent - last <= rate * (now - 100) + min(rate / 10, 16 << 20) + rate * 1e-3
        assert limiter.wait(now) <= 1e-3
        limiter.spend(now, size)
        spent += size
        last = size
    assert Limiter(0).wait(now) == 0.0
