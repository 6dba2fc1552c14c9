"""`nydusd erofs` after a SIGKILL: what is mounted is neither hidden nor lost, whatever is started, or killed, next."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nydusd.supervisor.selection import choose, choose_without_image
from tests.erofs.test_images import differences
from tests.erofs.test_kills import NAMES, Held, own
from tests.erofs.test_mounts import OTHER, SMALL, Many
from tests.killing.plan import Plan
from tests.support.discipline import wait_until
from tests.support.faulty_server import faulty
from tests.support.mounted import Hub, Tree


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(NAMES, tmp_path_factory.mktemp("tree"))


@pytest.fixture
def hub(tree: Tree) -> Iterator[Hub]:
    with faulty() as server:
        yield Hub(tree, server)


@pytest.mark.parametrize("way", ["fuse", "fuse with an image"])
def test_another_way_destroys_nothing_of_what_a_killed_daemon_has_mounted(way: str) -> None:
    """Nothing is mounted at the mount point itself, and the refusal comes before the records are cleared away."""
    with Many() as many:
        assert many.put("/a", SMALL) == (204, "") and many.put("/b/c", OTHER) == (204, "")
        devices = {place: os.stat(many.at(place)).st_dev for place in ("/a", "/b/c")}
        erofs = many.command
        many.kill_supervisor()
        at = erofs.index("erofs")
        image = ["-B", str(SMALL.bootstrap), "-C", str(many.folder / "config.json")]
        many.command = [*erofs[:at], "fuse", *(image if way != "fuse" else []), *erofs[at + 1 : -2]]
        with pytest.raises(AssertionError, match="has left its mount here"):
            many.start()
        many.command = erofs
        many.start()
        assert {place: os.stat(many.at(place)).st_dev for place in devices} == devices
        assert differences(SMALL, many.at("/a")) == [] and differences(OTHER, many.at("/b/c")) == []


def test_what_is_mounted_is_taken_over_where_another_mount_could_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    no_folder = str(tmp_path / "file" / "cache")
    assert choose("auto", str(SMALL.bootstrap), no_folder)[0] == "blobfs"
    for asked in ("auto", "fanotify"):
        assert choose(asked, str(SMALL.bootstrap), no_folder, left=True)[0] == "fanotify"
        assert choose_without_image(asked, left=True)[0] == "fanotify"


def test_a_takeover_that_is_killed_leaves_nobody_who_takes_events_and_cannot_have_them_answered(
    tree: Tree, hub: Hub, tmp_path: Path
) -> None:
    """The second supervisor has started its guard, the first one's front end lives: the third one ends both."""
    plan = Plan(tmp_path / "plan")
    held = Held(tree, hub, read_deadline=20.0)
    held.daemon._environment |= plan.environment
    with held.mounted:
        held.right(held.read(NAMES[0]), NAMES[0])
        held.daemon.kill_supervisor()
        plan.begin("start: before a child", 2)
        held.daemon.launch()
        wait_until(held.daemon.has_ended, "the end of the second supervisor", 60)
        assert plan.end()[0]
        held.daemon.forget()
        held.daemon.start()
        wait_until(lambda: len(own("erofs")) == 1 and len(own("guard")) == 1, "the end of the others", 60)
        held.right(held.read(NAMES[1]), NAMES[1])
