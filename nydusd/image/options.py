"""What an image is to be like: the options of `nydus-image create`, checked. Pure; looks at no file."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from nydusd.errors import ConfigError
from nydusd.formats.model import Compressor, Digester
from nydusd.formats.superblock import MAX_CHUNK_SIZE, MIN_CHUNK_SIZE
from nydusd.image.prefetch import PrefetchPolicy
from nydusd.image.whiteout import Whiteouts

DEFAULT_CHUNK_SIZE = 1 << 20


class Source(Enum):
    """Where an image comes from, by the reference's names."""

    DIR_RAFS = "dir-rafs"
    TAR_RAFS = "tar-rafs"
    TARGZ_RAFS = "targz-rafs"
    ESTARGZ_RAFS = "estargz-rafs"
    TARGZ_REF = "targz-ref"
    ESTARGZ_REF = "estargz-ref"
    TAR_TARFS = "tar-tarfs"

    @property
    def is_tar(self) -> bool:
        return self is not Source.DIR_RAFS

    @property
    def is_stargz(self) -> bool:
        """Whether the layer has files about itself, which are not in the image."""
        return self in (Source.ESTARGZ_RAFS, Source.ESTARGZ_REF)

    @property
    def is_reference(self) -> bool:
        """Whether the data stays in the layer, and only metadata is made."""
        return self in (Source.TARGZ_REF, Source.ESTARGZ_REF, Source.TAR_TARFS)


@dataclass
class BuildOptions:
    """Everything that `create` may be told. `prefetch_list` holds the paths of the list, `processes` 0 means one a CPU.

    `blob` names a file, `blob_dir` a folder in which the blob gets its id as name; `bootstrap` likewise, with `blob_dir`
    (and its sha256 as name) if it is None. `cache_dir` makes the cache files of a daemon instead of a blob.
    `quiet` means no progress bar.
    """

    source: Path
    kind: Source = Source.DIR_RAFS
    version: int = 6
    bootstrap: Path | None = None
    blob: Path | None = None
    blob_dir: Path | None = None
    cache_dir: Path | None = None
    blob_id: str = ""
    compressor: Compressor = Compressor.ZSTD
    digester: Digester = Digester.BLAKE3
    chunk_size: int = DEFAULT_CHUNK_SIZE
    batch_size: int = 0
    inline: bool = False
    toc: bool = False
    encrypt: bool = False
    repeatable: bool = False
    aligned_chunk: bool = False
    chunk_dict: str | None = None
    parent: Path | None = None
    whiteouts: Whiteouts = Whiteouts.OCI
    prefetch: PrefetchPolicy = PrefetchPolicy.NONE
    prefetch_list: list[bytes] = field(default_factory=list)
    processes: int = 0
    quiet: bool = False

    def check(self) -> None:
        """Raises `ConfigError` for what cannot be or does not go together, in the words of the command line."""
        _power_of_two("chunk-size", self.chunk_size)
        if self.batch_size:
            _power_of_two("batch-size", self.batch_size)
            if self.batch_size > self.chunk_size:
                raise ConfigError(
                    f"--batch-size: {self.batch_size:#x} must be at most the chunk size, {self.chunk_size:#x}"
                )
        if self.chunk_size == MAX_CHUNK_SIZE and (self.batch_size or self.encrypt):
            raise ConfigError(
                f"--chunk-size: {self.chunk_size:#x} does not fit into the chunk information that --batch-size and "
                "--encrypt need; take half of it"
            )
        if self.version == 5:
            for name, value in (
                ("batch-size", self.batch_size),
                ("features blob-toc", self.toc),
                ("encrypt", self.encrypt),
            ):
                if value:
                    raise ConfigError(f"--{name} cannot be used with --fs-version 5")
        if self.encrypt and self.repeatable:
            raise ConfigError("--encrypt cannot be used with --repeatable: an encrypted blob has a random key")
        if self.encrypt and self.cache_dir is not None:
            raise ConfigError("--encrypt cannot be used with --blob-cache-dir: cache files are plain")
        if self.blob_id and self.inline:
            raise ConfigError("--blob-id cannot be used with --blob-inline-meta")
        if self.kind.is_reference:
            self._check_reference()
        self._check_places()

    def _check_reference(self) -> None:
        tarfs = self.kind is Source.TAR_TARFS
        for name, value in (
            ("fs-version 5", self.version == 5),
            ("encrypt", self.encrypt),
            ("batch-size", self.batch_size),
            ("blob-cache-dir", self.cache_dir),
            ("blob-id", self.blob_id and not tarfs),
            ("prefetch-policy blob", self.prefetch is PrefetchPolicy.BLOB),
            ("parent-bootstrap", self.parent),
            ("chunk-dict", self.chunk_dict),
            ("blob-inline-meta", self.inline and tarfs),
            ("features blob-toc", self.toc and tarfs),
        ):
            if value:
                raise ConfigError(f"--{name} cannot be used with --type {self.kind.value}")

    def _check_places(self) -> None:
        if self.cache_dir is not None:
            for name, value in (("blob", self.blob), ("blob-dir", self.blob_dir), ("blob-inline-meta", self.inline)):
                if value:
                    raise ConfigError(f"--blob-cache-dir cannot be used with --{name}")
        elif self.blob is None and self.blob_dir is None:
            raise ConfigError("one of --blob, --blob-dir and --blob-cache-dir is needed: where the data goes")
        if self.inline and self.bootstrap is not None:
            raise ConfigError("--blob-inline-meta cannot be used with --bootstrap")
        if not self.inline and self.bootstrap is None and self.blob_dir is None:
            raise ConfigError(
                "one of --bootstrap, --blob-dir and --blob-inline-meta is needed: where the metadata goes"
            )

    def process_count(self) -> int:
        return self.processes or len(os.sched_getaffinity(0))


def _power_of_two(name: str, size: int) -> None:
    if not MIN_CHUNK_SIZE <= size <= MAX_CHUNK_SIZE or size & (size - 1):
        raise ConfigError(f"--{name}: {size:#x} must be a power of two from {MIN_CHUNK_SIZE:#x} to {MAX_CHUNK_SIZE:#x}")
