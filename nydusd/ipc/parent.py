"""A child that must not outlive its supervisor, not even stopped: the kernel kills it.

For those that hold nothing which a successor needs. What holds after SIGKILL: the kernel has been told, or the child sees that
it has another parent.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time

_SET_PDEATHSIG = 1
_ADOPTION = 1.0
"""Seconds in which a child that a fork server has just made becomes its supervisor's own."""


def end_with(parent: int) -> bool:
    """Have the kernel kill this process when its supervisor, with the pid `parent`, ends.

    False when that is not our parent, or not any more. Raises OSError.
    """
    until = time.monotonic() + _ADOPTION
    while os.getppid() != parent:  # whoever has made us is about to end, and not meant
        if time.monotonic() > until:
            return False
        time.sleep(0.001)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    return os.getppid() == parent
