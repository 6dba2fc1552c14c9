"""Which way `nydusd erofs` takes: the best that kernel, cache folder and image allow, or the one that was asked for.

Runs in the process that becomes the supervisor, before anything is started. The way that is taken is logged, with the reason
against each better one; `nydusctl info` tells the same with each image. After SIGKILL an empty file, `.nydusd-*.tmp`, may stay
in the cache folder, and nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING

from nydusd.errors import MountError, UnsupportedError
from nydusd.formats import BootstrapKind, detect
from nydusd.frontends.erofs import fanotify
from nydusd.supervisor import left_by_erofs
from nydusd.supervisor.runtime import Runtime

if TYPE_CHECKING:
    from nydusd.cli.options import ErofsOptions
    from nydusd.config import Config
    from nydusd.forkserver.client import ForkServer
    from nydusd.supervisor.daemon import Supervisor

log = logging.getLogger(__name__)

_FILES_SINCE = (6, 12)
"""The first kernel whose EROFS mounts files without a block device."""
_BLOCK_BITS, _TAR_BITS = 1024 + 12, 9
"""Where a v6 superblock says how large its blocks are, and what it says in tarfs images alone."""
Reasons = dict[str, Callable[[], str | None]]
"""The ways but FUSE, the best first: what is missing for each, None if nothing is."""
_ASKED = "it was asked for"
_ONE_IMAGE = "it serves the image of --bootstrap only"
_ENOUGH = {
    "tarfs": "all data is in tars on this machine",
    "fanotify": "the kernel has all it needs",
    "blobfs": "the kernel has all it needs",
}


def daemon_for(options: ErofsOptions, config: Config, fork_server: ForkServer) -> Supervisor:
    """The daemon that serves the image. Raises UnsupportedError when the way that was asked for is not there."""
    from nydusd.supervisor.blobfs import ErofsOnBlobfs
    from nydusd.supervisor.erofs import ErofsDaemon
    from nydusd.supervisor.fuse import FuseDaemon
    from nydusd.supervisor.tarfs import TarfsDaemon

    work_dir = config.cache.work_dir if config.cache else None
    local = config.backend is not None and config.backend.type == "localfs"
    # What is mounted needs no more of the kernel and the folder than it has.
    left = left_by_erofs.seen(str(Runtime(options.serves).folder)) is not None
    if options.bootstrap is None:
        taken, why = choose_without_image(options.driver, left=left)
    else:
        taken, why = choose(options.driver, options.bootstrap, work_dir, local=local, left=left)
    daemon: Supervisor
    if taken == "tarfs":
        daemon = TarfsDaemon(options, config, fork_server, why)
    elif taken == "fanotify":
        daemon = ErofsDaemon(options, config, fork_server, why)
    elif taken == "blobfs":
        daemon = ErofsOnBlobfs(options, config, fork_server, why)
    else:
        daemon = FuseDaemon(options, config, fork_server)
        daemon.front_end = ("FUSE", why)
    log.info("front end: %s: %s", *daemon.front_end)
    return daemon


def choose(
    asked: str, bootstrap: str, work_dir: str | None, *, local: bool = False, left: bool = False
) -> tuple[str, str]:
    """The way to take, and why. `local`: the blobs are files of this machine; `left`: a killed daemon has left a mount with
    fanotify, to be taken over whether another could be made now or not.

    Raises UnsupportedError when the one that was asked for is not there.
    """
    if asked == "fuse":
        return asked, _ASKED
    no_erofs = _why_no_erofs(bootstrap, work_dir)
    if left and asked == "auto" and no_erofs is None:
        return "fanotify", "a killed daemon has left its mount, which is taken over"
    reasons: Reasons = {
        "tarfs": lambda: _why_no_tars(bootstrap, local),
        "fanotify": lambda: no_erofs or (None if left else _why_no_fanotify(str(work_dir))),
        "blobfs": lambda: no_erofs,
    }
    return _taken(asked, reasons, "another, or `auto`" if asked == "tarfs" else "`nydusd fuse`")


def choose_without_image(asked: str, *, left: bool = False) -> tuple[str, str]:
    """The same for a daemon whose images come by the API. Raises UnsupportedError."""
    if asked == "fuse":
        return asked, _ASKED
    reasons: Reasons = {
        "tarfs": lambda: _ONE_IMAGE,
        "fanotify": lambda: _why_no_erofs_here() or (None if left else _why_no_group()),
        "blobfs": lambda: _ONE_IMAGE,
    }
    return _taken(asked, reasons, "`nydusd fuse`" if asked == "fanotify" else "fanotify, or `nydusd fuse`")


def _taken(asked: str, reasons: Reasons, instead: str) -> tuple[str, str]:
    """The best way, or the one that was asked for; where that is not there UnsupportedError says what to use `instead`."""
    if asked == "auto":
        return _best(reasons)
    if (reason := reasons[asked]()) is not None:
        raise UnsupportedError(f"--driver {asked}: {reason}; use {instead}")
    return asked, _ASKED


def _best(reasons: Reasons) -> tuple[str, str]:
    """The first way against which there is no reason, else FUSE; and the reasons against those before it."""
    passed: dict[str, list[str]] = {}
    taken = "fuse"
    for way, why_not in reasons.items():
        reason = why_not()
        if reason is None:
            taken = way
            break
        passed.setdefault(reason, []).append(way)
    against = [f"not {', '.join(ways)}: {reason}" for reason, ways in passed.items()]
    return taken, "; ".join([_ENOUGH[taken], *against] if taken != "fuse" else against)


def _why_no_tars(bootstrap: str, local: bool) -> str | None:
    """What is missing to mount the image over the tars themselves; None if nothing is."""
    if reason := _why_no_erofs_here():
        return reason
    with contextlib.suppress(OSError), open(bootstrap, "rb") as f:
        head = memoryview(f.read(4096))
        if detect(head) is BootstrapKind.V6 and head[_BLOCK_BITS] == _TAR_BITS:
            return None if local else "its tars are not in a local folder"
    return f"{bootstrap} is no tarfs image"


def _why_no_erofs(bootstrap: str, work_dir: str | None) -> str | None:
    """What is missing to mount the image as EROFS over files; None if nothing is."""
    if reason := _why_no_erofs_here():
        return reason
    if work_dir is None:
        return "no cache folder is configured"
    with contextlib.suppress(OSError), open(bootstrap, "rb") as f:
        if detect(memoryview(f.read(4096))) is BootstrapKind.V5:
            return f"{bootstrap} is of RAFS v5, which only we can read"
    return None


def _why_no_erofs_here() -> str | None:
    release = os.uname().release
    with contextlib.suppress(ValueError):
        major, minor, *_ = (int(part) for part in release.replace("-", ".").split(".")[:2])
        if (major, minor) < _FILES_SINCE:
            return f"kernel {release} mounts EROFS from block devices only; 6.12 and later from files"
    with open("/proc/filesystems") as table:
        if any(line.split()[-1] == "erofs" for line in table):
            return None
    if os.path.isdir(f"/lib/modules/{release}/kernel/fs/erofs"):  # the kernel loads it at the mount
        return None
    return f"kernel {release} has no EROFS"


def _why_no_group() -> str | None:
    """What is missing for fanotify, whatever the cache folder is. None if nothing is."""
    try:
        os.close(fanotify.open_group())
    except MountError as e:
        return str(e)
    return None


def _why_no_fanotify(folder: str) -> str | None:
    """What is missing to be asked before a file in the cache folder is read: tried with one. None if nothing is."""
    try:
        group = fanotify.open_group()
    except MountError as e:
        return str(e)
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".nydusd-", suffix=".tmp") as probe:
            tree = fanotify.private_mount(probe.name)
            try:
                fanotify.watch(group, tree)
            finally:
                os.close(tree)
    except OSError as e:
        return f"cache folder {folder}: {e.strerror}"
    except MountError as e:
        return f"cache folder {folder}: {e}"
    finally:
        os.close(group)
    return None
