"""An image as the supervisor mounts it: its facts, its configuration, its blobs' caches, its description for front ends."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from nydusd.errors import ConfigError, NydusError
from nydusd.ipc.messages import Json
from nydusd.storage.api.factory import BlobFactory
from nydusd.storage.api.image import ImageFacts
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.cache.manager import CacheConfig, Former
from nydusd.storage.cache.pace import Pace

if TYPE_CHECKING:
    from nydusd.config import Config


class Image:
    """One mounted image. Raises ConfigError or CacheError when it cannot be."""

    def __init__(
        self,
        place: str,
        source: str,
        config: Config,
        facts: ImageFacts,
        factory: BlobFactory,
        former: Sequence[Former] = (),
        domain: str | None = None,
    ) -> None:
        """`former`: how front ends that another supervisor has left call the blobs. `domain`: of fscache, if it serves this."""
        self._domain = domain
        self.place = place
        self.source = source
        self.config = config
        self.mounted_at = datetime.now(UTC)
        self.metadata = facts
        self.index = 0
        self.counters: str | None = None
        """Name of the block in which front ends count, and the block."""
        self.block: mmap.mmap | None = None
        self.files: str | None = None
        """What the names of the tables begin with in which they count by file, None if they do not."""
        self.trace: str | None = None
        """The file in which front ends note first reads."""
        self.released = False
        self.given = False
        """Whether its configuration is the command line's."""
        cache_config = _cache_config(config, domain)
        names: Sequence[Former | None] = former or [None] * len(facts.blobs)
        self.caches: list[BlobCache] = []
        try:
            for info, name in zip(facts.blobs, names, strict=True):
                image = facts.identity, facts.bootstrap, facts.path_id, facts.extracted
                self.caches.append(factory.new_blob_cache(cache_config, info, *image, name))
        except NydusError:
            for cache in self.caches:
                cache.users -= 1
            raise
        self._pace = pace_of(config)
        for cache in self.caches:
            cache.paces.append(self._pace)

    @property
    def facts(self) -> Json:
        """Those of the superblock."""
        return self.metadata.facts

    @property
    def counts_files(self) -> bool:
        """Whether each file's accesses are to be counted."""
        rafs = self.config.rafs
        return rafs is not None and (rafs.iostats_files or rafs.access_pattern or rafs.latest_read_files)

    def spec(self) -> Json:
        """The mount's description for a front end."""
        return {
            "id": self.place,
            "bootstrap": self.metadata.bootstrap,
            "bootstrap_size": self.metadata.size,
            "path_id": self.metadata.path_id,
            "extracted": self.metadata.extracted,
            "trace": self.trace,
            "xattr": self.config.rafs.enable_xattr if self.config.rafs is not None else False,
            "counters": self.counters,
            "files": self.files if self.counts_files else None,
            "blobs": [
                {
                    "blob_id": cache.spec.info.blob_id,
                    "handle": cache.handle,
                    "segment": cache.spec.segment,
                    "data": None if cache.spec.data_path is None else str(cache.spec.data_path),
                }
                for cache in self.caches
            ],
        }

    def configure(self, values: Mapping[str, str]) -> None:
        """Change `registry_auth`, `proxy_url` or `dragonfly_scheduler_endpoint`; workers learn of it with their next job.

        Raises ConfigError, and then nothing is changed. What the backend has no place for is ignored.
        """
        from nydusd.config import with_settings

        self.use(with_settings(self.config, values))

    def use(self, config: Config) -> None:
        """Fetch from now on with the settings of a backend that `config` has. Raises ConfigError."""
        table = _cache_config(config, self._domain).backend_config
        self.config = config
        for cache in self.caches:
            if cache.spec.backend_config != table:
                cache.configure(table)

    def blob(self, index: int) -> BlobCache | None:
        return self.caches[index] if 0 <= index < len(self.caches) else None

    def release(self) -> None:
        """The image is unmounted: it uses its blobs no more."""
        self.released = True
        for cache in self.caches:
            cache.users -= 1
            cache.leave(self._pace)


def metadata_folders(config: Config, run_dir: str) -> list[str]:
    """Where metadata that is extracted from a blob may be kept: the cache folder, if there is one, and our own.

    Raises ConfigError for a configuration without a backend.
    """
    work_dir = _cache_config(config).work_dir
    return [run_dir] if work_dir is None else [work_dir, run_dir]


def pace_of(config: Config) -> Pace:
    """A limit may be in either table, for the reference takes that of `cache.prefetch`: the lower one holds."""
    tables = [table.prefetch for table in (config.rafs, config.cache) if table is not None]
    if not tables:
        return Pace()
    limit = min((table.bandwidth_limit for table in tables if table.bandwidth_limit), default=0)
    if config.rafs is None:  # an image of a singleton has only the cache's
        return Pace(tables[0].batch_size, limit)
    return Pace(tables[0].batch_size, limit, config.rafs.batch_size)


def _cache_config(config: Config, domain: str | None = None) -> CacheConfig:
    from msgspec import to_builtins

    if config.backend is None:
        raise ConfigError("backend: missing; name where blobs come from (for local files: localfs with a dir)")
    cache = config.cache
    work_dir = cache.work_dir if cache is not None else None
    table: dict[str, Any] = to_builtins(config.backend.chosen())
    validate = (cache is not None and cache.validate) or (config.rafs is not None and config.rafs.validate)
    if cache is not None and cache.type == "fscache" and domain is None:
        raise ConfigError("cache.type: fscache serves the kernel's cachefiles only; for FUSE use blobcache")
    return CacheConfig(
        backend=config.backend.type,
        backend_config=table,
        work_dir=None if work_dir is None else os.path.abspath(work_dir),
        always_verify=validate,
        domain=domain,
    )
