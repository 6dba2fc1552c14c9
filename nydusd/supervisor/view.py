"""What an operator's tools are told beyond the API that clients know: processes, load, chunk maps, traces.

Part of the supervisor, called by `report.answer`. Plain data of its tables only; what costs a look at a process or at a
segment is added by the API process, for the supervisor's loop waits for nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from nydusd import logs
from nydusd.errors import NydusError
from nydusd.ipc.inflight import waiting
from nydusd.ipc.messages import Json
from nydusd.supervisor.mount_table import known_place
from nydusd.supervisor.outages import awaited
from nydusd.supervisor.uncached import told
from nydusd.version import GIT_COMMIT, build_info

if TYPE_CHECKING:
    from nydusd.supervisor.children import Child
    from nydusd.supervisor.daemon import Supervisor
    from nydusd.supervisor.images import Image


def _workers(daemon: Supervisor, _request: Json) -> Json:
    servers = daemon.fork_server
    rows = [_plain("supervisor", 0, daemon.pid, GIT_COMMIT)]
    if servers.stub:
        rows.append(_plain("stub", 0, servers.stub, GIT_COMMIT))
    rows += [_plain("fork server", index, pid, servers.commit) for index, pid in enumerate(servers.pids)]
    rows += [_process(daemon, child) for child in [*daemon.children, *daemon.engine.staff.on_trial()]]
    return {
        "processes": rows,
        "supervisor": daemon.pid,
        "uptime": time.monotonic() - daemon.started,
        "seats": daemon.engine.rest.seats.facts(),
    }


def _plain(role: str, index: int, pid: int, commit: str) -> Json:
    """A process that has no jobs and no place that another takes."""
    row: Json = {"role": role, "index": index, "pid": pid, "generation": 1, "commit": commit}
    return row | {"state": "running", "busy": None, "jobs": None, "deaths": 0, "starts_in": None}


def _process(daemon: Supervisor, child: Child) -> Json:
    row: Json = {
        "role": child.role,
        "index": child.index,
        "pid": child.pid,
        "generation": child.generation,
        "commit": child.commit,
        "state": "running",
        "busy": None,
        "jobs": None,
        "deaths": child.deaths,
        "starts_in": None if child.restart_at is None else round(max(0.0, child.restart_at - time.monotonic()), 1),
    }
    pool = daemon.engine.pools.get(child.role)
    if child.process is None:
        row["state"] = "resting" if child.resting else "restarting"
    elif child in daemon.engine.staff.on_trial():
        row["state"] = "on trial"
    elif pool is not None:
        row |= pool.facts(child.identity)
        busy = row["busy"] is not None
        row["state"] = "leaving" if child.leaving else "busy" if busy else "idle" if row["ready"] else "starting"
    return row


def _load(daemon: Supervisor, _request: Json) -> Json:
    """Totals that only grow, and what waits now; whoever asks twice can tell rates."""
    caches = {cache.handle: cache for image in daemon.images.values() for cache in image.caches}
    totals = [cache.segment.totals() for cache in caches.values() if cache.segment is not None]
    names = ("hits", "hit_bytes", "misses", "miss_bytes", "errors")
    return {
        "time": time.monotonic(),
        "state": daemon.state,
        "images": list(daemon.images),
        "blobs": len(caches),
        "waiting": daemon.engine.router.waiting(),
        "arena_bytes": daemon.engine.arena_bytes(),
        "pools": {role: pool.load() for role, pool in daemon.engine.pools.items()},
        "reads": {name: sum(row[field] for row in totals) for field, name in enumerate(names)},
        "prefetch": {"requests": daemon.prefetch.requests, "bytes": daemon.prefetch.bytes},
    }


def _chunks(daemon: Supervisor, request: Json) -> Json:
    """The segments of the blobs whose id begins with the text asked for; the API process looks into them."""
    wanted = request.get("blob_id") or ""
    blobs: Json = {}
    for image in daemon.images.values():
        for cache in image.caches:
            name = cache.spec.info.blob_id
            if name.startswith(str(wanted)) and cache.segment is not None:
                row = {"blob_id": name, "segment": cache.spec.segment, "mountpoints": []}
                blobs.setdefault(cache.spec.segment, row)["mountpoints"].append(image.place)
    return {"blobs": list(blobs.values())}


def _trace(daemon: Supervisor, request: Json) -> Json:
    """For each image, or the one asked for: where its trace lies, and what is needed to put names to its inodes."""
    wanted = None if request.get("mountpoint") is None else known_place(str(request["mountpoint"]))
    return {
        "images": [
            {
                "mountpoint": image.place,
                "trace": image.trace,
                "bootstrap": image.metadata.bootstrap,
                "path_id": image.metadata.path_id,
                "extracted": image.metadata.extracted,
                "blobs": [cache.spec.info.blob_id for cache in image.caches],
            }
            for image in daemon.images.values()
            if wanted is None or image.place == wanted
        ]
    }


def _prometheus(daemon: Supervisor, request: Json) -> Json:
    """All that the API process makes a page of metrics from."""
    from nydusd.supervisor.metrics_ops import OPS as KNOWN

    def ask(op: str, **query: object) -> object:
        try:
            return KNOWN[op](daemon, {"op": op, **query})
        except NydusError:
            return None  # unmounted, or not counted

    images = []
    blobs: dict[str, Json] = {}
    for image in daemon.images.values():
        backend = image.config.backend
        images.append(
            {
                "place": image.place,
                "backend": "" if backend is None else backend.type,
                "fs": ask("metrics", id=image.place),
                "backend_metrics": ask("metrics_backend", id=image.place),
                "blobcache": ask("metrics_blobcache", id=image.config.id),
            }
        )
        for cache in image.caches:
            info = cache.spec.info
            blobs[cache.spec.segment] = {
                "blob_id": info.blob_id,
                "segment": cache.spec.segment,
                "uncompressed_size": info.uncompressed_size,
                "data_file": None if cache.spec.data_path is None else str(cache.spec.data_path),
            }
    return {
        "version": build_info(),
        "id": daemon.options.id,
        "images": images,
        "blobs": list(blobs.values()),
        "load": _load(daemon, request),
        "waits": [max(0.0, time.time() - row["timestamp_secs"]) for row in waiting(daemon.mounts.memory.board)],
        "folders": daemon.engine.quota.facts(),
        **_workers(daemon, request),
    }


def _gc(daemon: Supervisor, request: Json) -> Json:
    target = request.get("target")
    return {"folders": daemon.engine.quota.order(target if isinstance(target, int) else None)}


def _quota(daemon: Supervisor, _request: Json) -> Json:
    return {"folders": daemon.engine.quota.facts()}


def _mounts(daemon: Supervisor, _request: Json) -> Json:
    """Of each image whether all of it is here, and if not, why not; and where the log is."""
    images = []
    for image in daemon.images.values():
        ready = chunks = 0
        failed, uncached = [], []
        for cache in image.caches:
            chunks += cache.spec.info.chunk_count if cache.segment is None else cache.segment.count
            ready += 0 if cache.segment is None else cache.chunk_map.ready_count()
            if cache.state == "failed":
                failed.append(f"blob {cache.spec.info.blob_id} cannot be opened: {cache.reason}")
            elif cache.outage:
                failed.append(f"readers wait for {awaited(cache)}: {cache.outage}")
            if cache.no_room_until:
                uncached.append(told(cache))
        images.append(
            {
                "mountpoint": image.place,
                "chunks": chunks,
                "ready": ready,
                "failed": failed,
                "uncached": uncached,
                "why": _why(daemon, image, failed + uncached, ready < chunks),
                "front_end": daemon.front_end[0],
                "why_front_end": daemon.front_end[1],
            }
        )
    return {"images": images, "log": {"file": logs.current_file()}}


def _why(daemon: Supervisor, image: Image, failed: list[str], lazy: bool) -> str:
    if failed:
        return failed[0]
    if not lazy:
        return "nothing is fetched any more"
    if not all(cache.caches for cache in image.caches):
        return "no cache folder is configured, so nothing is kept"
    settings = image.config.rafs.prefetch if image.config.rafs is not None else None
    if settings is None or not settings.enable:
        return "chunks are fetched when they are read, prefetch is off"
    if not daemon.prefetch.idle():
        return "prefetch is under way"
    return "prefetch is done with what it was told, the rest is fetched when it is read"


def _scale(daemon: Supervisor, request: Json) -> Json:
    return daemon.engine.staff.scale(request["wanted"])


OPS: dict[str, Callable[[Supervisor, Json], Json | None]] = {
    "workers": _workers,
    "scale_workers": _scale,
    "load": _load,
    "chunks": _chunks,
    "trace": _trace,
    "prometheus": _prometheus,
    "gc": _gc,
    "mounts": _mounts,
    "quota": _quota,
}
