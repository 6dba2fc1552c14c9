"""The metrics of a daemon for Prometheus: what there is (`FAMILIES`, of which docs/metrics.md is made), where it comes from.

Runs in the API process. The supervisor gives its tables as plain data; memory of processes, chunk states and disk use are
looked up here. A part that cannot be had is left out of the page.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Final

from nydusd.control.enrich import Json, memory_of, node_of
from nydusd.control.exposition import Family, Page
from nydusd.errors import NydusError

_IMAGE = ("image_ref",)
_BLOB = ("blob",)
_FOLDER = ("folder",)
_PROCESS = ("role", "index")

FAMILIES: Final = (
    # The daemon
    Family("nydusd_info", "gauge", "1", ("version", "commit"), "Which build this daemon is."),
    Family("nydusd_state", "gauge", "1", ("state",), "1 for the state that the daemon is in."),
    Family("nydusd_uptime_seconds", "gauge", "seconds", (), "Time since the daemon started."),
    Family("nydusd_images", "gauge", "images", (), "Images that are mounted."),
    Family(
        "nydusd_image_info",
        "gauge",
        "1",
        ("daemon_id", "image_ref", "backend"),
        "An image that the daemon serves.",
        kept=True,
    ),
    Family("nydusd_rss_kilobytes", "gauge", "KiB", ("daemon_id",), "Resident memory of all processes.", kept=True),
    Family("nydusd_process_resident_memory_bytes", "gauge", "bytes", _PROCESS, "Resident memory of a process."),
    Family(
        "nydusd_process_proportional_memory_bytes",
        "gauge",
        "bytes",
        _PROCESS,
        "The same, shared pages by their share (PSS): only these may be added up.",
    ),
    Family("nydusd_processes", "gauge", "processes", ("role",), "Processes that run."),
    Family("nydusd_process_restarts_total", "counter", "restarts", ("role",), "Processes that were started again."),
    # What was asked of the file system
    Family("nydusd_total_read_bytes", "gauge", "bytes", _IMAGE, "Bytes read from an image, ever.", kept=True),
    Family("nydusd_read_hits", "gauge", "reads", _IMAGE, "Reads that succeeded, ever.", kept=True),
    Family("nydusd_read_errors", "gauge", "reads", _IMAGE, "Reads that failed, ever.", kept=True),
    Family("nydusd_operations_total", "counter", "operations", ("image_ref", "operation"), "File system operations."),
    Family(
        "nydusd_operation_failures_total",
        "counter",
        "operations",
        ("image_ref", "operation"),
        "File system operations that failed, an absent file or attribute not counted.",
    ),
    Family("nydusd_read_latency_seconds", "histogram", "seconds", _IMAGE, "Time from a read's arrival to its answer."),
    Family(
        "nydusd_cumulative_read_block_bytes",
        "histogram",
        "bytes",
        _IMAGE,
        "Reads by their size. The bounds are bytes, as the name says; the exporter's are KiB.",
        kept=True,
    ),
    Family("nydusd_hung_io_counts", "gauge", "reads", (), "Reads that have waited for 10 s or longer.", kept=True),
    Family("nydusd_waiting_reads", "gauge", "reads", (), "Reads that wait for chunks now."),
    Family("nydusd_longest_wait_seconds", "gauge", "seconds", (), "For how long the oldest of them has waited."),
    # The cache
    Family(
        "nydusd_chunk_reads_total",
        "counter",
        "reads",
        ("blob", "result"),
        "Pieces of chunks that were read: `hit` from the cache file, `miss` after waiting for a worker.",
    ),
    Family("nydusd_chunk_read_bytes_total", "counter", "bytes", ("blob", "result"), "The same in bytes."),
    Family("nydusd_chunk_read_failures_total", "counter", "reads", _BLOB, "Reads of a blob that ended with an error."),
    Family("nydusd_chunks", "gauge", "chunks", ("blob", "state"), "Chunks of a blob by their state."),
    Family("nydusd_blob_bytes", "gauge", "bytes", _BLOB, "Plain length of a blob: what its cache file will hold."),
    Family("nydusd_cache_allocated_bytes", "gauge", "bytes", _BLOB, "Disk space that a cache file takes now."),
    Family("nydusd_cache_free_bytes", "gauge", "bytes", _FOLDER, "Free space of the file system of a cache folder."),
    Family(
        "nydusd_cache_quota_bytes",
        "gauge",
        "bytes",
        _FOLDER,
        "What a cache folder may take; none if there is no quota.",
    ),
    Family(
        "nydusd_cache_used_bytes", "gauge", "bytes", _FOLDER, "What it took when it was last looked at for its quota."
    ),
    Family("nydusd_evicted_chunks_total", "counter", "chunks", _FOLDER, "Chunks that were taken out to make room."),
    Family("nydusd_evicted_bytes_total", "counter", "bytes", _FOLDER, "The same in bytes of disk."),
    Family("nydusd_removed_blobs_total", "counter", "blobs", _FOLDER, "Unused blobs that were removed to make room."),
    Family("nydusd_cache_partial_hits", "gauge", "reads", _IMAGE, "Reads that missed nothing, ever.", kept=True),
    Family("nydusd_cache_whole_hits", "gauge", "reads", _IMAGE, "Always 0: they are in the partial hits.", kept=True),
    Family("nydusd_cache_total_requests", "gauge", "reads", _IMAGE, "Reads of the cache, ever.", kept=True),
    Family("nydusd_cache_entries_count", "gauge", "chunks", _IMAGE, "Chunks that are ready.", kept=True),
    Family("nydusd_cache_prefetch_data_bytes", "gauge", "bytes", _IMAGE, "Stored bytes prefetched, ever.", kept=True),
    Family("nydusd_cache_prefetch_requests_count", "gauge", "requests", _IMAGE, "Prefetch requests.", kept=True),
    Family("nydusd_cache_prefetch_workers", "gauge", "workers", _IMAGE, "Workers that may prefetch.", kept=True),
    Family(
        "nydusd_cache_prefetch_unmerged_chunks", "gauge", "chunks", _IMAGE, "Chunks of these requests, ever.", kept=True
    ),
    Family(
        "nydusd_cache_prefetch_cumulative_time_millis",
        "gauge",
        "milliseconds",
        _IMAGE,
        "Time that these requests took, added up, ever.",
        kept=True,
    ),
    Family(
        "nydusd_cache_prefetch_duration_millis",
        "gauge",
        "milliseconds",
        _IMAGE,
        "From the begin of the first to the end of the last of them.",
        kept=True,
    ),
    Family("nydusd_cache_buffered_backend_size", "gauge", "bytes", _IMAGE, "Fetched, not yet written.", kept=True),
    # Where data comes from
    Family("nydusd_backend_requests_total", "counter", "requests", ("image_ref", "backend"), "Requests to a backend."),
    Family(
        "nydusd_backend_failures_total",
        "counter",
        "requests",
        ("image_ref", "backend"),
        "Requests to a backend that failed, all their retries included.",
    ),
    Family(
        "nydusd_backend_read_bytes_total", "counter", "bytes", ("image_ref", "backend"), "Bytes read from a backend."
    ),
    Family(
        "nydusd_backend_latency_seconds",
        "histogram",
        "seconds",
        ("image_ref", "backend"),
        "Duration of requests to a backend that succeeded.",
    ),
    Family(
        "nydusd_fetched_bytes_total",
        "counter",
        "bytes",
        ("cause",),
        "Stored bytes read from backends: `on_demand` a reader waited, `read_ahead` of one, `prefetch` before any.",
    ),
    Family(
        "nydusd_route_bytes_total",
        "counter",
        "bytes",
        ("route",),
        "Stored bytes that came from the `origin`, through the `proxy`, or from a `mirror`; HTTP backends only.",
    ),
    Family("nydusd_prefetch_requests_total", "counter", "requests", (), "Batches of chunks that were prefetched."),
    Family("nydusd_prefetch_bytes_total", "counter", "bytes", (), "Plain bytes of these batches."),
    # Workers
    Family("nydusd_workers", "gauge", "workers", ("pool", "state"), "Workers of a pool: `busy` or `idle`."),
    Family("nydusd_jobs_queued", "gauge", "jobs", ("pool", "priority"), "Jobs that wait for a worker."),
    Family("nydusd_jobs_total", "counter", "jobs", ("pool",), "Jobs that were done."),
    Family("nydusd_job_failures_total", "counter", "jobs", ("pool",), "Jobs of which a part failed."),
    Family(
        "nydusd_node_workers",
        "gauge",
        "workers",
        ("pool", "state"),
        "Of all daemons that share the node's workers: `seats` that there are, and those `taken`.",
    ),
    Family(
        "nydusd_node_waiting_daemons", "gauge", "daemons", ("pool",), "Daemons that have no worker and wait for one."
    ),
    Family(
        "nydusd_seat_waits_total", "counter", "waits", ("pool",), "How often this daemon had none and asked for one."
    ),
    Family("nydusd_seat_wait_seconds_total", "counter", "seconds", ("pool",), "How long it waited for one."),
    Family("nydusd_shared_memory_bytes", "gauge", "bytes", (), "Data on its way through shared memory."),
)

OPERATIONS: Final = (
    *("getattr", "readlink", "open", "release", "read", "statfs", "getxattr", "listxattr"),
    *("opendir", "lookup", "readdir", "readdirplus", "access", "forget", "batchforget"),
)
"""In the order of `fop_hits` of GET /api/v1/metrics."""
_READ_BOUNDS: Final = (200e-6, 0.001, 0.02, 0.05, 0.5, 1.0, 2.0)
_SIZE_BOUNDS: Final = tuple((kib << 10) - 1 for kib in (1, 4, 16, 64, 128, 512, 1024))
"""The most bytes of each class but the last."""
_BACKEND_BOUNDS: Final = (0.001, 0.02, 0.05, 0.1, 0.5, 1.0, 2.0)
_CAUSES: Final = {"user": "on_demand", "ahead": "read_ahead", "prefetch": "prefetch"}
HUNG_SECONDS: Final = 10.0


def page(facts: Json) -> str:
    """The text of a scrape from what the supervisor said."""
    out = Page(FAMILIES)
    _add_daemon(out, facts)
    for image in _rows(facts, "images"):
        _add_image(out, image)
    folders: set[str] = set()
    for blob in _rows(facts, "blobs"):
        _add_blob(out, blob, folders)
    for folder in sorted(folders):
        out.add("nydusd_cache_free_bytes", _free(folder), folder=folder)
    for folder, row in _table(facts, "folders").items():
        _add_folder(out, str(folder), row)
    _add_load(out, _table(facts, "load"))
    _add_seats(out, _table(facts, "seats"))
    waits = [wait for wait in _list(facts, "waits") if isinstance(wait, int | float)]
    out.add("nydusd_waiting_reads", len(waits))
    out.add("nydusd_longest_wait_seconds", max(waits, default=0.0))
    out.add("nydusd_hung_io_counts", sum(wait >= HUNG_SECONDS for wait in waits))
    return out.text()


def _table(data: object, key: str) -> Mapping[str, object]:
    value = data.get(key) if isinstance(data, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def _list(data: object, key: str) -> list[object]:
    value = data.get(key) if isinstance(data, Mapping) else None
    return value if isinstance(value, list) else []


def _rows(data: object, key: str) -> Iterator[Mapping[str, object]]:
    return (row for row in _list(data, key) if isinstance(row, Mapping))


def _add_daemon(out: Page, facts: Json) -> None:
    version = _table(facts, "version")
    out.add("nydusd_info", 1, version=str(version.get("package_ver")), commit=str(version.get("git_commit")))
    state = str(_table(facts, "load").get("state"))
    for name in dict.fromkeys(("INIT", "READY", "RUNNING", "STOPPED", state)):
        out.add("nydusd_state", int(name == state), state=name)
    out.add("nydusd_uptime_seconds", facts.get("uptime"))
    daemon = str(facts.get("id") or "")
    images = list(_rows(facts, "images"))
    out.add("nydusd_images", len(images))
    for image in images:
        out.add(
            "nydusd_image_info",
            1,
            daemon_id=daemon,
            image_ref=str(image.get("place")),
            backend=str(image.get("backend")),
        )
    rss = 0
    roles: dict[str, list[int]] = {}
    for process in _rows(facts, "processes"):
        role, pid, generation = str(process.get("role")), process.get("pid"), process.get("generation")
        counts = roles.setdefault(role, [0, 0])
        counts[1] += generation - 1 if isinstance(generation, int) else 0
        if not isinstance(pid, int) or pid <= 0:
            continue
        counts[0] += 1
        memory = memory_of(pid)
        own = {"role": role, "index": str(process.get("index"))}
        out.add("nydusd_process_resident_memory_bytes", memory["rss_bytes"], **own)
        out.add("nydusd_process_proportional_memory_bytes", memory["pss_bytes"], **own)
        rss += memory["rss_bytes"] if isinstance(memory["rss_bytes"], int) else 0
    out.add("nydusd_rss_kilobytes", rss / 1024, daemon_id=daemon)
    for role, (running, restarts) in roles.items():
        out.add("nydusd_processes", running, role=role)
        out.add("nydusd_process_restarts_total", max(restarts, 0), role=role)


def _add_image(out: Page, image: Mapping[str, object]) -> None:
    place = str(image.get("place"))
    own = {"image_ref": place}
    fs = _table(image, "fs")
    hits, errors = _list(fs, "fop_hits"), _list(fs, "fop_errors")
    out.add("nydusd_total_read_bytes", fs.get("data_read"), **own)
    for operation, hit, error in zip(OPERATIONS, hits, errors, strict=False):
        out.add("nydusd_operations_total", hit, operation=operation, **own)
        out.add("nydusd_operation_failures_total", error, operation=operation, **own)
        if operation == "read":
            out.add("nydusd_read_hits", hit, **own)
            out.add("nydusd_read_errors", error, **own)
    total = _list(fs, "fop_cumulative_latency_total")
    spent = total[OPERATIONS.index("read")] if len(total) == len(OPERATIONS) else None
    seconds = spent / 1e6 if isinstance(spent, int | float) else None
    out.histogram("nydusd_read_latency_seconds", _READ_BOUNDS, fs.get("read_latency_dist"), seconds, **own)

    amount = fs.get("data_read")
    out.histogram("nydusd_cumulative_read_block_bytes", _SIZE_BOUNDS, fs.get("block_count_read"), amount, **own)

    cache = _table(image, "blobcache")
    for name, key in (
        ("partial_hits", "partial_hits"),
        ("whole_hits", "whole_hits"),
        ("total_requests", "total"),
        ("entries_count", "entries_count"),
        ("prefetch_data_bytes", "prefetch_data_amount"),
        ("prefetch_requests_count", "prefetch_requests_count"),
        ("prefetch_workers", "prefetch_workers"),
        ("prefetch_unmerged_chunks", "prefetch_unmerged_chunks"),
        ("prefetch_cumulative_time_millis", "prefetch_cumulative_time_millis"),
        ("buffered_backend_size", "buffered_backend_size"),
    ):
        out.add(f"nydusd_cache_{name}", cache.get(key), **own)

    begin, end = (_millis(cache, f"prefetch_{moment}_time") for moment in ("begin", "end"))
    out.add("nydusd_cache_prefetch_duration_millis", max(0.0, end - begin), **own)

    backend = _table(image, "backend_metrics")
    own["backend"] = str(image.get("backend"))
    out.add("nydusd_backend_requests_total", backend.get("read_count"), **own)
    out.add("nydusd_backend_failures_total", backend.get("read_errors"), **own)
    out.add("nydusd_backend_read_bytes_total", backend.get("read_amount_total"), **own)
    matrix = [row for row in _list(backend, "read_latency_sizes_dist") if isinstance(row, list) and len(row) == 8]
    millis = backend.get("read_cumulative_latency_millis_total")
    if matrix and isinstance(millis, int | float):
        counts = [sum(column) for column in zip(*matrix, strict=True)]
        out.histogram("nydusd_backend_latency_seconds", _BACKEND_BOUNDS, counts, millis / 1000, **own)


def _millis(cache: Mapping[str, object], name: str) -> float:
    return _number(cache, f"{name}_secs") * 1000 + _number(cache, f"{name}_millis")


def _add_folder(out: Page, folder: str, row: object) -> None:
    if quota := _number(row, "quota"):
        out.add("nydusd_cache_quota_bytes", quota, folder=folder)
    out.add("nydusd_cache_used_bytes", row.get("used") if isinstance(row, Mapping) else None, folder=folder)
    out.add("nydusd_evicted_chunks_total", _number(row, "evicted_chunks"), folder=folder)
    out.add("nydusd_evicted_bytes_total", _number(row, "evicted_bytes"), folder=folder)
    out.add("nydusd_removed_blobs_total", _number(row, "removed_blobs"), folder=folder)


def _add_blob(out: Page, row: Mapping[str, object], folders: set[str]) -> None:
    from nydusd.storage.state.segment import EMPTY, FAILED, PENDING, READY, VERIFY, Segment

    name = str(row.get("blob_id"))
    out.add("nydusd_blob_bytes", row.get("uncompressed_size"), blob=name)
    path = row.get("data_file")
    if isinstance(path, str):
        folders.add(os.path.dirname(path))
        with contextlib.suppress(OSError):  # not there yet
            out.add("nydusd_cache_allocated_bytes", os.stat(path).st_blocks * 512, blob=name)
    try:
        segment = Segment.open(str(row.get("segment")))
    except (NydusError, ValueError):
        segment = None
    if segment is None:
        return
    try:
        states = bytes(segment.state)
        hits, hit_bytes, misses, miss_bytes, errors, _ = segment.totals()
    finally:
        segment.close()
    named = (("empty", EMPTY), ("pending", PENDING), ("ready", READY), ("failed", FAILED), ("verify", VERIFY))
    for state, value in named:
        out.add("nydusd_chunks", states.count(value), blob=name, state=state)
    out.add("nydusd_chunk_reads_total", hits, blob=name, result="hit")
    out.add("nydusd_chunk_reads_total", misses, blob=name, result="miss")
    out.add("nydusd_chunk_read_bytes_total", hit_bytes, blob=name, result="hit")
    out.add("nydusd_chunk_read_bytes_total", miss_bytes, blob=name, result="miss")
    out.add("nydusd_chunk_read_failures_total", errors, blob=name)


def _free(folder: str) -> int | None:
    try:
        facts = os.statvfs(folder)
    except OSError:
        return None
    return facts.f_bavail * facts.f_frsize


def _add_load(out: Page, load: Mapping[str, object]) -> None:
    out.add("nydusd_shared_memory_bytes", load.get("arena_bytes"))
    prefetch = _table(load, "prefetch")
    out.add("nydusd_prefetch_requests_total", prefetch.get("requests"))
    out.add("nydusd_prefetch_bytes_total", prefetch.get("bytes"))
    fetched: dict[str, float] = dict.fromkeys(_CAUSES.values(), 0)
    routes: dict[str, float] = {"origin": 0, "proxy": 0, "mirror": 0}
    for pool, facts in _table(load, "pools").items():
        busy, workers = _number(facts, "busy"), _number(facts, "workers")
        out.add("nydusd_workers", busy, pool=pool, state="busy")
        out.add("nydusd_workers", workers - busy, pool=pool, state="idle")
        for priority, count in _table(facts, "queued").items():
            out.add("nydusd_jobs_queued", count, pool=pool, priority=priority)
        out.add("nydusd_jobs_total", _number(facts, "jobs_done"), pool=pool)
        out.add("nydusd_job_failures_total", _number(facts, "jobs_failed"), pool=pool)
        for priority, cause in _CAUSES.items():
            fetched[cause] += _number(_table(facts, "read_bytes"), priority)
        for route in routes:
            routes[route] += _number(_table(facts, "route_bytes"), route)
    for cause, amount in fetched.items():
        out.add("nydusd_fetched_bytes_total", amount, cause=cause)
    for route, amount in routes.items():
        out.add("nydusd_route_bytes_total", amount, route=route)


def _add_seats(out: Page, seats: Mapping[str, object]) -> None:
    for pool, row in _table(seats, "roles").items():
        out.add("nydusd_seat_waits_total", _number(row, "waits"), pool=pool)
        out.add("nydusd_seat_wait_seconds_total", _number(row, "waited_seconds"), pool=pool)
    for pool, row in _table(node_of(seats), "roles").items():
        out.add("nydusd_node_workers", _number(row, "seats"), pool=pool, state="seats")
        out.add("nydusd_node_workers", _number(row, "taken"), pool=pool, state="taken")
        out.add("nydusd_node_waiting_daemons", _number(row, "waiting"), pool=pool)


def _number(data: object, key: str) -> float:
    value = data.get(key) if isinstance(data, Mapping) else None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else 0
