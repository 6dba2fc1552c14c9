"""Short turns of the processor: whoever of ours is waked by a reader runs at once, also where all processors are busy.

A read of what is not cached goes through four of our processes, and each of them waits for its turn. The kernel's scheduler
(EEVDF, since 6.12) lets a process ask for shorter turns: those come sooner, and it gets no more of a processor than before,
so nobody else loses by it. Beside 16 busy processes on 2 processors such a read takes a third of the time (`bench.busy`).
Older kernels take the wish and do nothing.

Children inherit it. Needs no right.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

_SET_ATTR = {"x86_64": 314}.get(platform.machine(), 274)
"""sched_setattr(2): 274 on all newer architectures (asm-generic/unistd.h), Arm and RISC-V among them."""
_ATTR = struct.Struct("=IIQiIQQQ")
"""struct sched_attr, first version: size, policy, flags, nice, priority, runtime (ns), deadline, period."""
SHORTEST = 100_000
"""Nanoseconds of a turn: what the kernel allows at least. Its default is 1.4 ms on 2 processors, 2.8 ms on 8 and more."""


def be_short() -> None:
    """Ask for them, for this thread and all children to come. One that somebody gave another policy than the usual keeps it."""
    ask_for(SHORTEST)


def ask_for(nanoseconds: int, thread: int = 0) -> None:
    """Turns of that length at most, for a thread (0: this one) and its children to come; 0: as long as anybody's."""
    if os.sched_getscheduler(thread) != os.SCHED_OTHER:
        return
    nice = os.getpriority(os.PRIO_PROCESS, thread)
    wish = _ATTR.pack(_ATTR.size, os.SCHED_OTHER, 0, nice, 0, nanoseconds, 0, 0)
    ctypes.CDLL(None).syscall(_SET_ATTR, thread, wish, 0)  # where it cannot be had (a seccomp filter), nothing is lost
