"""How a guard begins: the process that holds what the kernel needs while supervisor and front end may both be killed.

Run by the guards of EROFS and of fscache, first of all. What they hold is closed by their own SIGKILL, and by nothing else.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence

from nydusd import logs
from nydusd.ipc.messages import Json
from nydusd.ipc.spec import read_spec
from nydusd.proctitle import set_title


def begin_guard(argv: Sequence[str]) -> Json:
    """Its spec. Raises InternalError when it was started by hand, or the spec cannot be read."""
    spec = read_spec(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_title("guard")
    logs.setup_child(spec["log"], "guard")
    with contextlib.suppress(OSError):
        os.setsid()  # what ends the daemon's process group is not meant for readers
    return spec
