"""BlobFactory: finds or makes the cache of each blob of an image, and collects what no image uses any more."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from itertools import count
from pathlib import Path

from nydusd.formats.model import BlobInfo
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.cache.manager import BlobCacheMgr, CacheConfig, DummyCacheMgr, FileCacheMgr, Former, FsCacheMgr
from nydusd.storage.state.map_file import forget_deleted


class BlobFactory:
    """One for a daemon. `instance` names its shared memory, `run_dir` is its run-time folder."""

    def __init__(self, instance: str, run_dir: str) -> None:
        self._instance = instance
        self._run_dir = run_dir
        self._managers: dict[str, BlobCacheMgr] = {}
        self._handles = count(1)
        self._by_handle: dict[int, BlobCache] = {}
        self._by_file: dict[Path, list[BlobCache]] = {}
        self.left: dict[Path, float] = {}
        """Chunk maps of blobs that are closed, whose records are to go when they are deleted: that may wait for a disk.

        And when it is to be looked whether they were (monotonic seconds).
        """

    def new_blob_cache(
        self,
        config: CacheConfig,
        info: BlobInfo,
        image: str,
        bootstrap: str,
        path_id: str,
        extracted: bool,
        former: Former | None = None,
    ) -> BlobCache:
        """The cache of a blob of the image with this identity, under this configuration; one more user of it.

        `former`: how the blob is called by front ends that a former daemon has left; it keeps these names for its life.
        """
        key = config.key()
        manager = self._managers.get(key)
        if manager is None:
            manager = _kind(config)(config, self._instance, self._run_dir, lambda: next(self._handles))
            self._managers[key] = manager
        # What a former daemon opened under this configuration may be an image's whose credentials are others now.
        segment = manager.segment_of(info, image) if former is None else former.segment
        known = next((cache for cache in self._by_handle.values() if cache.spec.segment == segment), None)
        if known is not None:
            known.users += 1
            return known
        cache = manager.get_blob_cache(info, image, bootstrap, path_id, extracted, former)
        self._by_handle[cache.handle] = cache
        if cache.caches:
            self.left.pop(cache.spec.map_path, None)
        if (path := cache.spec.data_path) is not None:
            cache.kin = self._by_file.setdefault(path, [])
            cache.kin.append(cache)
        return cache

    def begin(self, first: int) -> None:
        """Give out handles from `first` on: no two supervisors of the same front ends call different blobs by the same."""
        self._handles = count(first)

    def get(self, handle: int) -> BlobCache | None:
        return self._by_handle.get(handle)

    def blobs(self) -> Iterator[BlobCache]:
        return iter(list(self._by_handle.values()))

    def gc(self, ended: Collection[BlobCache] | None = None) -> list[BlobCache]:
        """Drop unused blobs (only those in `ended`, if given) and empty managers; gives the dropped blobs."""
        dropped = []
        for key, manager in list(self._managers.items()):
            dropped += manager.gc(ended)
            if not manager.blobs:
                del self._managers[key]
        for cache in dropped:
            del self._by_handle[cache.handle]
            cache.kin.remove(cache)
            if cache.caches and not cache.kin:
                self.left[cache.spec.map_path] = 0.0
            if (path := cache.spec.data_path) is not None and not cache.kin:
                del self._by_file[path]
        self._remove_metadata(dropped)
        return dropped

    def _remove_metadata(self, dropped: Collection[BlobCache]) -> None:
        """Remove what was kept of these blobs in the run-time folder, for want of a cache folder with room: it is in memory."""
        names = {cache.spec.meta_path.name for cache in dropped}
        for name in names.difference(cache.spec.meta_path.name for cache in self._by_handle.values()):
            with contextlib.suppress(OSError):
                (Path(self._run_dir) / name).unlink(missing_ok=True)

    def close(self, spared: Collection[str] = ()) -> None:
        """Unmap all segments, and remove all but the `spared` ones; and what only we know of cache files that are gone."""
        for cache in self._by_handle.values():
            cache.users = 0
            cache.spared = cache.spec.segment in spared
        self.gc()
        for path in self.left:
            forget_deleted(path)


def _kind(config: CacheConfig) -> type[BlobCacheMgr]:
    if config.domain is not None:
        return FsCacheMgr
    return FileCacheMgr if config.work_dir is not None else DummyCacheMgr
