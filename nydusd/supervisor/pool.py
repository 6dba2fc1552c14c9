"""WorkerPool: the workers of one role, the queue of jobs before them, and who does what.

One job a worker. A job whose worker died goes to another, first in line; after three deaths it is given up, so that a chunk
that kills workers does not kill them all. Jobs of a higher priority go first; within one, in order of arrival.
"""

from __future__ import annotations

import errno
import logging
from collections import deque
from collections.abc import Callable
from itertools import count

from nydusd.ipc.messages import Json
from nydusd.storage.cache.requests import Job, Priority

log = logging.getLogger(__name__)

_ATTEMPTS = 3


class WorkerPool:
    """`send(identity, message)` gives a job to a worker; `more()` is asked for work when a worker would be idle."""

    def __init__(self, role: str, send: Callable[[bytes, Json], None], more: Callable[[], Job | None]) -> None:
        self.role = role
        self._send = send
        self._more = more
        self._queues: dict[Priority, deque[Job]] = {priority: deque() for priority in Priority}
        self._idle: deque[bytes] = deque()
        self._busy: dict[bytes, Job] = {}
        self._knows: dict[bytes, dict[int, int]] = {}
        self._numbers = count(1)
        self.jobs_done = 0

    def submit(self, job: Job) -> None:
        """Queue a job; it is sent by `pump`."""
        job.number = next(self._numbers)
        self._queues[job.priority].append(job)

    def promote(self, job: Job) -> None:
        """A reader waits for this job now: put it among the users' jobs if it is still queued."""
        if job.priority is Priority.USER:
            return
        try:
            self._queues[job.priority].remove(job)
        except ValueError:
            return
        job.priority = Priority.USER
        self._queues[Priority.USER].append(job)

    @property
    def size(self) -> int:
        """Workers that are there now."""
        return len(self._idle) + len(self._busy)

    def queued(self) -> int:
        return sum(map(len, self._queues.values()))

    def busy(self) -> int:
        return len(self._busy)

    def jobs(self) -> list[Job]:
        """All jobs, under way or queued."""
        return [*self._busy.values(), *(job for queue in self._queues.values() for job in queue)]

    def has(self, priority: Priority) -> bool:
        """Whether a job of this priority, or a more urgent one, is queued."""
        return any(self._queues[p] for p in Priority if p <= priority)

    def pump(self) -> None:
        """Give jobs to idle workers."""
        while self._idle:
            job = self._next()
            if job is None:
                return
            identity = self._idle.popleft()
            self._busy[identity] = job
            message = job.payload | {"kind": job.kind, "id": job.number}
            cache = job.cache
            if cache is not None:
                message |= {"handle": cache.handle, "chunks": job.chunks}
                known = self._knows[identity]
                if known.get(cache.handle) != cache.spec.generation:
                    known[cache.handle] = cache.spec.generation
                    message["spec"] = cache.spec.to_json()
            self._send(identity, message)

    def _next(self) -> Job | None:
        for queue in self._queues.values():
            while queue:
                job = queue.popleft()
                if not job.cancelled:
                    return job
        return self._more()

    def worker_ready(self, identity: bytes) -> None:
        """A new worker has announced itself."""
        self._knows[identity] = {}
        self._idle.append(identity)

    def worker_done(self, identity: bytes, answer: Json) -> None:
        """A worker reports; a report of a job that it does not have is of a former life and ignored."""
        job = self._busy.get(identity)
        if job is None or job.number != answer.get("id"):
            return
        del self._busy[identity]
        self._idle.append(identity)
        self.jobs_done += 1
        job.done(job, answer)

    def worker_died(self, identity: bytes) -> None:
        """Forget a worker; its job is done again, or given up."""
        self._knows.pop(identity, None)
        if identity in self._idle:
            self._idle.remove(identity)
        job = self._busy.pop(identity, None)
        if job is None:
            return
        job.attempts += 1
        if job.attempts < _ATTEMPTS:
            log.warning("job %s of %s is given to another worker", job.kind, identity.decode())
            self._queues[job.priority].appendleft(job)
            return
        log.error("job %s has lost %d workers and is given up", job.kind, _ATTEMPTS)
        job.done(job, {"error": f"{_ATTEMPTS} workers died on it", "errno": errno.EIO, "type": "WorkerDied"})
