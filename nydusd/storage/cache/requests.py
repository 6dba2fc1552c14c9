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
    """A front end waits for chunks first .. first + count - 1 of a blob. `left` are the chunks not yet there."""

    client: bytes
    number: int
    cache: BlobCache
    first: int
    count: int
    flags: int
    left: set[int] = field(default_factory=set)
    errno: int = 0


@dataclass(eq=False, slots=True)
class Job:
    """Work for one worker. `done` gets the worker's answer, or an answer with `error` when three workers died on it."""

    kind: str
    cache: BlobCache | None
    priority: Priority
    payload: Answer
    done: Callable[[Job, Answer], None]
    chunks: list[int] = field(default_factory=list)
    slot: tuple[int, int] | None = None
    number: int = 0
    attempts: int = 0
    cancelled: bool = False
