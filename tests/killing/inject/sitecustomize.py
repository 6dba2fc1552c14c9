"""Loaded by the interpreter itself, first of all, in each process of a daemon that a test of kills has started.

Whoever reaches a point of the name in the plan's file for the N-th time, counted over all processes, is killed there, or
stopped.
"""

from __future__ import annotations

import fcntl
import json
import os

from nydusd import points

_PLAN = os.environ.get("NYDUSD_TEST_PLAN", "")


def _reach(name: str) -> None:
    fd = os.open(_PLAN, os.O_RDWR | os.O_CLOEXEC)  # opened each time: a lock is shared with whoever has the same fd
    try:
        if not os.fstat(fd).st_size:
            return
        fcntl.flock(fd, fcntl.LOCK_EX)
        text = os.pread(fd, 1 << 20, 0)
        if not text:
            return
        plan = json.loads(text)
        plan["passed"][name] = plan["passed"].get(name, 0) + 1
        dies = plan["name"] == name and plan["passed"][name] == plan["number"]
        if dies:
            plan["killed"] = os.getpid()
        text = json.dumps(plan).encode()
        os.ftruncate(fd, len(text))
        os.pwrite(fd, text, 0)
    finally:
        os.close(fd)
    if dies:  # others must go on meanwhile if it is only stopped
        os.kill(os.getpid(), plan["signal"])


if _PLAN:
    vars(points)["reach"] = _reach
