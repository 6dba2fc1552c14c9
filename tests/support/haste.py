"""A harness that is in haste: what it does to a daemon is over soon, though readers keep the machine busy.

Who looks after a daemon, systemd or nydus-snapshotter, is in another control group than what reads, and need not queue with it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_USUAL = os.getpriority(os.PRIO_PROCESS, 0)
_HASTE = -20


@contextmanager
def in_haste() -> Iterator[None]:
    """This thread, and what it starts until `not_in_haste`, before all others."""
    os.setpriority(os.PRIO_PROCESS, 0, _HASTE)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, _USUAL)


def not_in_haste(pid: int) -> None:
    """A process that this thread has just started: the haste is none of its business.

    Without haste it is left alone: it may be about to take a priority of its own, and we see it when we get our turn.
    """
    if os.getpriority(os.PRIO_PROCESS, 0) == _HASTE:
        os.setpriority(os.PRIO_PROCESS, pid, _USUAL)
