"""`nydusctl top [-i SECONDS] [-n TURNS]`: live: hit rate, throughput, queues, workers, the slowest backend.

Each turn shows what happened since the one before: reads served from the cache and reads that waited, backend requests and
their average time, what is queued for workers, and what each process does. On a terminal the screen is drawn anew each
turn, else each turn is printed below the last. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from nydusd.cli.ctl.connection import Api, Json, RequestFailed
from nydusd.cli.ctl.terminal import Screen, screen
from nydusd.cli.ctl.text import (
    MISSING,
    count_of_processes,
    duration,
    list_at,
    number_at,
    one_line,
    size,
    table,
    table_at,
    text_at,
)
from nydusd.cli.ctl.verb import Seconds, Verb
from nydusd.cli.ctl.workers import ALONE, state_of
from nydusd.cli.ctl.workers import PATH as WORKERS

LOAD = "/api/v1/nydusd/load"
BACKEND = "/api/v1/metrics/backend"
HEAD = ("PROCESS", "PID", "JOBS/s", "JOBS", "PSS", "STATE")
_HISTORY = 60
_BARS = "▁▂▃▄▅▆▇█"
_MAX_BACKENDS = 64
"""Images whose backends are asked for each turn: on a node with hundreds, the rest would make the tool the load."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-i", "--interval", type=Seconds(3600), default=2.0, metavar="SECONDS", help="length of a turn (2)"
    )
    parser.add_argument("-n", "--turns", type=int, default=0, metavar="N", help="end after so many turns (0: never)")


class Sample(NamedTuple):
    """What the daemon said at one moment."""

    load: Json
    workers: Json
    backends: dict[str, Json]


def take(api: Api) -> Sample:
    """Ask the daemon. Raises RequestFailed."""
    load = api.get(LOAD)
    backends: dict[str, Json] = {}
    for image in list_at(load, "images")[:_MAX_BACKENDS]:
        try:
            backends[str(image)] = api.get(BACKEND, {"id": str(image)})
        except RequestFailed:
            continue  # it was unmounted meanwhile
    return Sample(load, api.get(WORKERS), backends)


def run(api: Api, args: argparse.Namespace) -> Iterator[str]:
    before = take(api)
    rates: list[float] = []
    for turn in itertools.count(1):
        time.sleep(args.interval)
        now = take(api)
        if args.raw:
            yield one_line({"load": now.load, "workers": now.workers, "backends": now.backends})
        else:
            shown = screen()
            rates = [*rates, _throughput(before, now)][-_HISTORY:]
            text = "\n".join(fitting(frame(before, now, rates, shown), shown))
            # Home, then each line to its end, then what is below: no flicker, as clearing all first has.
            yield (
                "\x1b[H" + text.replace("\n", "\x1b[K\n") + "\x1b[K\x1b[J"
                if shown.tty and shown.colour
                else text + "\n"
            )
        before = now
        if turn == args.turns:
            return


def _difference(before: object, now: object, key: str) -> float:
    """How much a total has grown; a daemon that was started anew begins at zero."""
    grown = number_at(now, key) - number_at(before, key)
    return grown if grown >= 0 else number_at(now, key)


def _seconds_between(before: Sample, now: Sample) -> float:
    return max(number_at(now.load, "time") - number_at(before.load, "time"), 1e-3)


def _throughput(before: Sample, now: Sample) -> float:
    reads, earlier = table_at(now.load, "reads"), table_at(before.load, "reads")
    amount = _difference(earlier, reads, "hit_bytes") + _difference(earlier, reads, "miss_bytes")
    return amount / _seconds_between(before, now)


def fitting(lines: Iterable[str], shown: Screen) -> list[str]:
    """What has room: a line that wraps, or is behind the last but one, would have a terminal scroll each turn."""
    return [line[: shown.columns] for line in lines][: shown.rows - 1] if shown.tty else list(lines)


def frame(before: Sample, now: Sample, rates: list[float], shown: Screen) -> Iterator[str]:
    """The lines of one turn."""
    seconds = _seconds_between(before, now)
    reads, earlier = table_at(now.load, "reads"), table_at(before.load, "reads")
    hits, misses = _difference(earlier, reads, "hits"), _difference(earlier, reads, "misses")
    processes = list_at(now.workers, "processes")
    pss = sum(number_at(process, "pss_bytes") for process in processes)
    images = len(list_at(now.load, "images"))
    yield (
        f"nydusd {text_at(now.load, 'state')}, up {duration(number_at(now.workers, 'uptime'))}, "
        f"{images} image{'' if images == 1 else 's'}, {text_at(now.load, 'blobs')} blobs, "
        f"{count_of_processes(processes)}, {size(pss)} PSS"
    )
    yield ""
    rate = f"{hits / (hits + misses):.1%}" if hits + misses else MISSING
    counts = f"hits {hits / seconds:.0f}/s  misses {misses / seconds:.0f}/s"
    yield f"reads    {size(_throughput(before, now))}/s  hit rate {rate}  {counts}"
    if shown.unicode:
        yield f"         {_bars(rates)}"
    prefetched = _difference(table_at(before.load, "prefetch"), table_at(now.load, "prefetch"), "bytes")
    errors = _difference(earlier, reads, "errors")
    yield (
        f"queue    {text_at(now.load, 'waiting')} reads wait, {size(number_at(now.load, 'arena_bytes'))} in shared memory, "
        f"prefetch {size(prefetched / seconds)}/s, failed reads {errors:.0f}"
    )
    for role, pool in table_at(now.load, "pools").items():
        queued = ", ".join(f"{name} {count}" for name, count in table_at(pool, "queued").items())
        yield f"{role:<12} {text_at(pool, 'busy')} of {text_at(pool, 'workers')} workers busy, queued: {queued}"
    yield _slowest(before, now, seconds)
    yield ""
    rows = table(HEAD, [_row(before, process, seconds) for process in processes]).split("\n")
    room = max(shown.rows - 12, 3) if shown.tty else len(rows)
    yield from rows[:room]
    if len(rows) > room:
        yield f"… and {len(rows) - room} more"


def _slowest(before: Sample, now: Sample, seconds: float) -> str:
    """The image whose backend took longest for a request in this turn."""
    found: list[tuple[float, str]] = []
    for place, metrics in now.backends.items():
        earlier = before.backends.get(place, {})
        count = _difference(earlier, metrics, "read_count")
        if count:
            millis = _difference(earlier, metrics, "read_cumulative_latency_millis_total") / count
            amount = _difference(earlier, metrics, "read_amount_total")
            kind = text_at(metrics, "backend_type")
            text = f"{kind} of {place}: {count / seconds:.1f} requests/s, {size(amount / seconds)}/s"
            if "read_cumulative_latency_millis_total" in metrics:
                text += f", {millis:.1f} ms each"
            found.append((millis, text))
    images = len(list_at(now.load, "images"))
    part = f" (of the first {_MAX_BACKENDS} of {images} images)" if images > _MAX_BACKENDS else ""
    return f"slowest backend{part}  " + (max(found)[1] if found else "none was asked")


def _row(before: Sample, process: object, seconds: float) -> list[str]:
    pid, role = text_at(process, "pid"), text_at(process, "role")
    earlier = next((other for other in list_at(before.workers, "processes") if text_at(other, "pid") == pid), {})
    jobs = text_at(process, "jobs")
    return [
        role if role in ALONE else f"{role} {text_at(process, 'index')}",
        pid,
        MISSING if jobs == MISSING else f"{_difference(earlier, process, 'jobs') / seconds:.1f}",
        jobs,
        size(number_at(process, "pss_bytes")),
        state_of(process),
    ]


def _bars(rates: list[float]) -> str:
    most = max(rates, default=0.0) or 1.0
    return (
        "".join(_BARS[min(int(rate / most * len(_BARS)), len(_BARS) - 1)] for rate in rates)
        + f"  (most {size(most)}/s)"
    )


VERB = Verb(("top",), "live: hit rate, throughput, queue, workers, slowest backend", run, add_arguments)
