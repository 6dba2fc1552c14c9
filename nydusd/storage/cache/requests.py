"""Requests and jobs: what front ends wait for, and what workers do. Plain records of the supervisor's tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nydusd.storage.cache.blob_cache import BlobCache

Answer = dict[str, Any]


class Priority(IntEnum):
    """Order in which queued jobs go to workers."""

    USER = 0
    AHEAD = 1
    PREFETCH = 2


@dataclass(eq=False, slots=True)
class Request:
    """A front end waits for chunks first .. first + count - 1 of a blob.

    `left` are the chunks that it waits for now, `held` the arena regions that are kept for it until it is answered,
    `rounds` how often it had to start over. `until` is when its reader gives up (monotonic seconds), `put_off` how often it
    had to wait for a backend that could not be reached.
    """

    client: bytes
    number: int
    cache: BlobCache
    first: int
    count: int
    left: set[int] = field(default_factory=set)
    held: list[int] = field(default_factory=list)
    rounds: int = 0
    until: float = 0.0
    put_off: int = 0

    @property
    def key(self) -> tuple[bytes, int]:
        """Its name: the client's identity and the client's number."""
        return self.client, self.number

    @property
    def chunks(self) -> range:
        return range(self.first, self.first + self.count)


@dataclass(eq=False, slots=True)
class Job:
    """Work for one worker. `done` gets the worker's answer, or an answer with `error` when too many workers died on it.

    `attempts` are those that died of themselves or hung, `kills` those that were killed. `queued` is when it was given to
    the pool, `started` when it went to a worker (monotonic seconds).
    A job that is `cancelled` has lost its claims; `done` is still called, once, to take back what else it holds.
    """

    kind: str
    cache: BlobCache | None
    priority: Priority
    payload: Answer
    done: Callable[[Job, Answer], None]
    chunks: list[int] = field(default_factory=list)
    slot: tuple[int, int] | None = None
    number: int = 0
    attempts: int = 0
    kills: int = 0
    queued: float = 0.0
    started: float = 0.0
    cancelled: bool = False
