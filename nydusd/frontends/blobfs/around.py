"""`python -m nydusd.frontends.blobfs.around --spec-fd N`: has the kernel read what surrounds small reads of blobs (`notes.py`).

It asks by posix_fadvise(2), which waits neither for pages nor for answers: the kernel sends large READs, and front ends answer
them like any others. It is a process of its own, and no front end: one that opens a file of the mount that it serves, or puts
pages into its page cache, may wait for itself, and one that waits so cannot even be killed.

It holds nothing that anybody needs. Files are open only while notes come, so that it keeps no mount that others unmount. What
is noted is soon too old: a window may lose chunks, and to read it would fetch them. So what was noted while this process was
stopped is passed over.

What holds after SIGKILL: reads go on, more slowly, until the supervisor has started another. The kernel kills it when its
supervisor ends, also when it is stopped. While it waits for a front end, to open a file, it can end only when that, or its
successor, has answered: nobody waits for its end.

The spec: `notes` (path of the pipe), `folder` (where the blobs are files), `names` (of these, in their order in the image),
`supervisor` (its pid), `lifeline_fd`.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct
import sys
import time
from collections.abc import Sequence

from nydusd import logs
from nydusd.ipc.parent import end_with
from nydusd.ipc.spec import read_spec
from nydusd.proctitle import set_title

NOTE = struct.Struct("<QQQQ")
"""Index of the blob in the image, offset and size of what is to be read, and when it was noted (`time.monotonic_ns()`)."""
WINDOW = 128 << 10
"""Bytes that are read around a small read: a larger READ costs as much a byte, and a small one half as much as this."""
_OLD = 250_000_000
"""Nanoseconds after which a note is passed over."""
_IDLE = 2.0
"""Seconds without a note after which files are closed."""
_NOTES = 512
"""Notes that are taken at once."""


def main(argv: Sequence[str]) -> int:
    """Serve until the supervisor is gone. Raises OSError when there is no pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    spec = read_spec(argv)
    set_title("around")
    logs.setup_child(spec["log"], "around")
    os.chdir("/")
    if not end_with(int(spec["supervisor"])):
        return 0
    around = Around(str(spec["folder"]), spec["names"])
    # For writing, too: a pipe that nobody writes to would be at its end, and poll(2) would not wait.
    notes = os.open(str(spec["notes"]), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    poll = select.poll()
    for fd in (notes, int(spec["lifeline_fd"])):
        poll.register(fd, select.POLLIN)
    while True:
        ready = poll.poll(_IDLE * 1000 if around.has_files else None)
        if not ready:
            around.close()
        elif any(fd != notes for fd, _ in ready):
            return 0
        else:
            with contextlib.suppress(BlockingIOError):
                around.read(os.read(notes, NOTE.size * _NOTES))


class Around:
    """Reads ranges of the files `names` in `folder`."""

    def __init__(self, folder: str, names: Sequence[str]) -> None:
        self._folder = folder
        self._names = names
        self._files: dict[int, int] = {}

    def read(self, notes: bytes) -> None:
        """Have the kernel read what is noted. What cannot be opened now is passed over."""
        noted = {(blob, offset, size): when for blob, offset, size, when in NOTE.iter_unpack(notes)}
        for (blob, offset, size), when in noted.items():
            for window in range(offset, offset + size, WINDOW):  # in READs between which others' have their turn
                with contextlib.suppress(OSError):
                    file = self._file(blob)  # which may take its time
                    if time.monotonic_ns() - when < _OLD:
                        os.posix_fadvise(file, window, WINDOW, os.POSIX_FADV_WILLNEED)

    def _file(self, blob: int) -> int:
        if blob not in self._files:
            path = os.path.join(self._folder, self._names[blob])
            self._files[blob] = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        return self._files[blob]

    @property
    def has_files(self) -> bool:
        """Whether any are open."""
        return bool(self._files)

    def close(self) -> None:
        """Close all files; they are opened again when they are noted."""
        while self._files:
            os.close(self._files.popitem()[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
