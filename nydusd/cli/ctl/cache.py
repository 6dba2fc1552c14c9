"""`nydusctl cache`: how much of each blob is here (GET /api/v1/nydusd/cache; this implementation only)."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from nydusd.cli.ctl.connection import Api
from nydusd.cli.ctl.text import MISSING, list_at, number_at, one_line, table, text_at
from nydusd.cli.ctl.verb import Verb

HEAD = ("BLOB", "CHUNKS", "READY", "%", "BYTES", "OF", "HITS", "MISSES", "ERRORS", "STATE")


def run(api: Api, args: argparse.Namespace) -> Iterator[str]:
    answer = api.get("/api/v1/nydusd/cache")
    if args.raw:
        yield one_line(answer)
        return
    yield table(HEAD, [_row(blob) for blob in list_at(answer, "blobs")])


def _row(blob: object) -> list[str]:
    chunks = number_at(blob, "chunks")
    # Rounded down: 100 must mean all of it.
    percent = f"{int(1000 * number_at(blob, 'ready') / chunks) / 10:.1f}" if chunks else MISSING
    state, reason = text_at(blob, "state"), text_at(blob, "reason")
    return [
        text_at(blob, "blob_id"),
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


VERB = Verb(("cache",), "how much of each blob is here", run)
