"""`python -m nydusd.frontends.fscache.guard --spec-fd N`: holds /dev/cachefiles, so that the cache outlives the supervisor.

It does nothing while there is a supervisor. The next one takes the device from here. If none comes for `patience` seconds,
readers must not wait for ever: then it answers, with the sizes that are noted and without data, so what is cached is read on
and the rest fails with EIO. It ends when no image is mounted any more.

The spec: `device` (fd), `folder` (beside it is noted what there is, see `left.py`), `supervisor` (its pid), `patience`
(seconds).
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import sys
import time

import msgspec

from nydusd.errors import CacheError, FormatError, ScarceError
from nydusd.frontends.guard import begin_guard
from nydusd.storage.state.lock import start_time

from . import messages
from .device import CacheDevice, completed
from .left import Files, Held

log = logging.getLogger(__name__)

_PAUSE = 0.1
"""Seconds until a message that could not be read is read again."""
_LOOK = 1.0
"""Seconds between looks around."""


class Guard:
    """What is open in the place of a supervisor that is gone."""

    def __init__(self, device: CacheDevice, files: Files) -> None:
        self._device = device
        self._files = files
        self._open: dict[int, int] = {}
        self._unanswered = True
        """Whether the kernel may have said what nobody has answered. What somebody has open who is stuck, we cannot."""

    def serve(self, seconds: float) -> None:
        """Answer what the kernel says for so long; first what it has said and what was not answered."""
        if self._unanswered:
            self._unanswered = False
            self._device.restore()
        until = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._device.fd, select.POLLIN)
        while (left := until - time.monotonic()) > 0:
            if any(ready & select.POLLIN for _, ready in poll.poll(left * 1000)):
                try:
                    while raw := self._device.read():
                        self._answer(raw)
                except OSError as e:  # no room for the file that is to be opened; whoever else waits needs us
                    log.warning("a message of the kernel cannot be read: %s", e.strerror)
                    time.sleep(_PAUSE)

    def _answer(self, raw: bytes) -> None:
        try:
            message = messages.parse(raw)
        except FormatError:
            if (refused := messages.refused(raw)) is not None:
                self._unanswered |= not self._device.opened(refused[0], -5)
                os.close(refused[1])
            return
        if isinstance(message, messages.Open):
            held = _noted(self._files)
            size = -2 if held is None else held.sizes.get(f"{message.domain}/{message.key}", -2)
            answered = self._device.opened(message.number, size)
            self._unanswered |= not answered
            if answered and size >= 0:
                self._open[message.object_id] = message.fd
            else:
                os.close(message.fd)
        elif isinstance(message, messages.Read):
            if message.object_id in self._open:
                completed(self._open[message.object_id], message.number)
            else:
                self._unanswered = True
        elif message.object_id in self._open:
            os.close(self._open.pop(message.object_id))


def _noted(files: Files) -> Held | None:
    """What there is. Waits while there is no file descriptor to read it with: what we hold is not given up for that."""
    while True:
        try:
            return files.read()
        except ScarceError:
            time.sleep(_LOOK)


def main(argv: list[str]) -> int:
    """Hold on until the images are unmounted. Raises InternalError when the spec cannot be read."""
    spec = begin_guard(argv)
    files = Files.beside(str(spec["folder"]))
    device = CacheDevice(int(spec["device"]))
    _wait_for_end(int(spec["supervisor"]))
    gone, guard = time.monotonic(), None
    while (held := _held(files, device)) is not None:
        if not held.is_used():
            files.remove()
            return 0
        if guard is None and time.monotonic() - gone < float(spec["patience"]):
            time.sleep(_LOOK)
            continue
        if guard is None:
            guard = Guard(device, files)
        guard.serve(_LOOK)
    return 0


def _wait_for_end(supervisor: int) -> None:
    """Until our parent is another: noticed at once, since its successor looks for us."""
    poll = select.poll()
    with contextlib.suppress(OSError):  # it has ended, or there is no room to be told so at once
        poll.register(os.pidfd_open(supervisor), select.POLLIN)
    while os.getppid() == supervisor:
        poll.poll(_LOOK * 1000)


def _held(files: Files, device: CacheDevice) -> Held | None:
    """What is noted, if it is for us to keep the device; None if somebody else has it now.

    Where the one that is named has ended our supervisor was killed before it could name us: then we do so ourselves.
    """
    held = _noted(files)
    if held is None or held.holder[0] == os.getpid():
        return held
    if held.is_alive():
        return None
    ours = msgspec.structs.replace(held, holder=(os.getpid(), start_time(os.getpid())), device=device.fd)
    try:
        files.name(ours)
    except CacheError as e:
        log.warning("%s; trying again", e)
    return ours


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
