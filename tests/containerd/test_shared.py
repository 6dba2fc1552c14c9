"""An unmodified nydus-snapshotter in shared mode: one daemon of ours for all images, mounted and unmounted by its API."""

from __future__ import annotations

from pathlib import Path

from tests.containerd.conftest import Shop
from tests.containerd.images import FULL, MARK, SMALL
from tests.containerd.node import Node
from tests.support.discipline import descendants, is_running, wait_until


def test_one_daemon_serves_two_images_and_outlives_both(shop: Shop) -> None:
    with Node("shared") as node:
        for reference in shop.references.values():
            node.nerdctl("pull", "--quiet", reference)
        (pid,) = node.daemon_pids()
        assert node.run_python(shop.references[FULL], "print(42)") == "42\n"
        first = node.start_container(shop.references[FULL])
        second = node.start_container(shop.references[SMALL])
        node.watch_daemon_logs()
        assert node.daemon_pids() == [pid]
        root = str(node.folder / "sn" / "mnt")
        assert (root, "fuse", "rafs") in node.mounts()
        assert len([kind for _, kind, _ in node.mounts() if kind == "fuse"]) == 1, "the images are folders of one mount"
        places = [place for place in Path(root).iterdir() if place.is_dir()]
        assert sorted((place / MARK).exists() for place in places) == [False, True]

        look = f"import os, json; print(os.path.exists('/{MARK}'), json.dumps(6 * 7))"
        assert node.exec_python(first, look) == "False 42\n"
        assert node.exec_python(second, look) == "True 42\n"

        node.nerdctl("rm", "--force", first)
        node.nerdctl("rmi", shop.references[FULL])
        full, small = (shop.images[name].blob.name for name in (FULL, SMALL))
        wait_until(lambda: not list(node.cache.glob(f"{full}*")), "the removal of the cache files")
        assert node.exec_python(second, "import csv, sqlite3; print(42)") == "42\n"
        assert list(node.cache.glob(f"{small}*"))
        node.nerdctl("rm", "--force", second)
        node.nerdctl("rmi", shop.references[SMALL])
        wait_until(lambda: not list(node.cache.iterdir()), "the removal of the cache files")
        assert node.complaints() == []

        family = [pid, *descendants(pid)]
        node.stop_snapshotter()
        assert not any(is_running(pid) for pid in family), "the snapshotter ends its daemon before it ends itself"


def test_an_image_can_be_removed_and_pulled_again(shop: Shop) -> None:
    reference = shop.references[SMALL]
    with Node("shared") as node:
        pids = node.daemon_pids()
        for _ in range(3):
            assert node.run_python(reference, "import json; print(42)") == "42\n"
            node.nerdctl("rmi", reference)
        node.watch_daemon_logs()
        assert node.daemon_pids() == pids
        assert node.complaints() == []
