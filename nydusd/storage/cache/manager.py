"""Cache managers: one for each (backend, cache) configuration, holding the blobs of the images that are mounted with it.

Each image's metadata has its own view of a blob (`BlobCache`): images with a layer in common list different parts of its
chunks, and one may say what is not true. What they agree on, they share through the cache file (`storage/state/sharing.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from hashlib import sha256
from string import hexdigits
from typing import Any, NamedTuple

from nydusd.formats.model import BlobInfo
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.cache.spec import NO_COOKIE, BlobSpec

_SEGMENT_DIGITS = 16
"""Of the hash that names a blob's segment."""


def segments_in(found: Iterable[str], prefix: str) -> list[str]:
    """Of these names of shared memory those of blobs' segments; `prefix` is what all names of the daemon begin with.

    By more than their length: a counter of a second supervisor's, `count.4294967297`, is as long.
    """
    rests = ((name, name.removeprefix(prefix)) for name in found if name.startswith(prefix))
    return [name for name, rest in rests if len(rest) == _SEGMENT_DIGITS and set(rest) <= set(hexdigits)]


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """What makes two images share a manager: the same backend with the same settings, and the same cache folder.

    `backend_config` is the backend's table. `work_dir` is None for the dummy cache. `always_verify`: trust nothing
    that is found on disk before its digest was checked (digest_validate). `domain`: chunks go to the kernel's cache (fscache),
    which has one file a blob in each domain, whoever's images these are: so the domain alone is what they share.
    """

    backend: str
    backend_config: dict[str, Any]
    work_dir: str | None
    always_verify: bool
    domain: str | None = None

    def key(self) -> str:
        if self.domain is not None:
            return repr(("fscache", self.domain))
        return repr((self.backend, sorted(self.backend_config.items()), self.work_dir, self.always_verify))


class Former(NamedTuple):
    """The names that a former daemon gave a blob: front ends that outlived it go on with them."""

    handle: int
    segment: str


class BlobCacheMgr(ABC):
    """Blobs of one configuration, by blob id and image."""

    def __init__(self, config: CacheConfig, instance: str, run_dir: str, next_handle: Callable[[], int]) -> None:
        self._config = config
        self._instance = instance
        self._run_dir = run_dir
        self._next_handle = next_handle
        self.blobs: dict[tuple[str, str], BlobCache] = {}

    cookie: tuple[int, int] | None = None
    """`BlobSpec.cookie` of a new blob."""

    @property
    @abstractmethod
    def work_dir(self) -> str | None:
        """The cache folder, None if nothing is stored."""

    def get_blob_cache(
        self, info: BlobInfo, image: str, bootstrap: str, path_id: str, extracted: bool, former: Former | None = None
    ) -> BlobCache:
        """The cache of a blob of the image with this identity; made when first asked for. Each call is one more user.

        With `former` it is the one of these names. There may be another one of the same image here, whose credentials were
        others when it was named: front ends call each as they were told.
        """
        key = self._key(info, image)
        cache = self.blobs.get(key)
        if cache is not None and former is not None and cache.handle != former.handle:
            key = key[0], f"{key[1]}\0{former.segment}"
            cache = self.blobs.get(key)
        if cache is None:
            handle, segment = former if former is not None else (self._next_handle(), self.segment_of(info, image))
            cache = BlobCache(
                BlobSpec(
                    handle=handle,
                    generation=1,
                    info=info,
                    segment=segment,
                    work_dir=self.work_dir,
                    meta_dir=self._run_dir,
                    bootstrap=bootstrap,
                    path_id=path_id,
                    extracted=extracted,
                    backend=self._config.backend,
                    backend_config=self._config.backend_config,
                    always_verify=self._config.always_verify,
                    cookie=self.cookie,
                )
            )
            self.blobs[key] = cache
        cache.users += 1
        return cache

    def _key(self, info: BlobInfo, image: str) -> tuple[str, str]:
        """In a domain of fscache the kernel has one file a blob, and does not say for which image it asks."""
        return info.blob_id, image if self._config.domain is None else ""

    def segment_of(self, info: BlobInfo, image: str) -> str:
        """The name of a blob's segment, the same in each daemon of this instance and configuration for the same image."""
        place = "\0".join((self._config.key(), *self._key(info, image))).encode()
        return f"/nydusd.{self._instance}.{sha256(place).hexdigest()[:_SEGMENT_DIGITS]}"

    def gc(self, ended: Collection[BlobCache] | None = None) -> list[BlobCache]:
        """Drop blobs that no image uses (only those in `ended`, if given); gives them, closed. Cache files stay."""
        unused = [
            (key, cache) for key, cache in self.blobs.items() if cache.users <= 0 and (ended is None or cache in ended)
        ]
        for key, cache in unused:
            del self.blobs[key]
            cache.close()
        return [cache for _, cache in unused]


class FileCacheMgr(BlobCacheMgr):
    """Chunks are stored, uncompressed, in `<work_dir>/<blob id>.blob.data`, as the reference does."""

    @property
    def work_dir(self) -> str | None:
        return self._config.work_dir


class FsCacheMgr(FileCacheMgr):
    """Chunks are stored in files of the kernel's cache, which it gives us open. `work_dir` has only `<blob id>.blob.meta`."""

    cookie = NO_COOKIE


class DummyCacheMgr(BlobCacheMgr):
    """Nothing is stored: chunks come to their readers through shared memory, where the last ones are kept for a while."""

    @property
    def work_dir(self) -> str | None:
        return None
