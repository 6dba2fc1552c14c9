"""WorkerPool: the workers of one role, the queue of jobs before them, and who does what.

One job a worker. A job whose worker died goes to another, first in line; after three deaths it is given up, so that a chunk
that kills workers does not kill them all. A worker that was killed from outside is hardly the job's fault, unless it is the
system that ends what eats its memory: that is believed after ten. Jobs of a higher priority go first; within one, in
order of arrival. But no server gets the last worker while another one's blobs are mounted too, and one whose last job failed
for want of an answer gets one worker at a time: a server that accepts and says nothing must not hold all workers.

Of a slow server there may be more readers than workers for minutes. Chunk maps are stored then as well, and room is made:
one such job at a time goes before the readers' when it has waited for long enough.

A worker that was killed keeps its job until it is gone, however long a disk that stands still holds it. When that goes on, an
`evict` punches the hole that it was at, which must not be into what was fetched again meanwhile; and a `fill` goes on to copy
from its region of the stage, which must not be another's by then, for chunks that are not compressed are written straight from
there. The others could be done again; but who did them would wait for the same disk, one worker after the other.

A worker that is to leave (an upgrade, a smaller pool) is retired: it does the job that it has and gets no other.
"""

from __future__ import annotations

import errno
import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from itertools import count

from nydusd import points
from nydusd.errors import ScarceError
from nydusd.ipc.messages import Json
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.cache.requests import Answer, Job, Priority
from nydusd.storage.cache.spec import BlobSpec

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""Workers that may die on one job."""
_KILLS = 10
"""Workers that may be killed from outside while they do it."""
_OVER_NETWORK = ("fetch", "prepare")
"""Kinds of jobs that wait for a server; the second only sometimes."""
_PROMPT = ("fetch", "fill")
"""Kinds of jobs on a few chunks: they never compute for long. All others may go through all of a blob, or of an image."""
_UPKEEP = ("checkpoint", "evict", "survey")
"""Kinds of jobs that no reader waits for, and that must not be put off for ever."""
_PATIENCE = 2.0
"""Seconds that such a job waits for a time at which no reader needs its worker."""


class WorkerPool:
    """`send(identity, message)` gives a job to a worker; `more()` may submit jobs when a worker would be idle.

    `others(server)` says whether there are blobs of other servers, too.
    """

    def __init__(
        self,
        role: str,
        send: Callable[[bytes, Json], None],
        more: Callable[[], None],
        others: Callable[[str], bool] = lambda server: False,
    ) -> None:
        self.role = role
        self._send = send
        self._more = more
        self._others = others
        self._silent: set[str] = set()
        self._queues: dict[Priority, deque[Job]] = {priority: deque() for priority in Priority}
        self._idle: deque[bytes] = deque()
        self._busy: dict[bytes, Job] = {}
        self._retired: set[bytes] = set()
        self._knows: dict[bytes, dict[int, BlobSpec]] = {}
        self._to_forget: dict[bytes, list[int]] = {}
        self._done: dict[bytes, int] = {}
        self._connections: dict[bytes, Json] = {}
        self._refused: set[str] = set()
        self._numbers = count(1)
        self._readers_turn = 0.0  # until then no job goes before those of readers
        self.resting = 0
        """Workers that have ended for want of jobs (`rest.py`); they are started again for the next ones."""
        self.jobs_done = 0
        self.jobs_failed = 0
        self.read_bytes: Counter[str] = Counter()
        """Bytes that workers had from backends, by the priority of the job: who wanted them."""
        self.route_bytes: Counter[str] = Counter()
        """The same for backends over HTTP, by the way on which they came: origin, proxy, mirror."""

    def submit(self, job: Job) -> None:
        """Queue a job; it is sent by `pump`."""
        if job.kind in self._refused:
            return
        job.number = next(self._numbers)
        job.queued = time.monotonic()
        self._queues[job.priority].append(job)

    def promote(self, job: Job) -> bool:
        """A reader waits for this job now: put it among the users' jobs, at once (True) or when its worker dies."""
        if job.priority is Priority.USER:
            return False
        queue = self._queues[job.priority]
        job.priority = Priority.USER
        if job not in queue:
            return False
        queue.remove(job)
        self._queues[Priority.USER].append(job)
        return True

    def cancel(self, cache: BlobCache) -> None:
        """Jobs of this blob are void: those queued end now, those under way when their worker reports or dies."""
        for job in self._busy.values():
            job.cancelled = job.cancelled or job.cache is cache
        ended: list[Job] = []
        for priority, queue in self._queues.items():
            ended += (job for job in queue if job.cache is cache)
            self._queues[priority] = deque(job for job in queue if job.cache is not cache)
        for job in ended:
            job.cancelled = True
            job.done(job, {})

    def withdraw(self, job: Job) -> None:
        """Nobody wants any more what comes of a job: it is not begun, nor done again. `done` may be called or not."""
        job.cancelled = True
        queue = self._queues[job.priority]
        if job in queue:
            queue.remove(job)

    def has(self, cache: BlobCache) -> bool:
        """Whether a worker does something with this blob, wanted or not."""
        return any(job.cache is cache for job in self._busy.values())

    def refuse(self, kind: str) -> list[bytes]:
        """No job of this kind is begun any more, and nobody is told: the daemon ends. Gives the workers that have one."""
        self._refused.add(kind)
        for priority, queue in self._queues.items():
            self._queues[priority] = deque(job for job in queue if job.kind != kind)
        return self.doing(kind)

    def doing(self, kind: str) -> list[bytes]:
        """The workers that have a job of this kind."""
        return [identity for identity, job in self._busy.items() if job.kind == kind]

    @property
    def size(self) -> int:
        """Workers that are there now, or will be as soon as there is something to do, and stay."""
        return len(self._idle) + len(self._busy.keys() - self._retired) + self.resting

    def starved(self) -> int:
        """Jobs that wait while no worker is idle."""
        return 0 if self._idle else self.queued()

    def facts(self, identity: bytes) -> Json:
        """What a worker does, for the operator: jobs done, the kind of the one under way, connections open by host.

        `ready` is false while it starts, `connections` is as of the end of its last job.
        """
        job = self._busy.get(identity)
        return {
            "ready": identity in self._knows,
            "jobs": self._done.get(identity, 0),
            "busy": None if job is None else job.kind,
            "connections": self._connections.get(identity, {}),
        }

    def forget(self, cache: BlobCache) -> None:
        """No image uses this blob any more: each worker that has it open is told so with its next job."""
        for identity, known in self._knows.items():
            if known.pop(cache.handle, None) is not None:
                self._to_forget.setdefault(identity, []).append(cache.handle)

    def retire(self, identity: bytes) -> None:
        """A worker that is to leave: it gets no more jobs. `is_busy` says whether it has one still."""
        self._retired.add(identity)
        if identity in self._idle:
            self._idle.remove(identity)

    def is_busy(self, identity: bytes) -> bool:
        """Whether a worker has a job."""
        return identity in self._busy

    def job_of(self, identity: bytes) -> int | None:
        """The number of the job that a worker has; None if it has none; 0 if it has not announced itself yet."""
        job = self._busy.get(identity)
        return job.number if job is not None else None if identity in self._knows else 0

    def may_compute(self, identity: bytes) -> bool:
        """Whether a worker has a job that may do nothing but compute for long."""
        job = self._busy.get(identity)
        return job is not None and job.kind not in _PROMPT

    def queued(self) -> int:
        return sum(map(len, self._queues.values()))

    def reader_waits(self) -> bool:
        """Whether one of the jobs that no worker has is a reader's."""
        return bool(self._queues[Priority.USER])

    def load(self) -> Json:
        """Workers that are there and that work, and the length of the queue by priority; and what only grows."""
        queues = {priority.name.lower(): len(queue) for priority, queue in self._queues.items()}
        return {
            "workers": self.size,
            "busy": len(self._busy.keys() - self._retired),
            "queued": queues,
            "jobs_done": self.jobs_done,
            "jobs_failed": self.jobs_failed,
            "read_bytes": dict(self.read_bytes),
            "route_bytes": dict(self.route_bytes),
        }

    def pump(self) -> None:
        """Give jobs to idle workers."""
        while self._idle:
            job = self._next()
            if job is None:
                return
            identity = self._idle.pop()  # the one that worked last: it has the connections
            self._busy[identity] = job
            job.started = time.monotonic()
            message = job.payload | {"kind": job.kind, "id": job.number}
            if identity in self._to_forget:
                message["forget"] = self._to_forget.pop(identity)
            cache = job.cache
            if cache is not None:
                message |= {"handle": cache.handle, "chunks": job.chunks}
                known = self._knows[identity]
                if known.get(cache.handle) is not cache.spec:
                    known[cache.handle] = cache.spec
                    message["spec"] = cache.spec.to_json(secrets=self.role == "fetch")
            points.reach("supervisor: before a job is sent")
            self._send(identity, message)
            points.reach("supervisor: job sent")

    def _next(self) -> Job | None:
        if not self.queued():
            self._more()
        if (overdue := self._overdue()) is not None:
            return overdue
        for queue in self._queues.values():
            for place, job in enumerate(queue):
                if self._may_begin(job):
                    del queue[place]
                    return job
        return None

    def _overdue(self) -> Job | None:
        """A job that has waited for too long behind readers' jobs, unless another such is under way."""
        now = time.monotonic()
        if now < self._readers_turn or any(job.kind in _UPKEEP for job in self._busy.values()):
            return None
        queue = self._queues[Priority.AHEAD]
        for place, job in enumerate(queue):
            if job.kind in _UPKEEP and now - job.queued > _PATIENCE:
                del queue[place]
                return job
        return None

    def _may_begin(self, job: Job) -> bool:
        """Whether a job may have one of the idle workers: all but those that wait for a server always may."""
        server = _server(job)
        if not server or self.size == 1:
            return True
        staying = (other for identity, other in self._busy.items() if identity not in self._retired)
        held = Counter(map(_server, staying))
        if server not in self._silent:
            return held[server] < self.size - 1 or not self._others(server)
        if held[server] and job.kind == "fetch":
            return False
        # However many servers are silent, they leave one worker to the others.
        return sum(held[silent] for silent in self._silent) < self.size - 1 or not self._others(server)

    def worker_ready(self, identity: bytes) -> None:
        """A new worker has announced itself."""
        if identity in self._knows:
            return
        self._knows[identity] = {}
        self._done[identity] = 0
        if identity not in self._retired:
            self._idle.append(identity)

    def dismiss(self, identity: bytes) -> bool:
        """Give a worker no job any more, for it is about to end. False if it has one."""
        if identity not in self._idle:
            return False
        self._idle.remove(identity)
        for known in (self._knows, self._done, self._connections):
            known.pop(identity, None)
        return True

    def worker_done(self, identity: bytes, answer: Answer) -> None:
        """A worker reports; a report of a job that it does not have is of a former life and ignored."""
        job = self._busy.get(identity)
        if job is None or job.number != answer.get("id"):
            return
        del self._busy[identity]
        lacks = answer.get("type") == ScarceError.__name__
        if identity not in self._retired:
            # Who lacks something comes last: another may have it.
            (self._idle.appendleft if lacks else self._idle.append)(identity)
        if job.kind in _UPKEEP and self.size <= 1:
            # The only worker is the readers' for as long as it was not.
            now = time.monotonic()
            self._readers_turn = now + (now - job.started)
        self.jobs_done += 1
        self._done[identity] += 1
        self._connections[identity] = answer.pop("connections", {})
        self.jobs_failed += bool(answer.get("error") or answer.get("failed"))
        self.read_bytes[job.priority.name.lower()] += answer.get("read_bytes", 0)
        self.route_bytes.update(answer.pop("routes", {}))
        if (server := _server(job)) and not lacks:
            (self._silent.add if "retry_after" in answer else self._silent.discard)(server)
        if job.cache is not None:
            _count(job.cache, job, answer)
        job.done(job, answer)

    def worker_died(self, identity: bytes, *, killed: bool = False) -> None:
        """Forget a worker; its job is done again, or given up. `killed`: from outside, not by itself."""
        self._knows.pop(identity, None)
        self._done.pop(identity, None)
        self._connections.pop(identity, None)
        self._retired.discard(identity)
        self._to_forget.pop(identity, None)
        if identity in self._idle:
            self._idle.remove(identity)
        job = self._busy.pop(identity, None)
        if job is None or job.kind in self._refused:
            return
        if killed:
            job.kills += 1
        else:
            job.attempts += 1
        if job.cancelled:
            job.done(job, {})
            return
        if job.attempts < ATTEMPTS and job.kills < _KILLS:
            log.warning("job %s of %s is given to another worker", job.kind, identity.decode())
            self._queues[job.priority].appendleft(job)
            return
        deaths = job.attempts + job.kills
        log.error("job %s has lost %d workers and is given up", job.kind, deaths)
        job.done(job, {"error": f"{deaths} workers died on it", "errno": errno.EIO, "type": "WorkerDied"})


def _server(job: Job) -> str:
    """The server that a job waits for, empty if it does not."""
    return job.cache.server if job.cache is not None and job.kind in _OVER_NETWORK else ""


def _count(cache: BlobCache, job: Job, answer: Answer) -> None:
    """Note what a job cost the backend, and when something was fetched ahead."""
    cache.backend.add(answer)
    if job.priority is Priority.PREFETCH and job.kind != "prepare":
        took = time.monotonic() - job.started
        counts, now = cache.prefetch, time.time()
        counts.seconds += took
        counts.began = counts.began or now - took
        counts.ended = now
