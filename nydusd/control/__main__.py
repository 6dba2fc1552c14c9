"""`python -m nydusd.control --spec-fd N`: the API process, started by the supervisor.

The spec: `listen_fd` (a unix socket that already listens, -1 for none), `metrics_fd` (a TCP socket that does, optional),
`silent_fd` (the line by which the supervisor holds silent clients) and `silent` (how many come by it),
`front` (ZeroMQ endpoint of the supervisor), `log` (`{"level", "file", "rotation_size"}`, the last two optional),
`lifeline_fd` (read end of a pipe that the supervisor holds open). Ends by itself when the supervisor is gone.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import sys

import zmq

from nydusd import logs, proctitle
from nydusd.control.server import ApiServer
from nydusd.ipc.silent import SilentLine
from nydusd.ipc.spec import read_spec


def run() -> int:
    """Serve until the supervisor is gone."""
    # A Ctrl-C goes to the whole process group; the supervisor decides, and needs us to report the end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    spec = read_spec(sys.argv[1:])
    proctitle.set_title("api")
    logs.setup_child(spec["log"], "api")
    with contextlib.ExitStack() as stack, zmq.Context() as context:
        listener, metrics, line = (
            stack.enter_context(socket.socket(fileno=spec[name])) if spec.get(name, -1) >= 0 else None
            for name in ("listen_fd", "metrics_fd", "silent_fd")
        )
        supervisor = context.socket(zmq.DEALER)
        supervisor.linger = 0
        supervisor.connect(spec["front"])
        with supervisor:
            ApiServer(listener, supervisor, spec["lifeline_fd"], SilentLine(line, spec.get("silent", 0)), metrics).run()
    return 0


if __name__ == "__main__":
    sys.exit(run())
