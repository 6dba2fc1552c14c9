"""A reader that waits: what the loop of the front end knows of it.

After SIGKILL the journal has what the successor needs: event, file and range.
"""

from __future__ import annotations

from nydusd.storage.api.io import ChunkRun

from .device import Blob


class Waiting:
    """A reader that waits: its event's number, what it still needs, until when, and where that is shown (`slot`)."""

    __slots__ = (
        "blobs",
        "count",
        "deadline",
        "number",
        "offset",
        "pending",
        "place",
        "refused",
        "rounds",
        "runs",
        "slot",
    )

    def __init__(self, number: int, place: int, offset: int, count: int, blobs: list[Blob], deadline: float) -> None:
        self.number = number
        self.place = place
        self.offset = offset
        self.count = count
        self.blobs = blobs
        self.deadline = deadline
        self.rounds = 1
        self.slot = -1
        self.refused: set[int] = set()
        """Handles by which what it needs could not be had."""
        self.pending: dict[int, tuple[ChunkRun, int]] = {}
        self.runs: list[tuple[Blob, ChunkRun]] = []
