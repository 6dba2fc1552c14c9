"""The images of `nydusd singleton --fscache`: what is known of each, and by whose chunk tables a blob of a domain is served.

Part of the supervisor. Nothing of it outlives that: a successor is told of the images anew (`frontends/fscache/left.py`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from nydusd.config.blob_entry import BlobEntry
from nydusd.storage.api.image import ImageFacts
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.supervisor.images import Image


@dataclass(eq=False, slots=True)
class Bound:
    """An image: its entry, and its file system's name in the kernel. `dropped`: still mounted, and gone for the API."""

    entry: BlobEntry
    facts: ImageFacts
    image: Image
    dropped: bool = field(default=False)
    adds: set[str] = field(default_factory=set)
    """Blobs of which it lists chunks that those who were bound before it do not."""

    @property
    def domain(self) -> str:
        return domain_of(self.entry)

    @property
    def is_mounted(self) -> bool:
        return os.path.isdir(f"/sys/fs/erofs/{self.name}")

    @property
    def name(self) -> str:
        """What the kernel calls it under /sys/fs/erofs."""
        return self.entry.id if self.domain == self.entry.id else f"{self.domain},{self.entry.id}"


def domain_of(entry: BlobEntry) -> str:
    """An image that is mounted without a domain has one of its own."""
    return entry.domain_id or entry.id


def place_of(entry: BlobEntry) -> str:
    domain = domain_of(entry)
    return f"/{entry.id}" if domain == entry.id else f"/{domain}/{entry.id}"


def is_prefetched(entry: BlobEntry) -> bool:
    settings = entry.config.rafs.prefetch if entry.config.rafs is not None else None
    return bool(
        (settings is not None and settings.enable) or (entry.config.cache and entry.config.cache.prefetch.enable)
    )


def use_tables(cache: BlobCache, users: Sequence[Bound]) -> None:
    """Have a blob's chunks looked up in these images: in the first, and in those that list chunks which others do not."""
    blob_id = cache.spec.info.blob_id
    first, *others = [(b.facts, b.facts.blobs[b.image.caches.index(cache)], blob_id in b.adds) for b in users]
    cache.spec = replace(
        cache.spec,
        info=first[1],
        bootstrap=first[0].bootstrap,
        path_id=first[0].path_id,
        extracted=first[0].extracted,
        more=tuple((f.bootstrap, f.path_id, f.extracted, info.index) for f, info, adds in others if adds),
    )
