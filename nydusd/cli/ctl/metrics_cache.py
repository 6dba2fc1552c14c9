"""`nydusctl metrics cache [-m PATH]`: how the blob cache does (GET /api/v1/metrics/blobcache)."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from nydusd.cli.ctl.connection import Api
from nydusd.cli.ctl.image import add_mountpoint, metrics_of
from nydusd.cli.ctl.text import MISSING, list_at, number_at, one_line, pairs, printable, text_at
from nydusd.cli.ctl.verb import Verb


def run(api: Api, args: argparse.Namespace) -> Iterator[str]:
    metrics = metrics_of(api, "/api/v1/metrics/blobcache", args.mountpoint)
    if args.raw:
        yield one_line(metrics)
        return
    total = number_at(metrics, "total")
    requests = number_at(metrics, "prefetch_requests_count")
    amount = number_at(metrics, "prefetch_data_amount")
    seconds = number_at(metrics, "prefetch_cumulative_time_millis") / 1000
    duration = _seconds(metrics, "prefetch_end_time") - _seconds(metrics, "prefetch_begin_time")
    yield pairs(
        [
            ("Partial Hits", text_at(metrics, "partial_hits")),
            ("Whole Hits", text_at(metrics, "whole_hits")),
            ("Total Reads", text_at(metrics, "total")),
            ("Hit Ratio", _ratio(number_at(metrics, "partial_hits") + number_at(metrics, "whole_hits"), total)),
            ("Chunks Ready", text_at(metrics, "entries_count")),
            ("All Data Ready", text_at(metrics, "data_all_ready")),
            ("Directory", text_at(metrics, "store_path")),
            ("Files", ", ".join(printable(str(name)) for name in list_at(metrics, "underlying_files")) or MISSING),
            ("Prefetch Workers", text_at(metrics, "prefetch_workers")),
            ("Prefetch Amount (bytes)", text_at(metrics, "prefetch_data_amount")),
            ("Prefetch Requests", text_at(metrics, "prefetch_requests_count")),
            ("Prefetch Unmerged Chunks", text_at(metrics, "prefetch_unmerged_chunks")),
            ("Prefetch Average Size (bytes)", f"{amount / requests:.0f}" if requests else MISSING),
            ("Prefetch Average Latency (s)", f"{seconds / requests:.3f}" if requests else MISSING),
            ("Prefetch Duration (s)", f"{duration:.3f}" if duration > 0 else MISSING),
        ]
    )


def _seconds(metrics: dict[str, object], name: str) -> float:
    return number_at(metrics, f"{name}_secs") + number_at(metrics, f"{name}_millis") / 1000


def _ratio(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else MISSING


VERB = Verb(("metrics", "cache"), "how the blob cache does", run, add_mountpoint)
