"""The v1 form of a configuration (JSON only, what nydus-snapshotter writes) and its conversion to the v2 form.

Pure. Defaults differ from v2 in one place: prefetch_all is true when `fs_prefetch` is there and does not say.
"""

from __future__ import annotations

from msgspec import structs

from nydusd.config.model import (
    MIB,
    NO_PREFETCH,
    S3,
    U32,
    U64,
    Backend,
    Cache,
    Config,
    ExternalBackend,
    FileCache,
    FsCache,
    LocalDisk,
    LocalFs,
    Oss,
    Prefetch,
    Rafs,
    Registry,
    Table,
    Tuning,
)
from nydusd.config.parse import BadKey, TableReader, kind_of

_BACKENDS: dict[str, type[LocalDisk | LocalFs | Oss | S3 | Registry]] = {
    "localdisk": LocalDisk,
    "localfs": LocalFs,
    "oss": Oss,
    "s3": S3,
    "registry": Registry,
}


class V1Backend(Table, frozen=True, kw_only=True):
    type: str
    config: dict[str, object]


class V1Cache(Table, frozen=True, kw_only=True):
    type: str = ""
    compressed: bool = False
    validate: bool = False
    config: object = None


class V1Device(Table, frozen=True, kw_only=True):
    id: str = ""
    backend: V1Backend
    external_backends: tuple[ExternalBackend, ...] = ()
    cache: V1Cache = V1Cache()


class V1Prefetch(Table, frozen=True, kw_only=True):
    enable: bool = False
    threads_count: U64 = 8
    merging_size: U64 = MIB
    bandwidth_rate: U32 = 0
    prefetch_all: bool = True
    stream_prefetch: bool = False


class V1Config(Table, frozen=True, kw_only=True):
    device: V1Device
    mode: str
    digest_validate: bool = False
    iostats_files: bool = False
    enable_xattr: bool = False
    access_pattern: bool = False
    latest_read_files: bool = False
    amplify_io: U64 = MIB
    fs_prefetch: V1Prefetch | None = None
    nydusd: Tuning = Tuning()


_NAMES = (
    ("rafs.prefetch.threads", "fs_prefetch.threads_count"),
    ("rafs.prefetch.batch_size", "fs_prefetch.merging_size"),
    ("rafs.prefetch", "fs_prefetch"),
    ("rafs.batch_size", "amplify_io"),
    ("rafs.mode", "mode"),
    ("backend.type", "device.backend.type"),
    *((f"backend.{name}", "device.backend.config") for name in _BACKENDS),
    ("cache.filecache", "device.cache.config"),
    ("cache.fscache", "device.cache.config"),
    ("cache", "device.cache"),
)


def v1_path(path: str) -> str:
    """The name in a v1 text of the key that v2 calls `path`."""
    for new, old in _NAMES:
        if path == new or path.startswith(new + "."):
            return old + path[len(new) :]
    return path


def read_v1(reader: TableReader, text: dict[str, object]) -> Config:
    """Convert a parsed v1 text. Raises `BadKey` with v1 names."""
    old = reader.table(V1Config, text, "")
    device = old.device
    prefetch = _prefetch(old.fs_prefetch)
    return Config(
        id=device.id,
        backend=_backend(reader, device.backend),
        external_backends=device.external_backends,
        # v1 has one prefetch table for both.
        cache=structs.replace(_cache(reader, device.cache), prefetch=prefetch),
        rafs=Rafs(
            mode=old.mode,
            batch_size=old.amplify_io,
            validate=old.digest_validate,
            enable_xattr=old.enable_xattr,
            iostats_files=old.iostats_files,
            access_pattern=old.access_pattern,
            latest_read_files=old.latest_read_files,
            prefetch=prefetch,
        ),
        nydusd=old.nydusd,
    )


def _backend(reader: TableReader, old: V1Backend) -> Backend:
    cls = _BACKENDS.get(old.type)
    if cls is None:
        raise BadKey("device.backend.type", f"must be one of {', '.join(_BACKENDS)}, but is {old.type[:64]!r}")
    table = reader.table(cls, old.config, "device.backend.config")
    return structs.replace(Backend(type=old.type), **{old.type: table})


def _cache(reader: TableReader, old: V1Cache) -> Cache:
    cache = Cache(type=old.type, compressed=old.compressed, validate=old.validate)
    path = "device.cache.config"
    if old.type in ("blobcache", "filecache", "fscache"):
        if not isinstance(old.config, dict):
            raise BadKey(path, f"must be a table for cache type {old.type}, but is {kind_of(old.config)}")
        if old.type == "fscache":
            return structs.replace(cache, fscache=reader.table(FsCache, old.config, path))
        return structs.replace(cache, filecache=reader.table(FileCache, old.config, path))
    return cache


def _prefetch(old: V1Prefetch | None) -> Prefetch:
    if old is None:
        return NO_PREFETCH
    return Prefetch(
        enable=old.enable,
        threads=old.threads_count,
        batch_size=old.merging_size,
        bandwidth_limit=old.bandwidth_rate,
        prefetch_all=old.prefetch_all,
        stream_prefetch=old.stream_prefetch,
    )
