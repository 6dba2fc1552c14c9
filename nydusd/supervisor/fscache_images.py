"""The images of `nydusd singleton --fscache`: what is known of each, by which of them the kernel means which file, and by whose
chunk tables a blob of a domain is served.

Part of the supervisor. What holds after SIGKILL: what `noted` says of each, in the file that `frontends/fscache/left.py` keeps
or with whoever keeps the session, by which a successor knows them again (`read_noted`).
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, TypeVar

from nydusd.config.blob_entry import BlobEntry, parse_blob_entry
from nydusd.errors import NydusError, ScarceError, comes_of_want
from nydusd.ipc.messages import Json
from nydusd.storage.api.domain import Tables
from nydusd.storage.api.image import ImageFacts, inspect
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.supervisor.images import Image
from nydusd.supervisor.kernel_files import Wanted

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_PATIENCE = 5.0
"""Seconds for which what is lacking to know an image again is waited for."""


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


class BoundImages(dict[str, Bound]):
    """All that are bound, by place, and what the kernel and the API ask about them together."""

    def find(self, domain: str, key: str) -> Wanted | None:
        """What the kernel means by a name."""
        for bound in self.values():
            if bound.domain != domain:
                continue
            if bound.entry.id == key:
                return Wanted(bound.facts.size, None, bound.facts.bootstrap)
            for cache in bound.image.caches:
                if cache.spec.info.blob_id == key:
                    return Wanted(cache.spec.info.uncompressed_size, cache, "", self._prefetches(cache))
        return None

    def _prefetches(self, cache: BlobCache) -> bool:
        return any(cache in bound.image.caches and _is_prefetched(bound.entry) for bound in self.values())

    def sizes(self) -> dict[str, int]:
        """How long each file is that the kernel may ask for, by domain and name."""
        sizes = {}
        for bound in self.values():
            sizes[f"{bound.domain}/{bound.entry.id}"] = bound.facts.size
            for blob in bound.facts.blobs:
                sizes.setdefault(f"{bound.domain}/{blob.blob_id}", blob.uncompressed_size)
        return sizes

    def sharing(self, entry: BlobEntry, facts: ImageFacts) -> list[tuple[str, ImageFacts]]:
        """The images, by place, of an entry's domain that have a blob in common with it."""
        blobs = {blob.blob_id for blob in facts.blobs}
        return [
            (place, bound.facts)
            for place, bound in self.items()
            if bound.domain == domain_of(entry) and not blobs.isdisjoint(blob.blob_id for blob in bound.facts.blobs)
        ]

    def tell_tables(self, cache: BlobCache, *, anew: bool = False) -> None:
        """Have a blob's chunks looked up in these; `anew` if one is not among them any more whose table was used."""
        blob_id = cache.spec.info.blob_id
        users = [bound for bound in self.values() if cache in bound.image.caches]
        if anew:
            for bound in users:
                bound.adds.add(blob_id)
        if users:
            _use_tables(cache, users)


class Told(NamedTuple):
    """An image to be bound in a start or a takeover. `adds`: see `Bound.adds`, None if its table is to be compared for that.

    `dropped`: as in `Bound`. `kept`: the daemon before was told of it, and not we.
    """

    entry: BlobEntry
    facts: ImageFacts
    adds: set[str] | None = None
    dropped: bool = False
    kept: bool = False


def noted(bound: Bound) -> Json:
    """What a successor must know of an image; it may hold secrets."""
    note: Json = {"entry": json.loads(bound.entry.text), "dropped": bound.dropped}
    return note | {"adds": sorted(bound.adds), "identity": bound.facts.identity}


def images_in(state: Json) -> list[Json]:
    """What whoever keeps the session has sent of them."""
    images = state.get("images")
    return images if isinstance(images, list) else []


def read_noted(images: Sequence[Json], folder: str) -> list[Told]:
    """The images of a predecessor, in the order in which it has bound them. One that is not there any more is left out.

    What an image adds depends on those before it. So where one of these is gone, or is another file now, or where a former
    release has noted it, tables are compared from there on. An extracted bootstrap is kept in `folder`. Raises ScarceError when
    one cannot be looked at for want of file descriptors or memory: it is there all the same.
    """
    from nydusd.config import secret_values
    from nydusd.logs import register_secret

    found: list[Told] = []
    trusted = True
    for raw in images:
        try:
            entry = parse_blob_entry(raw["entry"], "kept blob entry")
            for secret in secret_values(entry.config):
                register_secret(secret)
            facts = patiently(partial(inspect, entry.metadata, [folder]))
            trusted = trusted and raw.get("identity") == facts.identity and isinstance(raw.get("adds"), list)
            adds = {str(blob_id) for blob_id in raw["adds"]} if trusted else None
            found.append(Told(entry, facts, adds, bool(raw.get("dropped")), kept=True))
        except ScarceError:
            raise
        except (NydusError, KeyError, TypeError, AttributeError) as e:
            trusted = False
            log.warning("an image of the daemon before is lost: %s", e)
    return found


def patiently(step: Callable[[], _T]) -> _T:
    """Do what may be done again where it fails for want of file descriptors or memory. Raises ScarceError after 5 s of that."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return step()
        except NydusError as e:
            if not comes_of_want(e):
                raise
            if time.monotonic() > deadline:
                raise ScarceError(str(e)) from e
        time.sleep(0.1)


def tables_of(bound: Iterable[Bound], told: Sequence[Told]) -> dict[str, Tables]:
    """By domain, what is to be compared with when these are bound one after the other."""
    bound = list(bound)
    images = [*((b.domain, b.facts) for b in bound), *((domain_of(image.entry), image.facts) for image in told)]
    uses = Counter((domain, blob_id) for domain, facts in images for blob_id in {blob.blob_id for blob in facts.blobs})
    shared: dict[str, set[str]] = {domain: set() for domain, _ in images}
    for (domain, blob_id), count in uses.items():
        if count > 1:
            shared[domain].add(blob_id)
    tables = {domain: Tables(domain, blobs) for domain, blobs in shared.items()}
    for each in bound:
        tables[each.domain].know(place_of(each.entry), each.facts)
    return tables


def backend_of(entry: BlobEntry) -> str:
    """The type of the backend that an image's blobs are in."""
    return "" if entry.config.backend is None else entry.config.backend.type


def domain_of(entry: BlobEntry) -> str:
    """An image that is mounted without a domain has one of its own."""
    return entry.domain_id or entry.id


def place_of(entry: BlobEntry) -> str:
    domain = domain_of(entry)
    return f"/{entry.id}" if domain == entry.id else f"/{domain}/{entry.id}"


def _is_prefetched(entry: BlobEntry) -> bool:
    settings = entry.config.rafs.prefetch if entry.config.rafs is not None else None
    return bool(
        (settings is not None and settings.enable) or (entry.config.cache and entry.config.cache.prefetch.enable)
    )


def _use_tables(cache: BlobCache, users: Sequence[Bound]) -> None:
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
