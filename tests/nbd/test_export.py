"""`nydusd nbd` as real clients see it: nbdinfo, nbdcopy, and the kernel's EROFS on what they have copied."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nydusd.frontends.nbd import protocol
from tests.erofs.test_images import V6, differences
from tests.support.daemon import Daemon
from tests.support.discipline import wait_until
from tests.support.oracle import Image, image
from tests.support.scarce import no_fd_left


class Export(Daemon):
    """A daemon that exports an image; it mounts nothing."""

    def __init__(
        self,
        what: Image,
        *,
        config: dict[str, object] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        super().__init__(what.bootstrap, what.blobs, config=config, verb="nbd", environment=environment)
        self.socket = self.folder / "nbd.sock"
        self.place = f"nbd {self.socket}"
        place = self.command.index("-M")
        self.command[place : place + 2] = ["-S", str(self.socket)]

    def serves(self) -> bool:
        return self.says_running()

    def client(self, *command: str) -> str:
        uri = f"nbd+unix:///?socket={self.socket}"
        done = subprocess.run([command[0], *command[1:], uri], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def copy(self, target: Path) -> Path:
        uri = f"nbd+unix:///?socket={self.socket}"
        done = subprocess.run(["nbdcopy", uri, str(target)], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return target

    def connect(self) -> socket.socket:
        wire = socket.socket(socket.AF_UNIX)
        wire.settimeout(30)
        wire.connect(str(self.socket))
        return wire


def shows_the_manifest(disk: Path, what: Image, place: Path) -> None:
    place.mkdir()
    subprocess.run(["mount", "-t", "erofs", "-o", "ro,loop", str(disk), str(place)], check=True, timeout=60)
    try:
        found = differences(what, place)
    finally:
        subprocess.run(["umount", str(place)], check=True, timeout=60)
    assert found == []


@pytest.mark.parametrize("what", V6, ids=lambda what: what.name)
def test_a_copy_of_the_export_is_a_disk_that_the_kernel_mounts(what: Image, tmp_path: Path) -> None:
    with Export(what) as export:
        told = json.loads(export.client("nbdinfo", "--json"))["exports"][0]
        disk = export.copy(tmp_path / "disk")
    assert told["export-size"] == disk.stat().st_size
    assert told["is_read_only"] is True
    assert told["block_size_preferred"] == (512 if what.name.endswith("v6-tarfs") else 4096)
    if what.bootstrap.parent != what.blobs:  # else the metadata is in the blob
        assert disk.read_bytes()[: what.bootstrap.stat().st_size] == what.bootstrap.read_bytes()
    shows_the_manifest(disk, what, tmp_path / "mnt")


def test_without_a_cache_folder_chunks_come_through_shared_memory(tmp_path: Path) -> None:
    what = image("v6-zstd-blake3")
    config: dict[str, object] = {
        "version": 2,
        "backend": {"type": "localfs", "localfs": {"dir": str(what.blobs)}},
        "cache": {"type": "dummycache"},
        "rafs": {"mode": "direct"},
    }
    with Export(what, config=config) as export:
        disk = export.copy(tmp_path / "disk")
    shows_the_manifest(disk, what, tmp_path / "mnt")


def test_workers_and_front_end_may_be_killed_under_a_client(tmp_path: Path) -> None:
    what = image("v6-smallchunk")
    with Export(what) as export:
        for role in ("decompress", "fetch"):
            for pid in export.pids(role):
                export.kill(pid)
        disk = export.copy(tmp_path / "disk")
        (front_end,) = export.pids("nbd")
        with serving(export) as wire:
            export.kill(front_end)
            assert read(wire, 0, 512)[0] == 0
        assert front_end not in export.pids("nbd")
        again = export.copy(tmp_path / "again")
        export.kill_supervisor()
        export.start()
        assert export.copy(tmp_path / "third").read_bytes() == disk.read_bytes() == again.read_bytes()
    shows_the_manifest(disk, what, tmp_path / "mnt")


def test_a_blob_that_is_damaged_fails_reads_of_it_alone(tmp_path: Path, expect_log: Callable[..., None]) -> None:
    expect_log(r"chunk \d+: ", "nbd: a read of 4096 bytes at 524288 failed")
    what = image("v6-zstd-blake3")
    blobs = tmp_path / "blobs"
    shutil.copytree(what.blobs, blobs)
    with Export(Image(what.name, what.bootstrap, blobs, what.manifest, what.tar)) as export:
        for blob in blobs.iterdir():
            blob.write_bytes(bytes(blob.stat().st_size))
        with serving(export) as wire:
            code, data = read(wire, 0, 4096)
            assert (code, data) == (0, what.bootstrap.read_bytes()[:4096])
            assert read(wire, 128 * 4096, 4096) == (5, b"")


# --- clients that do not mean well ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Export]:
    with Export(image("v6-zstd-blake3")) as made:
        made.copy(tmp_path_factory.mktemp("all") / "disk")  # from now on it makes nothing new
        yield made


class serving:
    """A connection on which commands can be sent."""

    def __init__(self, export: Export) -> None:
        self.wire = export.connect()

    def __enter__(self) -> socket.socket:
        assert exactly(self.wire, 18) == protocol.GREETING
        self.wire.sendall(struct.pack(">I", 3) + protocol.OPTION.pack(b"IHAVEOPT", 1, 0))
        exactly(self.wire, 10)
        return self.wire

    def __exit__(self, *_: object) -> None:
        self.wire.close()


def exactly(wire: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = wire.recv(size - len(data))
        assert more, "the connection was closed"
        data += more
    return data


def command(kind: int, offset: int = 0, length: int = 0, cookie: int = 7) -> bytes:
    return protocol.REQUEST.pack(0x25609513, 0, kind, cookie, offset, length)


def answered(wire: socket.socket) -> int:
    magic, code, cookie = protocol.REPLY.unpack(exactly(wire, 16))
    assert (magic, cookie) == (0x67446698, 7)
    return int(code)


def read(wire: socket.socket, offset: int, length: int) -> tuple[int, bytes]:
    wire.sendall(command(protocol.READ, offset, length))
    code = answered(wire)
    return code, b"" if code else exactly(wire, length)


def is_closed(wire: socket.socket) -> bool:
    with contextlib.suppress(ConnectionResetError):
        while wire.recv(1 << 16):
            pass
    return True


def test_what_cannot_be_done_is_refused_and_the_connection_goes_on(export: Export) -> None:
    with serving(export) as wire:
        for kind, offset, length, code in (
            (protocol.READ, 0, 0, 22),
            (protocol.READ, 0, protocol.READ_MOST + 1, 22),
            (protocol.READ, 1 << 63, 4096, 22),
            (protocol.READ, (1 << 64) - 1, 0xFFFFFFFF, 22),
            (protocol.TRIM, 0, 4096, 1),
            (protocol.ZEROES, 0, 4096, 1),
            (protocol.FLUSH, 0, 0, 0),
            (99, 0, 0, 22),
        ):
            wire.sendall(command(kind, offset, length))
            assert answered(wire) == code, (kind, offset, length)
        wire.sendall(command(protocol.WRITE, 0, 100_000))
        wire.sendall(bytes(100_000))
        assert answered(wire) == 1
        assert read(wire, 1, 3)[0] == 0, "reads need not be aligned"


@pytest.mark.parametrize(
    "said",
    [
        b"\xff\xff\xff\xff",
        struct.pack(">I", 0),
        struct.pack(">I", 3) + protocol.OPTION.pack(b"I HAVE O", 7, 0),
        struct.pack(">I", 3) + protocol.OPTION.pack(b"IHAVEOPT", 7, 0xFFFFFFFF),
        struct.pack(">I", 3) + protocol.OPTION.pack(b"IHAVEOPT", 1, 5) + b"other",
        struct.pack(">I", 3) + protocol.OPTION.pack(b"IHAVEOPT", 1, 0) + bytes(28),
        struct.pack(">I", 3) + protocol.OPTION.pack(b"IHAVEOPT", 1, 0) + command(protocol.WRITE, 0, 0xFFFFFFFF),
        struct.pack(">I", 3) + protocol.OPTION.pack(b"IHAVEOPT", 1, 0) + command(protocol.DISC),
        struct.pack(">I", 3) + protocol.OPTION.pack(b"IHAVEOPT", 2, 0),
    ],
    ids=["flags", "no-newstyle", "option-magic", "long-option", "name", "magic", "long-write", "disconnect", "abort"],
)
def test_a_client_that_breaks_the_protocol_or_leaves_is_disconnected(export: Export, said: bytes) -> None:
    with export.connect() as wire:
        wire.sendall(said)
        assert is_closed(wire)
    with serving(export) as wire:
        assert read(wire, 0, 512)[0] == 0, "others are served"


def test_unknown_options_and_names_are_refused_in_words(export: Export) -> None:
    with export.connect() as wire:
        exactly(wire, 18)
        wire.sendall(struct.pack(">I", 3))
        for kind, data, code in (
            (8, b"", 0x80000001),
            (5, b"", 0x80000001),
            (3, b"x", 0x80000003),
            (7, b"\0\0\0\x05other\0\0", 0x80000006),
            (7, b"\xff\xff\xff\xff\0\0", 0x80000003),
            (6, b"", 0x80000003),
        ):
            wire.sendall(protocol.OPTION.pack(b"IHAVEOPT", kind, len(data)) + data)
            assert struct.unpack(">QIII", exactly(wire, 20))[1:3] == (kind, code)


def test_half_messages_and_clients_that_take_nothing_keep_nobody_out(export: Export) -> None:
    stuck = [export.connect() for _ in range(70)]
    for number, wire in enumerate(stuck):
        wire.setblocking(False)
        with contextlib.suppress(OSError):
            wire.send(b"\0\0\0\x03IHAVEOPT"[: number % 12])
    greedy = serving(export).__enter__()
    greedy.setblocking(False)
    size = json.loads(export.client("nbdinfo", "--json"))["exports"][0]["export-size"]
    try:
        for _ in range(10_000):
            greedy.send(command(protocol.READ, 0, min(size, protocol.READ_MOST)))
    except BlockingIOError:
        pass
    with serving(export) as wire:
        assert read(wire, 0, 4096)[0] == 0
    for wire in [*stuck, greedy]:
        wire.close()


def test_an_image_of_v5_and_a_path_that_is_no_socket_are_refused(tmp_path: Path) -> None:
    old, new = image("v5-zstd-blake3"), image("v6-zstd-blake3")
    (tmp_path / "file").write_text("mine")
    for what, path, why in (
        (old, tmp_path / "s", "only v6 images"),
        (new, tmp_path / "file", "it exists and is not a socket"),
    ):
        command = [
            sys.executable,
            "-m",
            "nydusd",
            "nbd",
            "-B",
            str(what.bootstrap),
            "-D",
            str(what.blobs),
            "-S",
            str(path),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, why in done.stderr) == (1, True), done.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_an_image_whose_blob_lies_in_its_metadata_is_refused_at_the_start(tmp_path: Path) -> None:
    what = image("v6-zstd-blake3")
    damaged = bytearray(what.bootstrap.read_bytes())
    struct.pack_into("<I", damaged, 1408 + 68, 1)
    bootstrap = tmp_path / "bootstrap"
    bootstrap.write_bytes(damaged)
    with pytest.raises(AssertionError, match="exit status 1") as e, Export(what._replace(bootstrap=bootstrap)):
        pass
    assert f"{bootstrap}: devices[0].mapped_blkaddr: 4096 is within what ends at {len(damaged)}" in str(e.value)
    assert "use `nydusd fuse`" in str(e.value)
    assert "exported" not in str(e.value)


@pytest.mark.parametrize("spare", range(3))
def test_a_front_end_that_can_open_nothing_disconnects_who_is_new_and_serves_on(
    spare: int, export: Export, expect_log: Callable[..., None]
) -> None:
    expect_log("a client is disconnected: the front end can open no more files")
    (front_end,) = export.pids("nbd")
    with serving(export) as present:
        with no_fd_left(front_end, spare), export.connect() as refused:
            assert is_closed(refused)
            assert read(present, 0, 512)[0] == 0
        before = os.listdir(f"/proc/{front_end}/fd")
        with serving(export) as wire:
            assert read(wire, 0, 512)[0] == 0
        wait_until(lambda: os.listdir(f"/proc/{front_end}/fd") == before, "the front end to keep nothing of a client")
    assert export.pids("nbd") == [front_end]


def test_a_stop_removes_the_socket() -> None:
    with Export(image("v6-zstd-blake3")) as export:
        assert export.socket.is_socket()
        assert export.socket.stat().st_mode & 0o777 == 0o600
        export.stop(signal.SIGTERM)
        assert not export.socket.exists()
