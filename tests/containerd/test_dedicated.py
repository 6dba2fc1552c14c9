"""An unmodified nydus-snapshotter in dedicated mode starts our daemon, one for each image, and containers run from it."""

from __future__ import annotations

from pathlib import Path

from tests.containerd.conftest import Shop
from tests.containerd.images import FULL, MARK, SMALL
from tests.containerd.node import Node
from tests.support.discipline import cmdline, descendants, is_running, wait_until


def test_a_pulled_image_runs_and_its_removal_ends_the_daemon(shop: Shop) -> None:
    reference, blob = shop.references[FULL], shop.images[FULL].blob.name
    with Node("dedicated") as node:
        node.nerdctl("pull", "--quiet", reference)
        assert node.daemons() == [], "a pull alone starts no daemon"
        assert node.run_python(reference, "print(42)") == "42\n"

        (daemon,) = node.daemons()
        node.watch_daemon_logs()
        mountpoint = str(daemon["mountpoint"])
        assert (mountpoint, "fuse", "rafs") in node.mounts()
        assert Path(mountpoint, "usr/bin/python3").exists()
        files = [node.cache / f"{blob}.{suffix}" for suffix in ("blob.data", "blob.meta", "blob.data.chunk_map")]
        wait_until(lambda: all(file.is_file() for file in files), "the files in the cache folder")
        (pid,) = node.daemon_pids()
        family = [pid, *descendants(pid)]

        node.nerdctl("rmi", reference)
        wait_until(lambda: node.daemons() == [], "the end of the daemon")
        wait_until(lambda: not any(is_running(pid) for pid in family), "the end of all of its processes")
        assert all("rafs" not in mount for mount in node.mounts())
        wait_until(lambda: not list(node.cache.iterdir()), f"the removal of {list(node.cache.iterdir())}")
        assert node.complaints() == []


def test_an_image_removed_right_after_it_ran_leaves_nothing_in_the_cache(shop: Shop) -> None:
    """The snapshotter deletes the cache files first and then ends the daemon, which has chunks to note down."""
    with Node("dedicated") as node:
        container = node.start_container(shop.references[SMALL])
        node.watch_daemon_logs()
        (pid,) = node.daemon_pids()
        assert node.exec_python(container, "import json; print(42)") == "42\n"
        node.nerdctl("rm", "--force", container)
        node.nerdctl("rmi", shop.references[SMALL])
        wait_until(lambda: not is_running(pid), "the end of the daemon")
        assert list(node.cache.iterdir()) == []


def test_two_images_run_at_once_each_with_its_own_daemon(shop: Shop) -> None:
    with Node("dedicated") as node:
        for reference in shop.references.values():
            node.nerdctl("pull", "--quiet", reference)
        first = node.start_container(shop.references[FULL])
        second = node.start_container(shop.references[SMALL])
        node.watch_daemon_logs()
        assert len(set(node.daemon_pids())) == 2
        look = f"import os, json; print(os.path.exists('/{MARK}'), json.dumps(6 * 7))"
        assert node.exec_python(first, look) == "False 42\n"
        assert node.exec_python(second, look) == "True 42\n"
        node.nerdctl("rm", "--force", first)
        node.nerdctl("rmi", shop.references[FULL])
        wait_until(lambda: len(node.daemons()) == 1, "the end of the first image's daemon")
        assert node.exec_python(second, "import csv, sqlite3; print(42)") == "42\n"
        assert node.complaints() == []
        node.nerdctl("rm", "--force", second)


def test_daemons_outlive_the_snapshotter_and_are_taken_on_by_the_next(shop: Shop) -> None:
    reference = shop.references[SMALL]
    with Node("dedicated", clean_up=False) as node:
        container = node.start_container(reference)
        (pid,) = node.daemon_pids()
        node.stop_snapshotter()
        assert node.exec_python(container, "import json; print(42)") == "42\n"
        node.start_snapshotter()
        assert node.daemon_pids() == [pid]
        assert node.run_python(reference, "import csv; print(42)") == "42\n"
        node.watch_daemon_logs()
        node.nerdctl("rm", "--force", container)
        node.nerdctl("rmi", reference)
        wait_until(lambda: node.daemons() == [], "the end of the daemon")
        wait_until(lambda: not is_running(pid), f"the end of {cmdline(pid)}")
        assert node.complaints() == []
