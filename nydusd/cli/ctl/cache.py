"""`nydusctl cache [--map] [--png FILE] [--blob ID]`, `nydusctl cache gc [--to BYTES]`: how much of each blob is here.

On a terminal, or with --map, a heat map of each blob's chunk map follows the table: its first chunk is at the upper left, and
the fuller and hotter a letter, the more of its chunks are here. --png writes the same with a square for each chunk: grey
is empty, yellow on its way, green here, pink failed, blue to be verified before use.

`gc` removes the cache files of blobs that no mount uses, and, where a quota is set (`nydusd.cache_quota`) or given with --to
(K, M, G, T may be appended), takes the least recently used chunks of the others out, until the folder is below it. What
was asked for in the last 2 seconds stays, and so do blobs that another daemon uses.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping

from nydusd.cli.ctl.connection import Api
from nydusd.cli.ctl.picture import legend, png, states_of, terminal_map
from nydusd.cli.ctl.terminal import screen
from nydusd.cli.ctl.text import MISSING, list_at, number_at, one_line, printable, size, table, table_at, text_at
from nydusd.cli.ctl.verb import Verb
from nydusd.errors import NydusError

QUOTA = "/api/v1/nydusd/quota"
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_PATIENCE = 60.0
_PAUSE = 0.2
"""Seconds between questions whether it is done: the API has no event for that."""

HEAD = ("BLOB", "CHUNKS", "READY", "%", "BYTES", "OF", "HITS", "MISSES", "ERRORS", "STATE")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", nargs="?", choices=("gc",), help="gc: make room in the cache folder")
    parser.add_argument("--to", type=_bytes, metavar="BYTES", help="with gc: what the cache folder may still take")
    parser.add_argument("--map", action="store_true", help="draw each blob's chunk map, also when this is no terminal")
    parser.add_argument("--png", metavar="FILE", help="write a picture of the chunk maps")
    parser.add_argument("--blob", metavar="ID", default="", help="only blobs whose id begins so")


def _bytes(text: str) -> int:
    unit = text[-1:].upper() if text[-1:].upper() in _UNITS else ""
    number = text.removesuffix(text[-1:]) if unit else text
    if not (number.isascii() and number.isdigit() and len(number) < 20):
        raise argparse.ArgumentTypeError(f"must be a number of bytes, or one with K, M, G or T, but is {text[:32]!r}")
    return int(number) * _UNITS[unit]


def _gc(api: Api, target: int | None) -> Iterator[str]:
    """Order it and wait until it is done."""
    before = table_at(api.put(QUOTA, {} if target is None else {"target": target}), "folders")
    deadline = time.monotonic() + _PATIENCE
    now = before
    while any(_under_way(before, now, path) for path in before) and time.monotonic() < deadline:
        time.sleep(_PAUSE)
        now = table_at(api.get(QUOTA), "folders")
    for path, folder in now.items():
        earlier = before.get(path)
        freed = number_at(folder, "evicted_bytes") - number_at(earlier, "evicted_bytes")
        blobs = number_at(folder, "removed_blobs") - number_at(earlier, "removed_blobs")
        chunks = number_at(folder, "evicted_chunks") - number_at(earlier, "evicted_chunks")
        yield (
            f"{printable(path)}: {blobs:.0f} unused blobs removed, {chunks:.0f} chunks of used ones taken out "
            f"({size(freed)}), {size(number_at(folder, 'used'))} were taken before that"
        )


def _under_way(before: Mapping[str, object], now: Mapping[str, object], path: str) -> bool:
    rounds = number_at(now.get(path), "rounds")
    return path in now and (rounds <= number_at(before[path], "rounds") or bool(number_at(now[path], "evicting")))


def run(api: Api, args: argparse.Namespace) -> Iterator[str]:
    if args.action == "gc":
        yield from _gc(api, args.to)
        return
    answer = api.get("/api/v1/nydusd/cache")
    if args.raw:
        yield one_line(answer)
        return
    blobs = [blob for blob in list_at(answer, "blobs") if text_at(blob, "blob_id").startswith(args.blob)]
    # A table that wraps is no table; ids are whole where a program reads them, and above the maps.
    yield table(HEAD, [_row(blob, 16 if screen().tty else None) for blob in blobs])
    if not (args.map or args.png or screen().tty):
        return
    maps = list_at(api.get("/api/v1/nydusd/chunks", {"blob_id": args.blob}), "blobs")
    if args.png:
        _write(args.png, png([states_of(blob) for blob in maps]))
    if args.map or screen().tty:
        yield from _maps(maps)


def _maps(blobs: object) -> Iterator[str]:
    shown = screen()
    for blob in blobs if isinstance(blobs, list) else []:
        states = states_of(blob)
        yield f"\n{text_at(blob, 'blob_id')}"
        yield from terminal_map(states, shown.columns, shown.colour, shown.unicode)
        yield legend(states, shown.columns, shown.unicode)


def _write(path: str, data: bytes) -> None:
    try:
        with open(path, "wb") as f:
            f.write(data)
    except (OSError, ValueError) as error:
        raise NydusError(f"--png {path}: {getattr(error, 'strerror', None) or error}") from error


def _row(blob: object, id_length: int | None) -> list[str]:
    chunks = number_at(blob, "chunks")
    # Rounded down: 100 must mean all of it.
    percent = f"{int(1000 * number_at(blob, 'ready') / chunks) / 10:.1f}" if chunks else MISSING
    state, reason = text_at(blob, "state"), text_at(blob, "reason")
    return [
        text_at(blob, "blob_id")[:id_length],
        text_at(blob, "chunks"),
        text_at(blob, "ready"),
        percent,
        text_at(blob, "ready_bytes"),
        text_at(blob, "uncompressed_size"),
        text_at(blob, "hits"),
        text_at(blob, "misses"),
        text_at(blob, "errors"),
        state if reason == MISSING else f"{state}: {reason}",
    ]


VERB = Verb(("cache",), "how much of each blob is here", run, add_arguments)
