"""What was asked of a backend for one blob, and how long it took. Kept by the supervisor from what workers report.

Lost with the supervisor. Sizes are bytes, times milliseconds, classes those of the API.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from nydusd.ipc.mount_counters import size_class

_LIMITS: Final = (1, 20, 50, 100, 500, 1000, 2000)


class BackendCounts:
    """Requests of one blob."""

    def __init__(self) -> None:
        self.reads = 0
        self.errors = 0
        self.bytes = 0
        self.milliseconds = 0.0
        self.by_size = [0] * 8
        self.milliseconds_by_size = [0.0] * 8
        self.by_size_and_latency = [[0] * 8 for _ in range(8)]

    def add(self, answer: dict[str, Any]) -> None:
        """A worker's report of a job: `reads`, `read_errors`, `read_bytes`, and `timed`, [bytes, ms] a request."""
        self.reads += answer.get("reads", 0)
        self.errors += answer.get("read_errors", 0)
        self.bytes += answer.get("read_bytes", 0)
        for size, took in answer.get("timed", ()):
            of = size_class(size)
            self.milliseconds += took
            self.by_size[of] += 1
            self.milliseconds_by_size[of] += took
            latency = next((i for i, limit in enumerate(_LIMITS) if took <= limit), 7)
            self.by_size_and_latency[of][latency] += 1


def shown(kind: str, blobs: Iterable[BackendCounts]) -> dict[str, Any]:
    """The API's answer for a backend of this kind that serves these blobs."""
    rows = list(blobs)
    return {
        "backend_type": kind,
        "read_count": sum(row.reads for row in rows),
        "read_errors": sum(row.errors for row in rows),
        "read_amount_total": sum(row.bytes for row in rows),
        "read_cumulative_latency_millis_total": round(sum(row.milliseconds for row in rows)),
        "read_cumulative_latency_millis_dist": [
            round(sum(row.milliseconds_by_size[of] for row in rows)) for of in range(8)
        ],
        "read_count_block_size_dist": [sum(row.by_size[of] for row in rows) for of in range(8)],
        "read_latency_sizes_dist": [
            [sum(row.by_size_and_latency[of][latency] for row in rows) for latency in range(8)] for of in range(8)
        ],
    }
