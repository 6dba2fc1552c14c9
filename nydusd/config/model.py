"""The configuration as one tree of frozen tables: the v2 form, whatever form the text had.

Plain data, used by every process that is given a configuration (a `Config` survives `msgspec.json.encode` and `decode`,
so it can travel in a process's spec). Names and defaults are those of the configuration texts that existing clients write.
`repr` of any table is safe to print: secrets are masked. Sizes are bytes, times are seconds.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, ClassVar, Final

from msgspec import Meta, Struct, field

from nydusd.redact import redact_url

U8 = Annotated[int, Meta(ge=0, le=255)]
U32 = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
# One bit less than the name says: msgspec knows no bounds above 2**63 - 1.
U64 = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]

MIB: Final = 1 << 20
MAX_BATCH_SIZE: Final = 0x1000_0000
MAX_THREADS: Final = 1024

URL_KEYS: Final = frozenset(
    ("url", "ping_url", "host", "endpoint", "addr", "blob_redirected_host", "dragonfly_scheduler_endpoint")
)
SECRET_NAME: Final = re.compile(r"(?i)secret|token|auth|passw|pwd|credential|key|sign|cookie")
"""Names of free-text settings (headers, plug-ins) that hold a secret."""


class Table(Struct, frozen=True):
    """Base of all tables: `repr` without secrets."""

    SECRETS: ClassVar[Mapping[str, str | None]] = {}
    """Attributes that hold a secret, and what is shown instead."""
    COMPUTED: ClassVar[frozenset[str]] = frozenset()
    """Attributes that are not keys of a configuration text."""

    def shown(self) -> dict[str, object]:
        """The table with its key names as in a v2 text, its secrets removed."""
        pairs = zip(self.__struct_fields__, self.__struct_encode_fields__, strict=True)
        return {key: self._shown_value(name) for name, key in pairs if name not in self.COMPUTED}

    def _shown_value(self, name: str) -> object:
        if name in self.SECRETS:
            return self.SECRETS[name]
        return _shown(getattr(self, name), name in URL_KEYS)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.shown().items())})"


def _shown(value: object, is_url: bool) -> object:
    if isinstance(value, Table):
        return value.shown()
    if isinstance(value, tuple):
        return [_shown(item, is_url) for item in value]
    if isinstance(value, dict):
        return {
            key: "" if SECRET_NAME.search(key) else _shown(item, isinstance(item, str) and "://" in item)
            for key, item in value.items()
        }
    if is_url and isinstance(value, str):
        return redact_url(value)
    return value


class Proxy(Table, frozen=True, kw_only=True):
    """How to reach the backend through a proxy. An empty `url` means none."""

    url: str = ""
    ping_url: str = ""
    fallback: bool = True
    check_interval: U64 = 5
    use_http: bool = False
    check_pause_elapsed: U64 = 300
    dragonfly_scheduler_endpoint: str = ""


class Mirror(Table, frozen=True, kw_only=True):
    """A server with the same content that is to be asked first. An empty `ping_url` means `host` + "/v2"."""

    host: str
    ping_url: str = ""
    headers: dict[str, str] = {}
    health_check_interval: U64 = 5
    failure_limit: U8 = 5
    health_check_pause_elapsed: U64 = 300


class Remote(Table, frozen=True, kw_only=True):
    """What every backend over a network has. A time-out of 0 means none.

    `failure_memory`: for how many seconds a refusal (no such blob, no right to it) is not asked for again.
    """

    skip_verify: bool = False
    ca_cert_files: tuple[str, ...] = ()
    timeout: U32 = 5
    connect_timeout: U32 = 5
    retry_limit: U8 = 0
    failure_memory: Annotated[float, Meta(ge=0.0, le=3600)] = 5.0
    proxy: Proxy = Proxy()
    mirrors: tuple[Mirror, ...] = ()


class LocalDisk(Table, frozen=True, kw_only=True):
    """Blobs are partitions of a disk."""

    device_path: str = ""
    disable_gpt: bool = False


class LocalFs(Table, frozen=True, kw_only=True):
    """Blobs are files: `blob_file` for every blob, else `dir`/ID, else ID in one of `alt_dirs`."""

    blob_file: str = ""
    dir: str = ""
    alt_dirs: tuple[str, ...] = ()


class Oss(Remote, frozen=True, kw_only=True):
    """Alibaba Cloud object storage. `credentials_file` is read instead of the keys here, anew when it changes."""

    SECRETS: ClassVar[Mapping[str, str | None]] = {"access_key_id": "", "access_key_secret": "", "session_token": ""}

    scheme: str = "https"
    endpoint: str
    bucket_name: str
    object_prefix: str = ""
    access_key_id: str = ""
    access_key_secret: str = ""
    session_token: str = ""
    credentials_file: str = ""


class S3(Remote, frozen=True, kw_only=True):
    """S3 and what speaks its protocol. An empty `endpoint` means s3.amazonaws.com.

    `virtual_host`: the bucket is part of the host's name, not of the path. `credentials_file` as for `Oss`.
    """

    SECRETS: ClassVar[Mapping[str, str | None]] = {"access_key_id": "", "access_key_secret": "", "session_token": ""}

    scheme: str = "https"
    endpoint: str
    region: str
    bucket_name: str
    object_prefix: str = ""
    access_key_id: str = ""
    access_key_secret: str = ""
    session_token: str = ""
    credentials_file: str = ""
    virtual_host: bool = False


class Registry(Remote, frozen=True, kw_only=True):
    """A container registry. `auth` is base64 of `user:password`, `registry_token` a bearer token."""

    SECRETS: ClassVar[Mapping[str, str | None]] = {"auth": None, "registry_token": None}

    scheme: str = "https"
    host: str
    repo: str
    auth: str | None = None
    registry_token: str | None = None
    blob_url_scheme: str = ""
    blob_redirected_host: str = ""


class HttpProxy(Remote, frozen=True, kw_only=True):
    """A server that gives blobs by id: an URL, or the absolute path of a unix socket. `path` is a prefix."""

    addr: str
    path: str = ""


class Backend(Table, frozen=True, kw_only=True):
    """Where blobs come from: the table named by `type`."""

    type: str
    localdisk: LocalDisk | None = None
    localfs: LocalFs | None = None
    oss: Oss | None = None
    s3: S3 | None = None
    registry: Registry | None = None
    http_proxy: HttpProxy | None = field(default=None, name="http-proxy")

    def chosen(self) -> LocalDisk | LocalFs | Oss | S3 | Registry | HttpProxy | None:
        """The table that `type` names, or None if it is not there (never after `load_config`)."""
        tables = {
            "localdisk": self.localdisk,
            "localfs": self.localfs,
            "oss": self.oss,
            "s3": self.s3,
            "registry": self.registry,
            "http-proxy": self.http_proxy,
        }
        return tables.get(self.type)


class ExternalBackend(Table, frozen=True, kw_only=True):
    """A further source for blobs that the image marks as external; free text by the plug-in's own names."""

    patch: dict[str, str]
    type: str
    config: dict[str, str]


class FileCache(Table, frozen=True, kw_only=True):
    """The cache folder of `blobcache` and `filecache`."""

    SECRETS: ClassVar[Mapping[str, str | None]] = {"encryption_key": ""}

    work_dir: str = "."
    disable_indexed_map: bool = False
    enable_encryption: bool = False
    enable_convergent_encryption: bool = False
    encryption_key: str = ""


class FsCache(Table, frozen=True, kw_only=True):
    """The cache folder of `fscache`."""

    work_dir: str = "."


class Prefetch(Table, frozen=True, kw_only=True):
    """Reading ahead of any reader. `bandwidth_limit` is bytes per second, 0 for none."""

    enable: bool
    threads: U64 = 8
    batch_size: U64 = MIB
    bandwidth_limit: U32 = 0
    prefetch_all: bool = False
    stream_prefetch: bool = False


NO_PREFETCH: Final = Prefetch(enable=False, threads=0, batch_size=0)
"""What an absent prefetch table means."""


class Cache(Table, frozen=True, kw_only=True):
    """Where fetched data is kept. `type` is blobcache, filecache, fscache, dummycache or empty (= dummycache)."""

    type: str = ""
    compressed: bool = False
    validate: bool = False
    filecache: FileCache | None = None
    fscache: FsCache | None = None
    prefetch: Prefetch = NO_PREFETCH

    @property
    def work_dir(self) -> str | None:
        """The cache folder as written in the text, None where this type of cache keeps nothing."""
        if self.type in ("blobcache", "filecache") and self.filecache is not None:
            return self.filecache.work_dir
        if self.type == "fscache" and self.fscache is not None:
            return self.fscache.work_dir
        return None


class Rafs(Table, frozen=True, kw_only=True):
    """The file system. `batch_size` is how far a user's read of a v5 image is widened."""

    mode: str = "direct"
    batch_size: U64 = MIB
    validate: bool = False
    enable_xattr: bool = False
    iostats_files: bool = False
    access_pattern: bool = False
    latest_read_files: bool = False
    prefetch: Prefetch = NO_PREFETCH


class Overlay(Table, frozen=True, kw_only=True):
    """A writable layer above the image."""

    upper_dir: str
    work_dir: str


REMOTE_FETCH_WORKERS: Final = 4
"""How many fetch workers there are where blobs come over a network, if the configuration does not say."""


class Tuning(Table, frozen=True, kw_only=True):
    """Keys of this implementation only (table `nydusd`, in v1 a top-level key). 0 workers = choose."""

    front_ends: Annotated[int, Meta(ge=0, le=MAX_THREADS)] = 0
    decompress_workers: Annotated[int, Meta(ge=0, le=MAX_THREADS)] = 0
    fetch_workers: Annotated[int, Meta(ge=0, le=MAX_THREADS)] = 0
    read_deadline: Annotated[float, Meta(ge=0.1, le=86400)] = 60.0
    """Seconds that a read waits for its bytes: longer than a registry is away when it is started anew."""
    checkpoint_interval: Annotated[float, Meta(ge=0.1, le=86400)] = 5.0
    worker_patience: Annotated[float, Meta(ge=0.1, le=86400)] = 10.0
    """Seconds in which a worker that has a job must show a sign of life; longer than any timeout of the backend."""
    worker_idle: Annotated[float, Meta(ge=0, le=86400)] = 15.0
    """Seconds without a job after which a worker ends until it is needed; 0: never."""
    node_decompress_workers: Annotated[int, Meta(ge=0, le=MAX_THREADS)] = 0
    """Decompress workers of all daemons of the node together, if there are several; 0: two a core."""
    node_fetch_workers: Annotated[int, Meta(ge=0, le=MAX_THREADS)] = 0
    """The same for fetch workers; 0: 16."""
    arena_size: Annotated[int, Meta(ge=MIB, le=1 << 36)] = 64 * MIB
    cache_quota: U64 = 0
    """Bytes of disk that the cache folder may take; 0: as much as there is."""
    cache_keep: Annotated[int, Meta(ge=0, le=86400)] = 10
    """Seconds for which what was asked for stays in the cache, also above the quota."""
    guardian: Annotated[float, Meta(ge=0, le=86400)] = 0.0
    """Seconds after which a supervisor that was killed and not started again by anybody starts itself again; 0: never."""
    metrics_listen: str = ""
    """IP:PORT at which metrics are served over TCP, besides the API socket; empty: nowhere."""


class Config(Table, frozen=True, kw_only=True):
    """A whole configuration. `Config()` is what a daemon without an image starts with."""

    COMPUTED: ClassVar[frozenset[str]] = frozenset(("unknown_keys", "warnings"))

    version: U32 = 2
    id: str = ""
    backend: Backend | None = None
    external_backends: tuple[ExternalBackend, ...] = ()
    cache: Cache | None = None
    rafs: Rafs | None = None
    overlay: Overlay | None = None
    nydusd: Tuning = Tuning()
    unknown_keys: tuple[str, ...] = ()
    """Paths of keys in the text that mean nothing here, to be named in the log."""
    warnings: tuple[str, ...] = ()
    """Settings that were accepted but do not do what they say, to be named in the log."""

    @property
    def remarks(self) -> list[str]:
        """Lines for the log of whoever was given the text."""
        return [*(f"unknown configuration key {key} is ignored" for key in self.unknown_keys), *self.warnings]

    def front_end_count(self, most: int) -> int:
        """How many FUSE front ends to run, `most` at most: as configured, else one for each two cores.

        A program that reads needs a core as well, and each request wakes all front ends that sleep: with 2 cores one front
        end gave 1.2 times (4 jobs) to 1.6 times (1 job) the random reads of two (`python -m bench.fuse_loop`).
        """
        return min(self.nydusd.front_ends or max(1, len(os.sched_getaffinity(0)) // 2), most)

    @property
    def decompress_worker_count(self) -> int:
        """How many decompress workers to run: as configured, else one a core that this process may use."""
        return self.nydusd.decompress_workers or len(os.sched_getaffinity(0))

    @property
    def fetch_worker_count(self) -> int:
        """How many fetch workers to run: as configured, else 1 for local files and 4 for anything slower."""
        if self.nydusd.fetch_workers:
            return self.nydusd.fetch_workers
        return 1 if self.backend is None or self.backend.type == "localfs" else REMOTE_FETCH_WORKERS
