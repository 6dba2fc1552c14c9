"""The API's metrics, with the names and the ids that clients of the reference daemon know.

Runs in the supervisor; what needs all rows of a big table is left to the API process, which gets the table's name. An id is
the mount point (file system, backend) or the configuration's id (blob cache); each may be given in place of the other, with
or without the slash before it. Without an id there must be exactly one image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from nydusd.errors import NydusError
from nydusd.ipc.inflight import waiting
from nydusd.ipc.messages import Json
from nydusd.ipc.mount_counters import OPS as OPERATIONS
from nydusd.ipc.mount_counters import READ, totals
from nydusd.storage.cache.backend_counts import shown
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.supervisor.images import Image

if TYPE_CHECKING:
    from nydusd.supervisor.daemon import Supervisor


class NoCounterError(NydusError):
    """No image has this id, or none was given and there is not exactly one image."""

    rest_status = 404


def chosen(daemon: Supervisor, request: Json) -> Image:
    """The image that a request means. Raises NoCounterError."""
    wanted = request.get("id")
    images = list(daemon.images.values())
    if wanted is None:
        found = images if len(images) == 1 else []
    else:
        name = str(wanted)
        plain = name.strip("/")
        found = (
            [image for image in images if name and image.place.strip("/") == plain]
            or [image for image in images if image.config.id == name]
            or [image for image in images if plain and image.config.id.strip("/") == plain]
        )
    if not found:
        raise NoCounterError("Stats(NoCounter)")
    return found[0]


def _global(daemon: Supervisor, request: Json) -> Json:
    image = chosen(daemon, request)
    assert image.block is not None
    counted = totals(image.block)
    rafs = image.config.rafs
    latency = [0] * OPERATIONS
    latency[READ] = counted.read_microseconds
    return {
        "files_account_enabled": rafs is not None and rafs.iostats_files,
        "access_pattern_enabled": rafs is not None and rafs.access_pattern,
        "record_latest_read_files_enabled": rafs is not None and rafs.latest_read_files,
        "measure_latency": True,
        "id": image.place,
        "nr_opens": 0,  # the kernel opens files of an image without telling us
        "data_read": counted.read_bytes,
        "block_count_read": counted.sizes,
        "fop_hits": counted.hits,
        "fop_errors": counted.errors,
        "fop_cumulative_latency_total": latency,
        "read_latency_dist": counted.latencies,
    }


def _tables(daemon: Supervisor, request: Json) -> Json:
    """For the API process: the tables by file of all front ends, and which of the three counts are asked for."""
    image = chosen(daemon, request)
    rafs = image.config.rafs
    return {
        "tables": [f"{image.files}.{row}" for row in range(daemon.mounts.rows)] if image.counts_files else [],
        "files": rafs is not None and rafs.iostats_files,
        "pattern": rafs is not None and rafs.access_pattern,
        "latest": rafs is not None and rafs.latest_read_files,
        "told": request.get("latest"),
    }


def _backend(daemon: Supervisor, request: Json) -> Json:
    image = chosen(daemon, request)
    assert image.config.backend is not None
    return shown(image.config.backend.type, (cache.backend for cache in image.caches))


def _blobcache(daemon: Supervisor, request: Json) -> Json:
    wanted = request.get("id")
    if wanted is None and daemon.images and len({image.config.id for image in daemon.images.values()}) == 1:
        images = list(daemon.images.values())  # images whose configurations have the same id have the same counts
    else:
        images = [chosen(daemon, request)]
    caches = list({cache.handle: cache for image in images for cache in image.caches}.values())
    segments = [cache.segment.totals() for cache in caches if cache.segment is not None]
    hits, misses = sum(row[0] for row in segments), sum(row[2] for row in segments)
    begin = min((cache.prefetch.began for cache in caches if cache.prefetch.began), default=0.0)
    end = max((cache.prefetch.ended for cache in caches), default=0.0)
    return {
        "underlying_files": [cache.spec.data_path.name for cache in caches if cache.spec.data_path is not None],
        "store_path": next((cache.spec.work_dir for cache in caches if cache.spec.work_dir is not None), ""),
        # Whoever shows a ratio adds the two up. The reference's second one counts chunks that it checks at each hit.
        "partial_hits": hits,
        "whole_hits": 0,
        "total": hits + misses,
        "entries_count": sum(_ready(caches)),
        "prefetch_data_amount": sum(cache.prefetch.bytes for cache in caches),
        "prefetch_requests_count": sum(cache.prefetch.requests for cache in caches),
        "prefetch_workers": daemon.engine.decompress.size,
        "prefetch_unmerged_chunks": sum(cache.prefetch.chunks for cache in caches),
        "prefetch_cumulative_time_millis": round(sum(cache.prefetch.seconds for cache in caches) * 1000),
        "prefetch_begin_time_secs": int(begin),
        "prefetch_begin_time_millis": int(begin * 1000) % 1000,
        "prefetch_end_time_secs": int(end),
        "prefetch_end_time_millis": int(end * 1000) % 1000,
        "buffered_backend_size": daemon.engine.arena_bytes(),
        "data_all_ready": bool(caches) and all(map(_is_complete, caches)),
    }


def _ready(caches: Iterable[BlobCache]) -> list[int]:
    return [cache.chunk_map.ready_count() for cache in caches if cache.segment is not None]


def _is_complete(cache: BlobCache) -> bool:
    return cache.segment is not None and cache.chunk_map.ready_count() == cache.segment.count


def _inflight(daemon: Supervisor, _request: Json) -> object:
    return waiting(daemon.mounts.memory.board) or None


OPS: dict[str, Callable[[Supervisor, Json], object]] = {
    "metrics": _global,
    "metrics_tables": _tables,
    "metrics_backend": _backend,
    "metrics_blobcache": _blobcache,
    "metrics_inflight": _inflight,
}
