"""A front-end process as the supervisor starts it, but with the image of `tree.sample` for a bootstrap."""

from __future__ import annotations

import sys

import nydusd.frontends.fuse.main as front_end
from tests.fuse.tree import Tree, sample


def open_sample(view: memoryview, where: str, path_id: str | None = None, *, extracted: bool = False) -> Tree:
    return sample()


if __name__ == "__main__":
    vars(front_end)["open_bootstrap"] = open_sample
    sys.exit(front_end.main(sys.argv[1:]))
