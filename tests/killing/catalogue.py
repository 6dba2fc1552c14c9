"""All scenes by their names; `make kill-points` goes through them in this order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.killing.kernel_scenes import Kernel, KernelShared, KernelSuccessors
from tests.killing.scene import Scene
from tests.killing.scenes import (
    Anew,
    InMemory,
    Life,
    LockLeft,
    MakeRoom,
    OfOthers,
    Remote,
    Shared,
    Successors,
    TakeOver,
)
from tests.killing.upgrade_scenes import Handover, SentSession, Upgraded
from tests.support.mounted import Tree

SCENES: dict[str, Callable[[Tree, Path], Scene]] = {
    "an image comes and goes": Shared,
    "without a cache": InMemory,
    "from a registry": Remote,
    "the supervisor is succeeded": TakeOver,
    "room is made": MakeRoom,
    "front ends are succeeded": Successors,
    "who had the lock is gone": LockLeft,
    "a daemon's life": Life,
    "after the end of all": Anew,
    "in the cache of others": OfOthers,
    "EROFS with fanotify": Kernel,
    "its front end is succeeded": KernelSuccessors,
    "the kernel mounts what the API is told": KernelShared,
    "workers are upgraded": Upgraded,
    "a daemon is upgraded": Handover,
    "the session was sent": SentSession,
}
