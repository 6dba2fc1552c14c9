"""Shared memory and files of mounts that are none any more: of one that was being made, or had just ended, at a SIGKILL.

Used by the supervisor in a takeover, when all images are known and before the API may make others. Killed in the middle of
it, the next one goes on.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from nydusd.storage.cache.manager import segments_in
from nydusd.storage.state.names import is_unfinished, names, remove, remove_unfinished

if TYPE_CHECKING:
    from nydusd.supervisor.images import Image


def remove_strays(prefix: str, folder: Path, images: Collection[Image], segments: Collection[str]) -> None:
    """Remove what begins with `prefix`, belongs to none of the images and is none of the segments; and in `folder` traces, and
    what is kept of blobs.

    And what workers that were killed have left unfinished of those segments.
    """
    counters = {image.counters for image in images} | {image.files for image in images}
    for name in names(prefix[1:]):
        kind, _, rest = name.removeprefix(prefix).partition(".")
        if kind in ("count", "files"):
            stray = f"{prefix}{kind}.{rest.partition('.')[0]}" not in counters
        else:
            stray = bool(segments_in([prefix + kind], prefix)) and prefix + kind not in segments
        if stray:
            remove(name)
        elif is_unfinished(name):  # unless a worker of ours is at it
            remove_unfinished(name)
    traces = {image.trace for image in images}
    for path in folder.glob("trace.*"):
        if str(path) not in traces:
            path.unlink(missing_ok=True)
    metadata = {cache.spec.meta_path.name for image in images for cache in image.caches}
    for path in folder.glob("*.blob.meta"):
        if path.name not in metadata:
            path.unlink(missing_ok=True)
