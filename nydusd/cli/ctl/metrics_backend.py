"""`nydusctl metrics backend [-I SECONDS] [-m PATH]`: what was read from the backend (GET /api/v1/metrics/backend)."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

from nydusd.cli.ctl.connection import Api
from nydusd.cli.ctl.image import add_mountpoint, metrics_of
from nydusd.cli.ctl.text import SIZE_CLASSES, list_at, number_at, one_line, pairs, table, text_at
from nydusd.cli.ctl.verb import Seconds, Verb

PATH = "/api/v1/metrics/backend"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_mountpoint(parser)
    parser.add_argument(
        "-I",
        "--interval",
        type=Seconds(86400),
        metavar="SECONDS",
        help="print what happened in each interval, until Ctrl-C",
    )


def run(api: Api, args: argparse.Namespace) -> Iterator[str]:
    metrics = metrics_of(api, PATH, args.mountpoint)
    if args.interval is not None:
        yield from _intervals(api, metrics, args)
    elif args.raw:
        yield one_line(metrics)
    else:
        yield from _summary(metrics)


def _summary(metrics: dict[str, object]) -> Iterator[str]:
    yield pairs(
        [
            ("Backend Type", text_at(metrics, "backend_type")),
            ("Read Amount (bytes)", text_at(metrics, "read_amount_total")),
            ("Read Count", text_at(metrics, "read_count")),
            ("Read Errors", text_at(metrics, "read_errors")),
        ]
    )
    counts = list_at(metrics, "read_count_block_size_dist")
    latencies = list_at(metrics, "read_cumulative_latency_millis_dist")
    rows = [
        [size, one_line(count), one_line(latency), _average(latency, count)]
        for size, count, latency in zip(SIZE_CLASSES, counts, latencies, strict=False)
    ]
    if rows:  # not every daemon counts by size
        yield "\n" + table(["Block Size", "Read Count", "Latency (ms)", "Average (ms)"], rows)


def _average(total: object, count: object) -> str:
    if isinstance(total, int | float) and isinstance(count, int | float) and count > 0:
        return f"{total / count:.1f}"
    return "-"


def _intervals(api: Api, before: dict[str, object], args: argparse.Namespace) -> Iterator[str]:
    seconds = args.interval
    while True:
        time.sleep(seconds)
        now = metrics_of(api, PATH, args.mountpoint)
        amount = number_at(now, "read_amount_total") - number_at(before, "read_amount_total")
        count = number_at(now, "read_count") - number_at(before, "read_count")
        key = "read_cumulative_latency_millis_total"
        latency = number_at(now, key) - number_at(before, key)
        size = amount / count if count else 0
        yield (
            f"bandwidth {amount / seconds / 1024:.1f} KiB/s, average request {size / 1024:.1f} KiB, "
            f"average latency {latency / count if count else 0:.1f} ms"
        )
        before = now


VERB = Verb(("metrics", "backend"), "what was read from the backend", run, add_arguments)
