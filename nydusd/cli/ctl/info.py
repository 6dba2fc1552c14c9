"""`nydusctl info`: which daemon this is, its state and its images (GET /api/v1/daemon)."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from nydusd.cli.ctl.connection import Api, RequestFailed
from nydusd.cli.ctl.text import list_at, number_at, one_line, pairs, printable, table_at, text_at
from nydusd.cli.ctl.verb import Verb


def run(api: Api, args: argparse.Namespace) -> Iterator[str]:
    info = api.get("/api/v1/daemon")
    if args.raw:
        yield one_line(info)
        return
    version = table_at(info, "version")
    head = {
        "Version": version.get("package_ver"),
        "Status": info.get("state"),
        "Profile": version.get("profile"),
        "Commit": version.get("git_commit"),
    }
    # In JSON quotes, as clients of the reference's tool expect them.
    yield pairs([(name, one_line(value)) for name, value in head.items()])
    images = table_at(info, "backend_collection")
    if images:
        yield "\nInstances:"
    for mountpoint, image in images.items():
        config = table_at(image, "config")
        rows = [
            ("Mountpoint", printable(mountpoint)),
            ("Type", text_at(image, "backend_type")),
            ("Mounted Time", text_at(image, "mounted_time")),
        ]
        if config:
            rafs = table_at(config, "rafs")
            prefetch = table_at(rafs, "prefetch")
            rows += [
                ("Mode", text_at(rafs, "mode")),
                ("Prefetch", text_at(prefetch, "enable")),
                ("Prefetch Merging Size", text_at(prefetch, "batch_size")),
            ]
        yield pairs(rows) + "\n"
    try:
        mounts = list_at(api.get("/api/v1/nydusd/mounts"), "images")
    except RequestFailed:
        return  # a daemon that does not tell
    for mount in mounts:
        yield _in_one_line(mount)


def _in_one_line(mount: object) -> str:
    """Whether an image is lazy or complete, through which front end it is read, and why."""
    chunks, ready = number_at(mount, "chunks"), number_at(mount, "ready")
    complete = ready >= chunks and not list_at(mount, "failed")
    how = f"{'complete' if complete else 'lazy'}, {ready:.0f} of {chunks:.0f} chunks are here"
    why = text_at(mount, "why")
    front_end = f"read through {text_at(mount, 'front_end')} ({text_at(mount, 'why_front_end')})"
    return f"{text_at(mount, 'mountpoint')}: {how}: {why}; {front_end}"


VERB = Verb(("info",), "which daemon this is, its state and its images", run)
