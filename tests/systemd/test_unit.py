"""The unit under a real systemd: ready when it serves, succeeded when it is killed, and nobody who reads notices."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.image import Built, build
from tests.support.daemon import image_config
from tests.support.discipline import wait_until
from tests.support.readers import PIECE
from tests.support.trees import random_tree
from tests.support.verifying import Verifying
from tests.systemd.machine import ROOT, Machine
from tests.systemd.service import UNIT, asked, device, kill, log_of, service, stop_and_look

FILES, FILE_SIZE, CHUNK = 8, 1 << 20, 1 << 16
READERS = 4


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_tree(tmp_path_factory.mktemp("tree"), FILES, FILE_SIZE)


@pytest.fixture(scope="module")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tree, tmp_path_factory.mktemp("image"), CHUNK)


@pytest.fixture
def node(tmp_path: Path, built: Built) -> Iterator[Machine]:
    """A machine whose `nydusd@one` is ours, with the image, not started yet. `mnt` in its folder is the mount point."""
    with service(tmp_path, built.bootstrap, image_config(built.blob.parent, tmp_path / "cache"), watchdog=2) as it:
        yield it


def verifying(node: Machine, tree: Path, folder: Path) -> Verifying:
    """Readers of the mount, inside."""
    inside = ["nsenter", "--target", str(node.init()), "--mount", "--pid"]
    return Verifying(folder / "mnt", tree, folder, READERS, inside=inside)


def test_is_ready_when_it_serves_and_leaves_nothing_when_it_is_stopped(node: Machine, tmp_path: Path) -> None:
    node.systemctl("start", UNIT)  # waits for READY=1
    assert "is mounted at" in node.show(UNIT, "StatusText")
    assert node.show(UNIT, "OOMPolicy") == "continue"
    assert sorted(node.run("ls", str(tmp_path / "mnt")).stdout.split()) == [f"{n:02}" for n in range(FILES)]
    stop_and_look(node, tmp_path)


@pytest.mark.parametrize(("how", "times"), [("killed", 6), ("all killed", 2), ("hung", 1)])
def test_is_succeeded_under_load_and_no_reader_notices(
    node: Machine, tree: Path, tmp_path: Path, how: str, times: int
) -> None:
    """Also more often than the five times in 10 s after which systemd gives up by itself, and with its fd store alone."""
    node.systemctl("start", UNIT)
    before = int(node.show(UNIT, "MainPID"))
    with verifying(node, tree, tmp_path) as readers:
        for _ in range(times):
            readers.go_on(0)
            # One that hangs is the watchdog's case.
            kill(node, "all" if how == "all killed" else "main", "STOP" if how == "hung" else "KILL")
        readers.go_on(READERS)
    assert readers.pieces() > FILES * FILE_SIZE // PIECE
    assert int(node.show(UNIT, "MainPID")) != before
    assert "mounting anew" not in log_of(tmp_path).read_text()
    node.systemctl("stop", UNIT)
    assert node.run("pgrep", "-f", "nydusd").stdout == ""


def test_restart_brings_newer_code_under_load_and_keeps_the_mount(node: Machine, tree: Path, tmp_path: Path) -> None:
    """Every process is of the newer build in the end: the service is upgraded, and nobody who reads notices."""
    code = tmp_path / "code"
    for package in ("nydusd", "workers"):
        shutil.copytree(ROOT / package, code / package, ignore=shutil.ignore_patterns("__pycache__"))
    command = tmp_path / "prefix" / "bin" / "nydusd"
    command.unlink()
    command.write_text(f'#!/bin/sh\nPYTHONPATH={code} exec {sys.executable} -P -m nydusd "$@"\n')
    command.chmod(0o755)

    def builds() -> set[str]:
        processes = (asked(node, "/api/v1/nydusd/workers") or {"processes": []})["processes"]
        return {row["commit"] if row["state"] != "restarting" else "" for row in processes}

    node.systemctl("start", UNIT)
    wait_until(lambda: bool(builds() - {""}), "an answer of the API", 60)
    before, older = device(node, tmp_path), builds() | {""}
    with verifying(node, tree, tmp_path) as readers:
        readers.go_on(0)
        with (code / "nydusd" / "frontends" / "fuse" / "main.py").open("a") as source:
            source.write("# Newer.\n")
        node.systemctl("restart", UNIT)
        assert device(node, tmp_path) == before
        wait_until(
            lambda: (len(found := builds()) == 1 and not found & older) or readers.have_ended(),
            "processes of the newer build",
            90,
        )
        readers.go_on(READERS)
    assert device(node, tmp_path) == before
    assert "mounting anew" not in log_of(tmp_path).read_text()
    stop_and_look(node, tmp_path)
