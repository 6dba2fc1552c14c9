"""`nydusctl metrics fsstats [-m PATH]`: what was asked of the file system (GET /api/v1/metrics)."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from nydusd.cli.ctl.connection import Api
from nydusd.cli.ctl.image import add_mountpoint, metrics_of
from nydusd.cli.ctl.text import SIZE_CLASSES, list_at, one_line, pairs, table, text_at
from nydusd.cli.ctl.verb import Verb

OPERATIONS = (
    "Getattr",
    "Readlink",
    "Open",
    "Release",
    "Read",
    "Statfs",
    "Getxattr",
    "Listxattr",
    "Opendir",
    "Lookup",
    "Readdir",
    "Readdirplus",
    "Access",
    "Forget",
    "BatchForget",
)
LATENCIES = ("<=200us", "<=1ms", "<=20ms", "<=50ms", "<=500ms", "<=1s", "<=2s", ">2s")
READ = OPERATIONS.index("Read")


def run(api: Api, args: argparse.Namespace) -> Iterator[str]:
    metrics = metrics_of(api, "/api/v1/metrics", args.mountpoint)
    if args.raw:
        yield one_line(metrics)
        return
    hits = list_at(metrics, "fop_hits")
    errors = list_at(metrics, "fop_errors")
    read_errors = one_line(errors[READ]) if len(errors) > READ else "-"
    yield pairs(
        [
            ("Instance", text_at(metrics, "id")),
            ("Read Errors", read_errors),
            ("Data Read", text_at(metrics, "data_read")),
        ]
    )
    yield "\n" + table(
        ["Read Latency", "Reads", ""],
        [
            [name, one_line(value), ""]
            for name, value in zip(LATENCIES, list_at(metrics, "read_latency_dist"), strict=False)
        ],
    )
    yield "\n" + table(
        ["Read Size", "Reads", ""],
        [
            [name, one_line(value), ""]
            for name, value in zip(SIZE_CLASSES, list_at(metrics, "block_count_read"), strict=False)
        ],
    )
    yield "\n" + table(
        ["Operation", "Count", "Errors", ""],
        [
            [name, one_line(hit), one_line(error), ""]
            for name, hit, error in zip(OPERATIONS, hits, errors, strict=False)
        ],
    )


VERB = Verb(("metrics", "fsstats"), "what was asked of the file system", run, add_mountpoint)
