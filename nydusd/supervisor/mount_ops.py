"""The API's operations mount, remount and umount: from a request's plain data to `Mounts`, and errors in their known shape.

Runs in the supervisor. Clients look into the text of errors, so that keeps the names that they know.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from nydusd.errors import ConfigError, NydusError, UnsupportedError
from nydusd.ipc.messages import Json
from nydusd.supervisor import control_ops
from nydusd.supervisor.control_ops import NotHereError
from nydusd.supervisor.mount_request import Request
from nydusd.supervisor.mount_table import PlaceError

if TYPE_CHECKING:
    from nydusd.supervisor.daemon import Supervisor

log = logging.getLogger(__name__)

Reply = Callable[[Json], object]
RAFS = "rafs"
PASSTHROUGH = ("passthrough", "passthroughfs", "passthrough_fs")


class RefusedError(NydusError):
    """A mount, remount or umount that cannot be done; the message has the shape that clients know."""

    def __init__(self, text: str) -> None:
        super().__init__(f"MountFilesystem(Other({json.dumps(text, ensure_ascii=False)}))")


def _mount(daemon: Supervisor, request: Json, reply: Reply) -> None:
    _begin(daemon, request, reply, daemon.mounts.mount)


def _remount(daemon: Supervisor, request: Json, reply: Reply) -> None:
    _begin(daemon, request, reply, daemon.mounts.remount)


def _umount(daemon: Supervisor, request: Json, reply: Reply) -> None:
    _check_daemon(daemon)
    try:
        daemon.mounts.umount(str(request.get("mountpoint")))
    except NydusError as e:
        raise _refused(e) from e
    reply({"ok": None})


def _check_daemon(daemon: Supervisor) -> None:
    """Raises NotHereError for a daemon that mounts nothing."""
    if daemon.blobs is not None or not daemon.mounts_by_api:
        raise NotHereError


def _begin(
    daemon: Supervisor,
    request: Json,
    reply: Reply,
    start: Callable[[Request, Callable[[NydusError | None], None]], None],
) -> None:
    def done(error: NydusError | None) -> None:
        if error is None:
            reply({"ok": None})
        else:
            reply({"error": {"status": _refused(error).rest_status, "message": str(_refused(error))}})

    _check_daemon(daemon)
    try:
        wanted = _request(request)
        taken = start == daemon.mounts.mount and wanted.place in daemon.images
        wanted.config = control_ops.as_set(daemon, wanted.place, wanted.config, counts=not taken)
        start(wanted, done)
    except NydusError as e:
        raise _refused(e) from e


def _request(raw: Json) -> Request:
    """Raises NydusError for a mount command that cannot be meant."""
    from nydusd.config import load_config, secret_values
    from nydusd.logs import register_secret

    kind = raw["fs_type"]
    if kind in PASSTHROUGH:
        raise UnsupportedError(
            "fs_type passthrough_fs is not supported yet: use fs_type rafs, or a bind mount for a folder of the host"
        )
    if kind != RAFS:
        raise ConfigError(
            f"invalid argument `only 'rafs' and 'passthrough_fs' are supported, but {kind} was specified`"
        )
    files = raw.get("prefetch_files")
    paths = None
    if files:
        try:
            paths = [os.fsencode(file) for file in files if file.startswith("/") and "\0" not in file]
        except UnicodeEncodeError:
            paths = []
        if len(paths) != len(files):
            raise ConfigError("prefetch_files: each must be an absolute path")
    try:
        config = load_config(raw["config"], "config")
    except ConfigError as e:
        raise ConfigError(
            f"RAFS failed to handle request, Failed to load config: failed to parse configuration information: {e}"
        ) from e
    for secret in secret_values(config):
        register_secret(secret)
    for remark in config.remarks:
        log.warning("configuration of %s: %s", raw["mountpoint"], remark)
    return Request(raw["mountpoint"], raw["source"], config, paths, raw["config"])


def _refused(error: NydusError) -> NydusError:
    if isinstance(error, RefusedError | UnsupportedError):
        return error
    text = str(error)
    if isinstance(error, PlaceError) and text.startswith("mount point"):
        text = (
            "VFS failed to handle request, PathWalk(Os { code: 22, kind: InvalidInput, "
            f"message: {json.dumps('Invalid argument: ' + text, ensure_ascii=False)} }})"
        )
    return RefusedError(text)


OPS: dict[str, Callable[[Supervisor, Json, Reply], None]] = {
    "mount": _mount,
    "remount": _remount,
    "umount": _umount,
}
