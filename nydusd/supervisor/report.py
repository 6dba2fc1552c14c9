"""What the supervisor tells of itself: the answers behind the API. Plain data; the API process puts it into HTTP."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from nydusd.errors import ConfigError, NydusError
from nydusd.ipc.messages import Json
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.supervisor import blobs, control_ops, metrics_ops, mount_ops, view
from nydusd.supervisor.mount_table import PlaceError, known_place

if TYPE_CHECKING:
    from nydusd.supervisor.daemon import Supervisor
    from nydusd.supervisor.images import Image
    from nydusd.supervisor.mount_records import Recorded


def answer(daemon: Supervisor, request: Json, reply: Callable[[Json], object]) -> None:
    """Reply to a control request, now or later: {"ok": …} or {"error": {"status", "message"}}."""
    op = str(request.get("op"))
    later = _LATER.get(op)
    handler = (
        _OPS.get(op) or control_ops.OPS.get(op) or metrics_ops.OPS.get(op) or blobs.OPS.get(op) or view.OPS.get(op)
    )
    try:
        if later is not None:
            later(daemon, request, reply)
        elif handler is not None:
            reply({"ok": handler(daemon, request)})
        else:
            reply({"error": {"status": 501, "message": f"operation {request.get('op')!r} is not supported"}})
    except NydusError as e:
        reply({"error": {"status": e.rest_status, "message": str(e)}})


def _daemon(daemon: Supervisor, _request: Json) -> Json:
    from nydusd.cli.options import SingletonOptions
    from nydusd.config import redacted
    from nydusd.version import build_info

    images = {}
    mounted: list[Image | Recorded] = [*daemon.images.values(), *daemon.coming.values()]
    for image in mounted:
        try:
            config = redacted(image.config)
        except ConfigError:
            continue  # a killed supervisor had it mounted, and it is about to be unmounted
        stamp = image.mounted_at
        images[image.place] = {
            "backend_type": "Rafs",
            "mountpoint": image.place,
            "mounted_time": f"{stamp:%Y-%m-%d %H:%M:%S}.{stamp.microsecond:06}000 +00:00:00",
            "config": config,
        }
    return {
        "version": build_info(),
        "id": daemon.options.id,
        "supervisor": daemon.options.supervisor,
        "state": daemon.state,
        "backend_collection": None if isinstance(daemon.options, SingletonOptions) else images,
    }


def _backend(daemon: Supervisor, request: Json) -> Json:
    image = daemon.images.get(known_place(str(request.get("mountpoint"))))
    if image is None:
        raise PlaceError("object or filesystem doesn't exist")
    return dict(image.facts)


def _blob(cache: BlobCache, place: str) -> Json:
    info = cache.spec.info
    row: Json = {
        "blob_id": info.blob_id,
        "mountpoint": place,
        "chunks": info.chunk_count,
        "ready": 0,
        "pending": 0,
        "failed": 0,
        "uncompressed_size": info.uncompressed_size,
        "ready_bytes": 0,
        "compressed_size": info.compressed_size,
        "hits": 0,
        "hit_bytes": 0,
        "misses": 0,
        "miss_bytes": 0,
        "errors": 0,
        "data_file": None if cache.spec.data_path is None else str(cache.spec.data_path),
        "state": "preparing" if cache.state == "new" else cache.state,
        "reason": cache.reason or cache.outage or None,
    }
    segment = cache.segment
    if segment is not None:
        counts = cache.chunk_map.counts()
        row["chunks"] = segment.count
        row |= {key: counts[key] for key in ("ready", "pending", "failed")}
        row["uncompressed_size"] = segment.identity.size
        row["ready_bytes"] = cache.meta.bytes_of(cache.chunk_map.states())
        row["hits"], row["hit_bytes"], row["misses"], row["miss_bytes"], row["errors"], _ = segment.totals()
    return row


def _cache(daemon: Supervisor, _request: Json) -> Json:
    blobs = [_blob(cache, image.place) for image in daemon.images.values() for cache in image.caches]
    return {
        "blobs": blobs,
        "arena_bytes": daemon.engine.arena_bytes(),
        "waiting": daemon.engine.router.waiting(),
    }


def _set_log_level(daemon: Supervisor, request: Json) -> None:
    from nydusd import logs

    level = str(request.get("log_level", "")).lower()
    try:
        logs.set_level(level)
    except ValueError as e:
        raise ConfigError(f"log_level: {request.get('log_level')!r}: {e}") from e


def _exit(daemon: Supervisor, _request: Json) -> None:
    daemon.exit()


def _upgrade(daemon: Supervisor, _request: Json, reply: Callable[[Json], object]) -> None:
    daemon.engine.staff.upgrade(reply)


_LATER: dict[str, Callable[[Supervisor, Json, Callable[[Json], object]], None]] = {
    **blobs.LATER,
    "upgrade_workers": _upgrade,
    **mount_ops.OPS,
}
"""Operations that reply when they are done."""

_OPS: dict[str, Callable[[Supervisor, Json], object]] = {
    "daemon": _daemon,
    "backend": _backend,
    "cache": _cache,
    "set_log_level": _set_log_level,
    "exit": _exit,
}
