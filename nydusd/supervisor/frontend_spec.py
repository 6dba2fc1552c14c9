"""What a front end over FUSE is told when it is started, and the file descriptors that it is given.

Runs in the supervisor. What holds after SIGKILL: each front end that lives has the fds of its own lane of the session and of
some others: there the next supervisor finds those of front ends that died with this one (`adoption.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nydusd.ipc.messages import Json

if TYPE_CHECKING:
    from nydusd.frontends.fuse.session import Session
    from nydusd.supervisor.mounts import Mounts

_HOLDERS = 8
"""Front ends that hold the fds of a lane."""


def frontend_spec(session: Session, mounts: Mounts, index: int) -> tuple[list[int], Json]:
    """The fds and the spec of the front end on lane `index`: what it has of the session and of the images."""
    lanes = session.lanes
    lane = lanes[index]
    spec: Json = {
        "session_fd": lane.fd,
        "journal_fd": lane.journal,
        "init_flags": session.negotiated.flags,
        "interrupt_in": lane.interrupt_in,
        "interrupt_out": [other.interrupt_out for i, other in enumerate(lanes) if i != index],
        "device": session.device,
        "mounts": mounts.table.spec(),
        "inflight": mounts.memory.board_name,
    }
    # And those of some siblings: a successor of ours has them from any front end that lives, whoever died with us.
    held = [lanes[(index + i) % len(lanes)] for i in range(min(_HOLDERS, len(lanes)))]
    return list(dict.fromkeys([fd for each in held for fd in each] + spec["interrupt_out"])), spec
