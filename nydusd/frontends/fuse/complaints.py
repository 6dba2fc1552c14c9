"""Log lines about bad input, at most one a second. Runs in a front-end process; keeps nothing that matters."""

from __future__ import annotations

import errno
import logging
import struct
import time

from nydusd.errors import NydusError, UnmountedError

log = logging.getLogger(__name__)


class Complaints:
    """Log lines about bad input, at most one a second: whoever reads a broken image makes as many as he likes."""

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._quiet_until = 0.0
        self._suppressed = 0

    def log(self, message: str, *args: object, error: Exception | None = None, subject: str | None = None) -> None:
        """Log a line about the subject, or another; with `error`, its traceback too."""
        now = time.monotonic()
        if now < self._quiet_until:
            self._suppressed += 1
            return
        more = f" ({self._suppressed} more lines were left out)" if self._suppressed else ""
        self._suppressed = 0
        self._quiet_until = now + 1.0
        # As text: an error among the arguments would live as long as the record, with frames that hold views of the journal.
        log.error("%s: %s%s", subject or self._subject, message % args, more, exc_info=error)

    def errno_of(self, error: Exception, opcode: int, node: int, subject: str | None) -> int:
        """The errno for whoever asked, and a line in the log: this is the border where errors end."""
        if isinstance(error, UnmountedError):
            return error.errno
        if isinstance(error, NydusError) and not error.traceback:
            self.log("%s", error, subject=subject)
            return error.errno
        if isinstance(error, struct.error):
            self.log("opcode %d: request is too short", opcode, subject=subject)
            return errno.EINVAL
        self.log("opcode %d, node %d: unexpected error", opcode, node, error=error, subject=subject)
        return errno.EIO
