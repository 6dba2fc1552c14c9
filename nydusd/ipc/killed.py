"""Whether a process was killed that has not ended yet: one that gets no turn on a processor, or that a disk holds.

Used by front ends, of who reads, and by a supervisor, of the one before it. It only looks: nothing is left by it.
"""

from __future__ import annotations

_SIGKILL_BIT = 1 << 8


def is_killed(tid: int) -> bool:
    """Whether a thread has a SIGKILL pending (any fatal signal becomes one), or is gone. False when it can't be told."""
    try:
        with open(f"/proc/{tid}/status", "rb") as status:
            for line in status:
                if line.startswith((b"SigPnd:", b"ShdPnd:")) and int(line.split()[1], 16) & _SIGKILL_BIT:
                    return True
    except FileNotFoundError:
        return tid > 0
    except OSError:
        return False
    return False
