"""An image as the supervisor mounts it: its metadata checked, its blobs' caches found, its description for front ends."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nydusd.errors import CacheError, ConfigError, FormatError
from nydusd.formats import BootstrapKind, detect, open_bootstrap
from nydusd.formats.blob_id import blob_id_from_path
from nydusd.formats.model import Bootstrap
from nydusd.ipc.messages import Json
from nydusd.storage.api.factory import BlobFactory
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.cache.manager import CacheConfig

if TYPE_CHECKING:
    from nydusd.config import Config

log = logging.getLogger(__name__)


class Image:
    """One mounted image. Raises FormatError, ConfigError or CacheError when it cannot be."""

    def __init__(self, place: str, source: str, config: Config, factory: BlobFactory, run_dir: str) -> None:
        self.place = place
        self.source = source
        self.config = config
        self.mounted_at = datetime.now(UTC)
        self._run_dir = run_dir
        self.path_id = blob_id_from_path(source)
        cache_config = _cache_config(config)
        self.bootstrap_path, self.extracted = self._metadata(cache_config)
        with open(self.bootstrap_path, "rb") as f:
            self.bootstrap_size = os.fstat(f.fileno()).st_size
            mapping = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
        view = memoryview(mapping)
        bootstrap = open_bootstrap(view, self.bootstrap_path, self.path_id, extracted=self.extracted)
        self.facts = bootstrap.superblock_facts()
        self.version = bootstrap.version
        self.has_prefetch_table = bool(bootstrap.prefetch_inodes())
        self.caches = [
            factory.new_blob_cache(cache_config, info, self.bootstrap_path, self.path_id, self.extracted)
            for info in bootstrap.blobs
        ]
        self._check(bootstrap)
        del bootstrap
        view.release()
        mapping.close()

    def _check(self, bootstrap: Bootstrap) -> None:
        bootstrap.inode(bootstrap.root_ino)

    def _metadata(self, cache_config: CacheConfig) -> tuple[str, bool]:
        """The file that holds the bootstrap: the source, or (True) what is extracted from it if the source is a blob."""
        try:
            # O_NONBLOCK: opening a named pipe would wait for its writer.
            fd = os.open(self.source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as e:
            raise FormatError(self.source, "bootstrap", f"cannot be opened: {getattr(e, 'strerror', e)}") from e
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise FormatError(self.source, "bootstrap", "is not a regular file")
            if detect(memoryview(os.pread(fd, 4096, 0))) is not BootstrapKind.BLOB:
                return os.path.abspath(self.source), False
            from nydusd.storage.cache.load import extract_bootstrap

            def read(offset: int, size: int) -> bytes:
                return os.pread(fd, size, offset)

            content = extract_bootstrap(read, os.fstat(fd).st_size, self.source)
        finally:
            os.close(fd)
        return self._store(content, cache_config.work_dir or self._run_dir), True

    def _store(self, content: bytes, folder: str) -> str:
        """Keep an extracted bootstrap for the processes that map it; in the run-time folder if `folder` takes none."""
        target = Path(folder) / f"{self.path_id}.image.boot"
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            os.replace(temporary, target)
        except OSError as e:
            with contextlib.suppress(OSError):
                temporary.unlink()
            if folder == self._run_dir:
                raise CacheError(f"bootstrap {target} cannot be written: {e.strerror}", e.errno) from e
            log.warning("bootstrap %s cannot be written: %s", target, e.strerror)
            return self._store(content, self._run_dir)
        return str(target)

    def spec(self) -> Json:
        """The mount's description for a front end."""
        return {
            "id": self.place,
            "bootstrap": self.bootstrap_path,
            "bootstrap_size": self.bootstrap_size,
            "path_id": self.path_id,
            "extracted": self.extracted,
            "xattr": self.config.rafs.enable_xattr if self.config.rafs is not None else False,
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

    def blob(self, index: int) -> BlobCache | None:
        return self.caches[index] if 0 <= index < len(self.caches) else None

    def release(self) -> None:
        """The image is unmounted: it uses its blobs no more."""
        for cache in self.caches:
            cache.users -= 1


def _cache_config(config: Config) -> CacheConfig:
    from msgspec import to_builtins

    if config.backend is None:
        raise ConfigError("backend: missing; name where blobs come from (for local files: localfs with a dir)")
    cache = config.cache
    work_dir = cache.work_dir if cache is not None else None
    table: dict[str, Any] = to_builtins(config.backend.chosen())
    validate = (cache is not None and cache.validate) or (config.rafs is not None and config.rafs.validate)
    if cache is not None and cache.type == "fscache":
        raise ConfigError("cache.type: fscache serves the kernel's cachefiles only; for FUSE use blobcache")
    return CacheConfig(
        backend=config.backend.type,
        backend_config=table,
        work_dir=None if work_dir is None else os.path.abspath(work_dir),
        always_verify=validate,
    )
