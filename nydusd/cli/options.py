"""What the command line of `nydusd` asked for, as plain data for the supervisor."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseOptions:
    """Options of `nydusd fuse` and of the form without a subcommand, checked against each other.

    `mountpoint` is absolute and free of symbolic links. `log_rotation_size` is MiB, 0 for never. `rlimit_nofile` 0 leaves
    the limit. `id` and `supervisor` are both given or both None. `prefetch_files` is the path of a list, see
    `nydusd.cli.prefetch_list`.
    """

    mountpoint: str
    bootstrap: str | None = None
    config: str | None = None
    localfs_dir: str | None = None
    apisock: str | None = None
    id: str | None = None
    supervisor: str | None = None
    upgrade: bool = False
    fuse_threads: int = 4
    failover_policy: str = "resend"
    writable: bool = False
    shared_dir: str | None = None
    prefetch_files: str | None = None
    virtual_mountpoint: str = "/"
    dedup_db: str | None = None
    log_level: str = "info"
    log_file: str | None = None
    log_rotation_size: int = 0
    rlimit_nofile: int = 1_000_000
