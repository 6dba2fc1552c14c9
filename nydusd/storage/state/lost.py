"""Whether the kernel has failed to write what it was given for a file, without writing anything.

Called by front ends. The kernel tells that once to each open file; one that is opened later hears of it as long as nobody
has heard. It notes the failure before the page counts as clean and may be dropped: who asks after a read knows of what it read.

After SIGKILL between the answer and what is made of it, a worker hears of it, which has the file open from before.
"""

from __future__ import annotations

import ctypes
import errno

_WAIT_BEFORE = 1
_BEHIND = 1 << 62
"""Where no file has bytes: there is nothing to wait for, and the answer is for the whole file."""
_NO_ANSWER = (errno.ENOSYS, errno.EPERM, errno.EINVAL, errno.EBADF, errno.ESPIPE)
"""The question was refused: nothing is known."""

_ask = ctypes.CDLL(None, use_errno=True).sync_file_range
_QUESTION = (ctypes.c_int64(_BEHIND), ctypes.c_int64(1), ctypes.c_uint(_WAIT_BEFORE))


def has_lost_writes(fd: int) -> bool:
    """Whether some of what was written to this file since it was opened, or before and unheard of, did not reach its disk."""
    if not _ask(fd, *_QUESTION):
        return False
    return ctypes.get_errno() not in _NO_ANSWER
