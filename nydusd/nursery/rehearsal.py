"""What each daemon does at its start, done in the nursery before it forks any, so that its copies find it done.

Modules are loaded, tables of the configuration and the grammar of the command line are made, byte code is adapted to what it
is called with, and free places between objects are filled: what a copy makes then lies together, instead of here and
there on pages that all copies could share. Nothing of it changes what a daemon does. Runs in the nursery; no state survives it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from nydusd.forkserver.environment import environment
from nydusd.forkserver.start import FOR_DAEMON

_LOADED = (
    *FOR_DAEMON,
    "nydusd.cli.limits",
    "nydusd.cli.mountpoint",
    "nydusd.cli.nydusd",
    "nydusd.config.file",
    "nydusd.control.__main__",
    "nydusd.formats.walk",
    "nydusd.storage.backend.localfs",
    "nydusd.storage.backend.registry.backend",
    "nydusd.supervisor.adoption",
    "nydusd.supervisor.main",
    "nydusd.supervisor.report",
    "workers.checkpoint",
    "workers.evict",
    "workers.inspect",
    "workers.resolve",
    "blake3",
    "lz4.block",
    "zstandard",
)
"""What a daemon and its processes import before they have served their first reads: none of them does it again."""
_COMMAND = ("fuse", "-B", "/b", "-C", "/c", "-M", "/m", "-A", "/a", "-l", "info", "--fuse-threads", "1", "-L", "/l")
_REGISTRY = {
    "scheme": "https",
    "host": "h",
    "repo": "r",
    "auth": "",
    "timeout": 5,
    "connect_timeout": 5,
    "retry_limit": 2,
}
_CONFIGURATION: dict[str, Any] = {
    "device": {
        "backend": {"type": "registry", "config": _REGISTRY},
        "cache": {"type": "blobcache", "config": {"work_dir": "/w"}},
    },
    "mode": "direct",
    "digest_validate": False,
    "iostats_files": False,
    "enable_xattr": True,
    "fs_prefetch": {"enable": True, "threads_count": 4},
}
_TURNS = 10
"""Calls after which CPython 3.11 has adapted what it runs."""
_SMALL, _POOL, _POOL_HEAD = 512, 16 << 10, 48
"""CPython has objects of a similar size lie together in pools if they have at most so many bytes; a pool, and its head."""

_fillers: list[object] = []


def rehearse() -> None:
    """Have all done of which a copy has a use. To be called once, before the first fork."""
    for name in _LOADED:
        importlib.import_module(name)
    from nydusd.cli.arguments import parse_arguments
    from nydusd.config.load import load_config
    from nydusd.errors import ConfigError
    from nydusd.nursery.birth import become_like

    for _ in range(_TURNS):
        with contextlib.suppress(OSError):  # it changes nothing: we are like ourselves
            become_like(os.getpid())
        environment(secrets=False)
        parse_arguments(_COMMAND)
        with contextlib.suppress(ConfigError):  # a wrong file of the node's is the daemons' business
            load_config(json.dumps(_CONFIGURATION), "rehearsal")
    logging.getLogger().setLevel(logging.INFO)  # what most daemons have
    gc.collect()
    _fill()
    gc.freeze()


def _fill() -> None:
    """Occupy what is free among small objects: of each size as many as it takes until a whole pool was free."""
    makers: dict[int, Callable[[], object]] = {16: object}  # and not of 32, among which the numbers below come to lie
    for size in range(48, _SMALL + 1, 16):
        makers[size] = functools.partial(bytes, size - sys.getsizeof(b""))
    for size, make in makers.items():
        whole = (_POOL - _POOL_HEAD) // size
        last, in_line = 0, 1
        while in_line < whole:
            filler = make()
            in_line = in_line + 1 if id(filler) - last == size else 1
            last = id(filler)
            _fillers.append(filler)
