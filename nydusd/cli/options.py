"""What the command line of `nydusd` asked for, as plain data for the supervisor."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of any subcommand, checked against each other.

    `log_rotation_size` is MiB, 0 for never. `rlimit_nofile` 0 leaves the limit. `id` and `supervisor` are both given, or both
    None.
    """

    config: str | None = None
    apisock: str | None = None
    id: str | None = None
    supervisor: str | None = None
    upgrade: bool = False
    log_level: str = "info"
    log_file: str | None = None
    log_rotation_size: int = 0
    rlimit_nofile: int = 1_000_000

    @property
    def serves(self) -> str:
        """What there can be one daemon for: a mount point, a folder, a socket."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class SingletonOptions(Options):
    """Options of `nydusd singleton`. `fscache` is the folder of the kernel's cache, None for a daemon that serves none."""

    fscache: str | None = None
    fscache_tag: str | None = None
    fscache_threads: int = 4

    @property
    def serves(self) -> str:
        where = self.fscache or self.apisock
        return "singleton " + (str(os.getpid()) if where is None else os.path.abspath(where))


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseOptions(Options):
    """Options of `nydusd fuse` and of the form without a subcommand.

    `mountpoint` is absolute and free of symbolic links. `prefetch_files` is the path of a list, see
    `nydusd.cli.prefetch_list`.
    """

    mountpoint: str
    bootstrap: str | None = None
    localfs_dir: str | None = None
    fuse_threads: int = 4
    failover_policy: str = "resend"
    writable: bool = False
    shared_dir: str | None = None
    prefetch_files: str | None = None
    virtual_mountpoint: str = "/"
    dedup_db: str | None = None

    @property
    def serves(self) -> str:
        return self.mountpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class ErofsOptions(FuseOptions):
    """Options of `nydusd erofs`. `driver` is how the kernel comes to what is not cached yet, or `auto`."""

    driver: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobfsOptions(FuseOptions):
    """Options of `nydusd blobfs`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NbdOptions(FuseOptions):
    """Options of `nydusd nbd`: `socket` is the absolute path of the socket, `mountpoint` is not used."""

    mountpoint: str = ""
    socket: str

    @property
    def serves(self) -> str:
        return f"nbd {self.socket}"
