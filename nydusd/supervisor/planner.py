"""What is prefetched of an image: decided once, at its mount, by its configuration and its own table."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from nydusd.formats.model import BlobFeature
from nydusd.ipc.messages import Json
from nydusd.storage.cache.prefetch import PrefetchWorker
from nydusd.storage.cache.requests import Answer, Job, Priority
from nydusd.supervisor.images import Image
from nydusd.supervisor.pool import WorkerPool

log = logging.getLogger(__name__)


def plan_prefetch(image: Image, files: Sequence[bytes] | None, prefetch: PrefetchWorker, fetch: WorkerPool) -> None:
    """Queue `files` (absolute paths; None: what the image itself says), then, if configured, all there is.

    An image says it by blobs that were made to be read ahead (`nydus-image optimize`), and by its table of files.
    A worker finds the files' chunks: that walks the image.
    """
    settings = image.config.rafs.prefetch if image.config.rafs is not None else None
    if settings is None or not settings.enable or not all(cache.caches for cache in image.caches):
        return
    prefetch_all = settings.prefetch_all
    paths = None if files is None else [path.hex() for path in files]

    def resolved(_job: Job, answer: Answer) -> None:
        if image.released:
            return
        if "error" in answer:
            log.warning("prefetch list of %s: %s", image.source, answer["error"])
        for index, first, count in answer.get("runs", []):
            cache = image.blob(index)
            if cache is not None:
                prefetch.want(cache, first, count)
        if prefetch_all or answer.get("whole"):
            for cache in image.caches:
                prefetch.want(cache, 0, -1)

    if paths is None:
        for cache in image.caches:
            if cache.spec.info.features & BlobFeature.IS_SEPARATED_WITH_PREFETCH_FILES:
                prefetch.want(cache, 0, -1)
    payload: Json = {
        "bootstrap": image.metadata.bootstrap,
        "path_id": image.metadata.path_id,
        "extracted": image.metadata.extracted,
        "paths": paths,
    }
    job = Job("resolve", None, Priority.AHEAD, payload, resolved)
    if paths is None and not image.metadata.has_prefetch_table:
        resolved(job, {})
    else:
        fetch.submit(job)
