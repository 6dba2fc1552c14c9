"""A sample of what `make kill-points` does with real daemons: somebody is killed at a named point, and nothing comes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.killing.catalogue import SCENES
from tests.killing.plan import all_points
from tests.killing.scene import FILES
from tests.support.mounted import Tree

SAMPLE = {
    "an image comes and goes": ("fill: written", "fuse: before a miss is answered", "map: record written"),
    "a daemon's life": ("stop: unmounted",),
    "the kernel mounts what the API is told": ("erofs: written down", "erofs: mounted"),
    "workers are upgraded": ("upgrade: succession noted",),
    "a daemon is upgraded": ("handover: predecessor gone",),
    "the session was sent": ("takeover: one lane made",),
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(FILES, tmp_path_factory.mktemp("tree"))


@pytest.mark.parametrize("name", SAMPLE)
def test_whoever_is_killed_at_a_point_costs_no_read_and_leaves_nothing(name: str, tree: Tree, tmp_path: Path) -> None:
    with SCENES[name](tree, tmp_path) as scene:
        for point in SAMPLE[name]:
            killed, _ = scene.turn(point, 1)
            assert killed, point


def test_mount_that_was_being_made_leaves_no_shared_memory(tree: Tree, tmp_path: Path) -> None:
    """The supervisor is killed before the mount is in its table; the next one removes what no table names."""
    with SCENES["an image comes and goes"](tree, tmp_path) as scene:
        killed, _ = scene.turn("mounts: counters made", 1)
        assert killed


def test_names_of_points_are_unique_and_literal() -> None:
    assert {point for points in SAMPLE.values() for point in points} <= all_points()
