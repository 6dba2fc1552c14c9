"""The request loop of one front-end process: read a request, answer it, and never wait for one miss with all others.

The fd, this front end's own clone of the session's, is non-blocking. While nothing is parked the loop asks it again for a
few dozen microseconds after each request, then blocks in read(2): on virtual machines the wake-up of a sleeping process costs
more than Python does, and a program that reads has its next request ready sooner than a sleeper would be awake. While
reads are parked, the fd is polled beside the line to the supervisor.

When images were mounted or unmounted, the supervisor sends SIGURG. No request needs it, for each looks at the table's number
first; it has a front end that nobody asks anything give up what was unmounted.

What holds after SIGKILL: the supervisor holds the clone's fd and the journal too, so nothing is lost: a successor on the same
fd answers first what the journal has of requests that were taken and not answered.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import select
import time
from collections.abc import Callable, Sequence

from nydusd import points
from nydusd.errors import ScarceError
from nydusd.ipc.inflight import InflightRow

from . import protocol as p
from .answers import GONE, Answers
from .changes import Changes
from .complaints import Complaints
from .failover import Failover
from .journal import REQUEST_SIZE, Journal
from .mount import INODE_BITS
from .namespace import Namespace
from .ops import Handler
from .parking import Client, Parked
from .reads import Reads
from .stats import OPERATION, Tally, is_failure

log = logging.getLogger(__name__)

_SPIN = 24
"""How often the fd is asked again before the loop sleeps, giving way to others in between: 30 to 50 us on an idle core.
Measured with one job of random 4 KiB reads of cached data, 2 cores: see docs/benchmarks.md."""

_TRIM = 1.0
"""Seconds after which the pages of metadata are let go of: so what is mapped of many images is what was looked at of late."""

_NAMES = (p.LOOKUP, p.READDIR, p.READDIRPLUS)
"""Requests whose answer depends on what is mounted."""

_AGAIN = (errno.ENOENT, errno.EINTR, errno.EAGAIN)
"""read(2): the request was interrupted before it was read, we were, or another clone was faster."""


class FrontEnd:
    """Serves the mounts of one session on one fd of it, whose `journal` is its own too.

    `flags` are those that INIT settled. `connect` opens the line to the supervisor at the first miss. A read waits
    `read_deadline` seconds for its chunks at most, then fails with ETIMEDOUT. `interrupt_in` and `interrupt_out` are pipes
    from and to the front ends on the session's other clones (see `session.Lane`). `wake` becomes readable at a signal. Reads
    that wait are shown on `board`. `failover`: for a journal of another version.
    """

    def __init__(
        self,
        fd: int,
        journal: Journal,
        namespace: Namespace,
        connect: Callable[[], Client],
        *,
        read_deadline: float = 30.0,
        interrupt_in: int = -1,
        interrupt_out: Sequence[int] = (),
        wake: int = -1,
        board: InflightRow | None = None,
        failover: Failover | None = None,
    ) -> None:
        self._fd = fd
        self._failover = failover or Failover("resend", "")
        self._journal = journal
        self._views = namespace
        self._interrupt_in = interrupt_in
        self._interrupt_out = interrupt_out
        self._wake = wake
        self._complaints = Complaints("fuse")
        self._tally = Tally()
        self._trimmed = 0.0
        self._answers = Answers(fd, self._complaints)
        self._reads = Reads(
            namespace, self._answers, self._tally, self._complaints, journal, connect, read_deadline, board
        )
        self._read_known = self._reads.read_known
        self._parking = self._reads.parking
        self._request = journal.request
        self._of_the_session: dict[int, Handler] = {
            p.INTERRUPT: self._interrupt,
            p.FORGET: _forget,
            p.BATCH_FORGET: _forget,
            p.FLUSH: _never_again,
            # To close a file of an image that was unmounted is no error.
            p.RELEASE: _nothing,
            p.RELEASEDIR: _nothing,
        }
        """Handlers of what is not asked of one image."""
        self.changes = Changes(namespace, self._parking, self._tally, self._complaints)

    def run(self) -> None:
        """Serve until the file system is unmounted. Raises OSError when the fd is not a mounted session's."""
        os.set_blocking(self._fd, False)  # a predecessor may have been killed while it blocked
        self._recover()
        parked = self._parking.reads
        while self._serve_blocking(parked) and self._serve_polling(parked):
            pass

    def _serve_blocking(self, parked: dict[int, Parked]) -> bool:
        """Serve until a read has to wait. False when the mount is gone."""
        unopened = self._reads.unopened
        fd, readv, buffers, dispatch, give_way = self._fd, os.readv, [self._request], self.dispatch, os.sched_yield
        tries = 0
        while not parked and not unopened:
            try:
                length = readv(fd, buffers) if tries < _SPIN else self._block(buffers)
            except BlockingIOError:
                tries += 1
                give_way()
                continue
            except OSError as e:
                if e.errno in _AGAIN:
                    continue
                if e.errno in GONE:
                    return False
                raise
            if not length:
                return False
            dispatch(length)
            tries = 0
        return True

    def _block(self, buffers: Sequence[memoryview]) -> int:
        """Sleep until there is a request and take it."""
        self._tally.flush()
        if (now := time.monotonic()) - self._trimmed > _TRIM:
            self._trimmed = now
            self._views.trim()
        os.set_blocking(self._fd, True)
        try:
            self.changes.idle = True
            self.changes.look()
            return os.readv(self._fd, buffers)
        finally:
            self.changes.idle = False
            os.set_blocking(self._fd, False)

    def _serve_polling(self, parked: dict[int, Parked]) -> bool:
        """Serve until no read has to wait any more. False when the mount is gone."""
        poll = select.poll()
        for extra in (self._interrupt_in, self._wake):
            if extra >= 0:
                poll.register(extra, select.POLLIN)
        buffers = [self._request]
        while True:
            if self._views.shared[0] != self._views.generation:
                self.changes.take()
            timeout = min(self._reads.service(), self._parking.service())
            self.changes.close_left()
            if not parked and not self._reads.unopened:
                return True
            poll.register(self._fd, 0 if self._journal.full else select.POLLIN)
            if (line := self._parking.fileno()) >= 0:
                poll.register(line, select.POLLIN)
            self._tally.flush()
            for ready, _ in poll.poll(math.ceil(timeout * 1000)):
                if ready == self._interrupt_in:
                    self._take_interrupts()
                elif ready == self._wake:
                    os.read(self._wake, 4096)
                elif ready == self._fd:
                    try:
                        length = os.readv(self._fd, buffers)
                    except OSError as e:
                        if e.errno in _AGAIN:
                            continue
                        if e.errno in GONE:
                            return False
                        raise
                    if not length:
                        return False
                    self.dispatch(length)

    def dispatch(self, length: int) -> None:
        """Answer the request in the first `length` bytes of the request buffer, or park it."""
        if length < p.REQUEST.size:
            self._complaints.log("request of %d bytes is too short", length)
            return
        opcode, unique, node, pid, offset, size = p.READ_REQUEST.unpack_from(self._request)
        if self._views.shared[0] != self._views.generation:
            self.changes.take()
        try:
            if opcode == p.READ:
                if length < p.READ_REQUEST.size:
                    self._answers.fail(unique, errno.EINVAL)
                elif not self._read_known(unique, node, offset, size):
                    self._reads.read(self._request, unique, node, pid)
                return
            if opcode >= p.OPCODES:
                self._answers.fail(unique, errno.ENOSYS)
                return
            handler = self._of_the_session.get(opcode)
            if handler is None:
                result = self._ask_view(opcode, node, self._request[p.REQUEST.size : length])
            else:
                result = handler(node, self._request[p.REQUEST.size : length])
        except Exception as e:
            if opcode == p.READ and isinstance(e, ScarceError):
                self._reads.put_off(self._request, unique, e)
            else:
                self._answers.fail(unique, self._errno_of(e, opcode, node))
            return
        if type(result) is bytes:
            self._answers.body(unique, result)
        elif type(result) is int:
            self._answers.fail(unique, result)

    def _recover(self) -> None:
        """Answer, or park again, what a predecessor had taken and not answered."""
        journal = self._journal
        if not journal.intact and (why := self._failover.ask(self._fd)) is not None:
            self._complaints.log("what a predecessor had taken is lost: %s", why)
        for place, request, interrupted in journal.left():
            points.reach("fuse: successor takes up a read")
            _, _, unique, node, pid = p.REQUEST.unpack_from(request)
            if self._may_serve(unique, p.READ, node):
                try:
                    self._reads.read(request, unique, node, pid, place)
                except ScarceError as e:
                    self._reads.put_off(request, unique, e, place)
                    if interrupted:
                        self._reads.interrupt(unique)
                    continue
                except Exception as e:
                    self._answers.fail(unique, self._errno_of(e, p.READ, node))
            if unique not in self._parking.reads:
                journal.drop(place)
            elif interrupted:
                self._parking.interrupt(unique)
        length, opcode, unique, node, _ = p.REQUEST.unpack_from(self._request)
        waiting = unique in self._parking.reads or unique in self._reads.unopened
        if length and not waiting and self._may_serve(unique, opcode, node):
            self.dispatch(min(length, REQUEST_SIZE))
        points.reach("fuse: successor has taken up all")
        journal.served_again()

    def _may_serve(self, unique: int, opcode: int, node: int) -> bool:
        """Whether a predecessor's request is to be served; if not, because that has killed too many, it is failed."""
        if self._journal.serve_again(unique):
            return True
        self._complaints.log("opcode %d, node %d: front ends die of this request: it is failed", opcode, node)
        self._answers.fail(unique, errno.EIO)
        return False

    def _ask_view(self, opcode: int, node: int, body: memoryview) -> bytes | int | None:
        """The answer of an image or of the pseudo file system, counted."""
        if self._views.failure is not None and opcode in _NAMES:
            raise self._views.failure  # an older table may say that there is nothing, and the kernel would believe it
        view = self._views[node >> INODE_BITS]
        stats = None if view.mount is None else view.mount.stats
        operation = OPERATION[opcode]
        if view.mount is None or stats is None or operation < 0:
            return view.handlers[opcode](node, body)
        result: bytes | int | None = errno.EIO
        try:
            result = view.handlers[opcode](node, body)
        finally:
            self._tally.count(stats, operation, view.mount.ino_of(node), is_failure(result))
        return result

    def _interrupt(self, _: int, body: memoryview) -> None:
        """INTERRUPT has no reply. The request is perhaps another front end's: the kernel tells whoever reads first."""
        (unique,) = p.INTERRUPT_IN.unpack_from(body)
        if not self._reads.interrupt(unique):
            for fd in self._interrupt_out:
                try:
                    os.write(fd, p.INTERRUPT_IN.pack(unique))
                except OSError as e:  # EAGAIN: it has thousands unread; EPIPE: it is no more
                    self._complaints.log("cannot pass on an interrupt: %s", e.strerror)

    def _take_interrupts(self) -> None:
        """Interrupts that siblings passed on; those of reads that were answered meanwhile mean nothing."""
        try:
            passed = os.read(self._interrupt_in, 4096)
        except BlockingIOError:
            return
        for (unique,) in p.INTERRUPT_IN.iter_unpack(passed):
            self._reads.interrupt(unique)

    def _errno_of(self, error: Exception, opcode: int, node: int) -> int:
        """The errno for whoever asked."""
        view = self._views.get(node >> INODE_BITS)
        subject = None if view is None or view.mount is None else view.mount.name
        return self._complaints.errno_of(error, opcode, node, subject)


def _forget(_node: int, _body: memoryview) -> None:
    """FORGET has no reply. Inodes are positions in the metadata: there is nothing to forget."""


def _nothing(_node: int, _body: memoryview) -> bytes:
    return b""


def _never_again(_node: int, _body: memoryview) -> int:
    """close(2): nothing is written back, and the kernel need not ask: so a close never waits for a front end."""
    return errno.ENOSYS
