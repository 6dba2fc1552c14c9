"""What is prefetched of an image: decided once, at its mount, by its configuration and its own table."""

from __future__ import annotations

import logging

from nydusd.ipc.messages import Json
from nydusd.storage.cache.prefetch import PrefetchWorker
from nydusd.storage.cache.requests import Answer, Job, Priority
from nydusd.supervisor.images import Image
from nydusd.supervisor.pool import WorkerPool

log = logging.getLogger(__name__)


def plan_prefetch(image: Image, list_path: str | None, prefetch: PrefetchWorker, fetch: WorkerPool) -> None:
    """Queue the files of the list (or else of the image's table), then, if configured, all there is.

    A worker finds the files' chunks: that walks the image. Raises ConfigError for a list that cannot be read.
    """
    settings = image.config.rafs.prefetch if image.config.rafs is not None else None
    if settings is None or not settings.enable or not all(cache.caches for cache in image.caches):
        return
    prefetch_all = settings.prefetch_all
    paths = None
    if list_path is not None:
        from nydusd.cli.prefetch_list import read_prefetch_list

        paths = [path.hex() for path in read_prefetch_list(list_path)]

    def resolved(_job: Job, answer: Answer) -> None:
        if "error" in answer:
            log.warning("prefetch list of %s: %s", image.source, answer["error"])
        for index, first, count in answer.get("runs", []):
            cache = image.blob(index)
            if cache is not None:
                prefetch.want(cache, first, count)
        if prefetch_all or answer.get("whole"):
            for cache in image.caches:
                prefetch.want(cache, 0, -1)

    payload: Json = {
        "bootstrap": image.bootstrap_path,
        "path_id": image.path_id,
        "extracted": image.extracted,
        "paths": paths,
    }
    job = Job("resolve", None, Priority.AHEAD, payload, resolved)
    if paths is None and not image.has_prefetch_table:
        resolved(job, {})
    else:
        fetch.submit(job)
