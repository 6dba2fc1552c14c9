"""`nydusctl bugreport`: what is in it, and that nothing that hangs can hold it up."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import tarfile
from pathlib import Path

import pytest

from nydusd.cli.ctl import bugreport
from nydusd.cli.ctl.connection import Api
from nydusd.cli.ctl.silent import Record
from nydusd.cli.nydusctl import main
from tests.support.daemon import Daemon, image_config
from tests.support.discipline import discipline, is_running, parent, wait_until
from tests.support.oracle import image

IMAGE = image("v6-zstd-blake3")
SECRET = "c2VjcmV0OnBhc3N3b3JkMTIz"


def parts(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        found = {}
        for member in tar.getmembers():
            file = tar.extractfile(member)
            assert file is not None
            assert member.mode == 0o600
            found[member.name.partition("/")[2]] = file.read()
        return found


def test_holds_state_log_pictures_and_no_secret(tmp_path: Path) -> None:
    config = image_config(IMAGE.blobs, tmp_path / "cache")
    log = discipline.log_folder / "bugreport.log"
    with Daemon(IMAGE.bootstrap, IMAGE.blobs, config=config, args=("-L", str(log))) as daemon:
        (daemon.mountpoint / "dup/a").read_bytes()
        out = daemon.ctl("bugreport", "-o", str(tmp_path / "r.tar.gz"))
        pids = [daemon.pid, *daemon.pids("fuse"), *daemon.pids("decompress")]
    assert out.startswith(f"{tmp_path}/r.tar.gz: ")
    assert (tmp_path / "r.tar.gz").stat().st_mode & 0o777 == 0o600
    found = parts(tmp_path / "r.tar.gz")
    assert json.loads(found["daemon.json"])["state"] == "RUNNING"
    assert json.loads(found["cache.json"])["blobs"][0]["ready"] > 0
    assert b"nydusd_chunk_reads_total" in found["metrics.txt"]
    assert found["chunkmaps.png"].startswith(b"\x89PNG")
    assert b"is mounted at" in found["nydusd.log"]
    assert str(daemon.mountpoint).encode() in found["mountinfo.txt"]
    for pid in pids:
        assert any(f"-{pid}-status.txt" in name for name in found)


@pytest.mark.parametrize(("verb", "stopped"), [("fuse", "fuse"), ("fuse", "all"), ("erofs", "all")])
def test_is_made_while_processes_hang(tmp_path: Path, verb: str, stopped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Front ends that are stopped: every look at the mount hangs. All stopped: the API hangs as well."""
    monkeypatch.setattr(bugreport, "_PATIENCE", 0.5)
    asked: list[str] = []
    text = Api.text

    def counting(api: Api, path: str) -> bytes:
        asked.append(path)
        return text(api, path)

    monkeypatch.setattr(Api, "text", counting)
    log = discipline.log_folder / f"bugreport-{verb}-{stopped}.log"
    config = image_config(IMAGE.blobs, tmp_path / "cache") | {"nydusd": {"worker_idle": 0}}
    with Daemon(IMAGE.bootstrap, IMAGE.blobs, config=config, args=("-L", str(log)), verb=verb) as daemon:
        (daemon.mountpoint / "dup/a").read_bytes()
        fronts = daemon.pids(verb)

        def everybody() -> set[int]:
            # Not those between a fork server and its child: they end at once.
            return {daemon.pid, *(pid for pid in daemon.family() if parent(pid) == daemon.pid and is_running(pid))}

        def all_noted() -> bool:
            return (
                len(daemon.pids("fork server")) == 2 and everybody() == Record(str(daemon.apisock)).processes().keys()
            )

        wait_until(all_noted, "the record of all processes", 60)
        victims = fronts if stopped == "fuse" else everybody()
        for pid in victims:
            os.kill(pid, signal.SIGSTOP)
        try:
            assert main(["-S", str(daemon.apisock), "bugreport", "-o", str(tmp_path / "r")]) == 0
        finally:
            for pid in victims:
                with contextlib.suppress(ProcessLookupError):  # one that lived for a moment between two others
                    os.kill(pid, signal.SIGCONT)
    found = parts(tmp_path / "r")
    assert b"nydusd" in found["mountinfo.txt"] or str(daemon.mountpoint).encode() in found["mountinfo.txt"]
    assert ("daemon.json" in found) == (stopped == "fuse")
    assert (b"daemon.json: " in found["missing.txt"]) == (stopped == "all")
    assert (len(asked) == 1) == (stopped == "all"), "who does not answer is asked once"
    for pid in {*fronts, *victims}:
        for part in ("status", "stack"):
            assert any(name.endswith(f"-{pid}-{part}.txt") for name in found)
    assert b"is mounted at" in found["nydusd.log"]
    assert found["chunkmaps.png"].startswith(b"\x89PNG")
    assert b"localfs" in found["config.json" if stopped == "all" else "daemon.json"]


def test_of_the_journal_it_has_the_lines_of_all_processes_and_of_those_of_their_own_unit_that_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = {
        "journalctl": 'printf "%s\\n" "$@" "Authorization: Basic ' + SECRET + '"',
        "systemctl": "case $5 in nydusd*) echo 7 ;; cron*) echo 1 ;; *) exit 1 ;; esac",
    }
    for name, script in tools.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    units = {7: "nydusd@a.service", 8: "nydusd@a.service", 9: None, 10: "cron.service", 11: "gone.service"}
    monkeypatch.setattr(bugreport, "_unit", units.__getitem__)
    asked = bugreport._log(None, list(units)).decode().splitlines()
    assert asked[-8:-1] == [*(f"_PID={pid}" for pid in units), "+", "_SYSTEMD_UNIT=nydusd@a.service"]
    assert asked[-1] == "Authorization: ***"


@pytest.mark.parametrize(
    ("groups", "unit"),
    [
        ("0::/system.slice/system-nydusd.slice/nydusd@a.service\n", "nydusd@a.service"),
        ("4:cpu:/\n1:name=systemd:/system.slice/nydus-snapshotter.service/sub\n0::/\n", "nydus-snapshotter.service"),
        ("0::/user.slice/user-0.slice/user@0.service/app.slice/x.service\n", None),
        ("0::/user.slice/user-0.slice/session-2.scope\n", None),
        ("0::/\n", None),
    ],
)
def test_the_unit_of_a_process_is_told_by_its_control_group(
    groups: str, unit: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _path: groups)
    assert bugreport._unit(7) == unit


def test_without_a_daemon_holds_what_the_system_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "s"))
    assert main(["-S", str(tmp_path / "s"), "bugreport", "-o", str(tmp_path / "r")]) == 0
    assert "parts" in capsys.readouterr().out
    found = parts(tmp_path / "r")
    assert b"kernel: " in found["system.txt"]
    assert b"nobody listens" in found["missing.txt"]


def test_file_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-S", str(tmp_path / "s"), "bugreport", "-o", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"Error: --output {tmp_path}: Is a directory\n"


def test_configuration_in_it_has_no_secret(tmp_path: Path) -> None:
    config = image_config(IMAGE.blobs, tmp_path / "cache")
    device = config["device"]
    assert isinstance(device, dict)
    registry = {"scheme": "http", "host": "127.0.0.1:9", "repo": "a/b", "auth": SECRET, "retry_limit": 0}
    config["device"] = {**device, "backend": {"type": "registry", "config": registry}}
    with Daemon(IMAGE.bootstrap, IMAGE.blobs, config=config) as daemon:
        daemon.ctl("bugreport", "-o", str(tmp_path / "r"))
    everything = b"".join(parts(tmp_path / "r").values())
    assert SECRET.encode() not in everything
    assert b"password123" not in everything
    assert b"127.0.0.1:9" in everything


class TestInfo:
    """One line says whether an image is lazy or complete, and why."""

    def line(self, daemon: Daemon) -> str:
        return daemon.ctl("info").splitlines()[-1]

    def test_lazy_then_complete(self, tmp_path: Path) -> None:
        with Daemon(IMAGE.bootstrap, IMAGE.blobs, cache=tmp_path) as daemon:
            (daemon.mountpoint / "dup/a").read_bytes()
            assert self.line(daemon).startswith("/: lazy, ")
            assert "chunks are fetched when they are read, prefetch is off; read through FUSE (" in self.line(daemon)
            for folder, _, names in os.walk(daemon.mountpoint):
                for name in names:
                    path = Path(folder, name)
                    if not path.is_symlink() and path.is_file():
                        path.read_bytes()
            assert self.line(daemon).startswith(
                "/: complete, 318 of 318 chunks are here: nothing is fetched any more; "
            )

    def test_image_whose_blob_is_not_to_be_had(self, tmp_path: Path, expect_log: object) -> None:
        expect_log("blob .* cannot be opened", "a read failed")  # type: ignore[operator]
        (tmp_path / "blobs").mkdir()
        with Daemon(IMAGE.bootstrap, tmp_path / "blobs") as daemon:
            with pytest.raises(OSError):
                next(path for path in (daemon.mountpoint / "dup").iterdir()).read_bytes()
            assert "lazy, 0 of 318 chunks are here: blob " in self.line(daemon)
            assert "cannot be opened" in self.line(daemon)
