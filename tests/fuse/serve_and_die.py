"""A front-end process that is killed by each READ that it takes, before it can answer."""

from __future__ import annotations

import os
import signal
import sys

import nydusd.frontends.fuse.main as front_end
from nydusd.formats.model import Extent
from tests.fuse.serve import open_sample
from tests.fuse.tree import Tree


class Poison(Tree):
    def extents(self, ino: int, offset: int, size: int) -> list[Extent]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")


def _open(view: memoryview, where: str, path_id: str | None = None, *, extracted: bool = False) -> Tree:
    tree = open_sample(view, where)
    tree.__class__ = Poison
    return tree


if __name__ == "__main__":
    vars(front_end)["open_bootstrap"] = _open
    sys.exit(front_end.main(sys.argv[1:]))
