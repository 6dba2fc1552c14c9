"""Taking over changes of the mount table in the middle of serving: at a request, before a sleep, at the supervisor's signal.

Runs in a front-end process. Nothing here outlives it: a successor begins with the table as it is.
"""

from __future__ import annotations

import errno
import time

from nydusd.errors import NydusError

from .complaints import Complaints
from .mount import Mount
from .namespace import Namespace
from .parking import Parking
from .stats import Tally

_RETRY = 0.1
"""Seconds after which a table that could not be read (no file descriptor was left) is read again, if anybody asks anything."""


class Changes:
    """What becomes of mounts that are gone or were replaced."""

    def __init__(self, views: Namespace, parking: Parking, tally: Tally, complaints: Complaints) -> None:
        self._views = views
        self._parking = parking
        self._tally = tally
        self._complaints = complaints
        self.idle = False
        """Whether the loop serves nothing, so that the table may change at any instruction."""
        self._term = views.term
        self._next_try = 0.0
        self._leaving: list[Mount] = []
        """Mounts that are gone, whose parked reads are not."""

    def look(self) -> None:
        """Called before the loop sleeps, and by the handler of the supervisor's signal, between any two instructions.

        While a request is served, or this is under way already, the signal does nothing: the loop looks before it sleeps. It is
        idle from before that look on, so no signal is too late for the one and too early for the other.
        """
        while self.idle and self._views.shared[0] != self._views.generation:
            self.idle = False
            taken = self.take()
            self.idle = True
            if not taken:
                return

    def take(self) -> bool:
        """Take over the new table of mounts; reads that wait for an image that is gone fail. Whether it could be read.

        A supervisor that takes over publishes the table anew: then it is asked for all that is waited for.
        """
        if self._term != self._views.term:
            self._term = self._views.term
            self._parking.ask_successor()
        if self._views.failure is not None and time.monotonic() < self._next_try:
            return False
        try:
            gone = self._views.reload()
        except NydusError as e:
            self._next_try = time.monotonic() + _RETRY
            self._complaints.log("%s", e)
            return False
        for mount in gone:
            if not self._views.knows(mount.index):
                self._parking.end_all(mount.device, errno.ESTALE)
        self._leaving += gone
        self.close_left()
        return True

    def close_left(self) -> None:
        """Close what no parked read needs any more: one of an image that was replaced goes on with what it had."""
        if not self._leaving:
            return
        waiting = {id(read.device) for read in self._parking.reads.values()}
        for mount in [mount for mount in self._leaving if id(mount.device) not in waiting]:
            self._leaving.remove(mount)
            self._tally.flush()
            mount.close()
