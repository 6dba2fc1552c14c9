"""What is checked of fscache in the guest: `python -m tests.fscache.guest.checks`. It prints one line a check, in their order.

Runs as root in the guest that `run.sh` boots, on the real /dev/cachefiles. The checks follow one another with the same
daemon, because its start takes seconds in an emulated machine; `tests/fscache/test_guest.py` makes a test of each.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from nydusd.formats import open_bootstrap
from tests.image.build import image as nydus_image
from tests.support import manifest
from tests.support.oracle import Image, image, images

WORK = Path("/tmp/fscache-checks")
CACHE = Path(os.environ.get("FSCACHE_DIR", "/nonexistent"))
API = WORK / "api.sock"
PATIENCE = 150.0
DOMAIN = "shared"
_libc = ctypes.CDLL(None, use_errno=True)


def wait(what: str, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE:g} s"
        time.sleep(0.05)


def request(method: str, path: str, body: bytes | None = None) -> tuple[int, str]:
    class Connection(http.client.HTTPConnection):
        def connect(self) -> None:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(PATIENCE)
            self.sock.connect(str(API))

    connection = Connection("nydusd")
    with contextlib.closing(connection):
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.read().decode()


class Daemon:
    """`nydusd singleton --fscache`, started again as often as wanted."""

    def __init__(self) -> None:
        self.log = WORK / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, store: Store | None = None) -> None:
        command = [sys.executable, "-m", "nydusd", "singleton", "--fscache", str(CACHE), "-A", str(API)]
        with self.log.open("ab") as log:
            command += ["--fscache-threads", "2", "--fscache-tag", "checks"]
            environment = dict(os.environ)
            if store is not None:
                command = store.giving(command)
                environment["NOTIFY_SOCKET"] = store.path
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, close_fds=False
            )
        wait("RUNNING", self._is_running)

    def _is_running(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"the daemon ended:\n{self.log.read_text()[-3000:]}"
        try:
            return '"RUNNING"' in request("GET", "/api/v2/daemon")[1]
        except OSError:
            return False

    def pids(self, title: str) -> list[int]:
        """Processes by the title that they give themselves."""
        return [pid for pid, name in processes() if name.startswith(f"nydusd: {title}")]

    def end(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)


class Store:
    """The receiving end of systemd's fd store, for one descriptor."""

    def __init__(self) -> None:
        self.path = str(WORK / "notify")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.settimeout(PATIENCE)
        self._fd, self._name = -1, ""

    def take(self) -> None:
        """Wait for the device."""
        while self._fd < 0:
            data, fds, _, _ = socket.recv_fds(self._socket, 4096, 4)
            if fds:
                self._fd = fds[0]
                self._name = data.decode().split("FDNAME=")[1].split("\n")[0]

    def giving(self, command: list[str]) -> list[str]:
        """A command that gives it to another."""
        if self._fd < 0:
            return command
        program = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.closerange(4, 64); "
        program += "os.environ |= {'LISTEN_PID': str(os.getpid()), 'LISTEN_FDS': '1', 'LISTEN_FDNAMES': sys.argv[2]}; "
        program += "os.execv(sys.argv[3], sys.argv[3:])"
        os.set_inheritable(self._fd, True)
        return [sys.executable, "-c", program, str(self._fd), self._name, *command]

    def close(self) -> None:
        """Give it up: whoever is killed from now on leaves nothing."""
        os.close(self._fd)
        self._socket.close()


def processes() -> Iterator[tuple[int, str]]:
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError):
                yield (
                    int(name),
                    Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"),
                )


def entry(name: str, what: Image, domain: str = DOMAIN) -> bytes:
    config = {
        "id": name,
        "backend_type": "localfs",
        "backend_config": {"dir": str(what.blobs)},
        "cache_type": "fscache",
        "cache_config": {"work_dir": str(WORK)},
        "metadata_path": str(what.bootstrap),
    }
    return json.dumps({"type": "bootstrap", "id": name, "domain_id": domain, "config": config}).encode()


def bind(name: str, what: Image, domain: str = DOMAIN) -> None:
    assert request("PUT", "/api/v2/blobs", entry(name, what, domain)) == (204, "")


def mount(name: str, domain: str | None = DOMAIN) -> Path:
    place = WORK / name
    place.mkdir(exist_ok=True)
    options = f"fsid={name}" if domain is None else f"domain_id={domain},fsid={name}"
    if _libc.mount(b"none", os.fsencode(place), b"erofs", ctypes.c_ulong(1), options.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return place


def unmount(place: Path) -> None:
    assert _libc.umount2(os.fsencode(place), 0) == 0, os.strerror(ctypes.get_errno())


def drop_page_cache() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("3")


def same(what: Image, place: Path) -> None:
    found = manifest.differences(manifest.load(what.manifest), manifest.walk(place))
    assert found == [], found[:5]


class Reader(threading.Thread):
    """Reads a whole image while something happens; `finish` says what it saw."""

    def __init__(self, what: Image, place: Path) -> None:
        super().__init__(daemon=True)
        self._what, self._place = what, place
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            same(self._what, self._place)
        except BaseException as e:
            self._error = e

    def finish(self) -> None:
        self.join(PATIENCE)
        assert not self.is_alive(), "a reader hangs"
        if self._error is not None:
            raise self._error


def kill_all() -> None:
    """SIGKILL of the daemon and of all that it has started, which are stopped first."""
    assert daemon.process is not None
    pids = [daemon.process.pid, *daemon.pids("")]
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    daemon.process.wait(PATIENCE)
    wait("their end", lambda: not daemon.pids(""))


FIRST, SECOND, THIRD = image("v6-zstd-blake3"), image("v6-smallchunk"), image("v6-batch")
daemon = Daemon()


def an_image_is_read_cold_while_workers_are_killed() -> None:
    daemon.start()
    bind("first", FIRST)
    place = mount("first")
    reader = Reader(FIRST, place)
    killed: set[int] = set()
    while reader.is_alive() and len(killed) < 6:
        for pid in daemon.pids("decompress") + daemon.pids("fetch"):
            if pid not in killed and len(killed) < 6:
                killed.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
    reader.finish()


def what_is_cached_is_read_again_without_a_fetch() -> None:
    before = request("GET", "/api/v1/metrics/backend?id=/first")
    drop_page_cache()
    same(FIRST, WORK / "first")
    unmount(WORK / "first")
    same(FIRST, mount("first"))
    told = [json.loads(body)["read_count"] for _, body in (before, request("GET", "/api/v1/metrics/backend?id=/first"))]
    assert told[0] == told[1] > 0


def every_image_that_no_other_check_reads_shows_its_manifest() -> None:
    """But tarfs, which is not served. What was read once is in the kernel's cache, and others want theirs to be cold."""
    others = {FIRST.name, SECOND.name, THIRD.name, "v6-toc", "v6-none-sha256", "v6-tarfs"}
    for what in images():
        if "v6" not in what.name or ":" in what.name or what.name in others:
            continue
        bind(what.name, what)
        place = mount(what.name)
        same(what, place)
        unmount(place)
        assert request("DELETE", f"/api/v2/blobs?domain_id={DOMAIN}&blob_id={what.name}")[0] == 204


def what_cannot_be_bound_or_mounted_is_refused() -> None:
    for wrong, why in (
        (entry("old", image("v5-zstd-blake3")), "only images of RAFS v6"),
        (entry("first", FIRST), "exists"),
    ):
        status, message = request("PUT", "/api/v2/blobs", wrong)
        assert status == 500
        assert why in message
    try:
        mount("stranger")
    except OSError:
        return
    raise AssertionError("an image that is not bound was mounted")


def images_of_a_domain_share_a_blob_of_which_one_lists_more_and_a_liar_is_refused() -> None:
    folder = WORK / "sharing"
    (folder / "blobs").mkdir(parents=True)
    made = {"lower": {"gone": os.urandom(60_000), "keep": os.urandom(60_000)}, "upper": {"gone": os.urandom(7_000)}}
    for layer, files in made.items():
        (folder / layer).mkdir()
        for name, content in files.items():
            (folder / layer / name).write_bytes(content)
        nydus_image(
            "create", "--fs-version", "6", "-B", folder / f"{layer}.boot", "-D", folder / "blobs", folder / layer
        )
    nydus_image("merge", "-B", folder / "merged.boot", folder / "lower.boot", folder / "upper.boot")
    lower, merged = (
        Image(name, folder / f"{name}.boot", folder / "blobs", folder, folder) for name in ("lower", "merged")
    )
    bind("merged", merged, "two")
    place = mount("merged", "two")
    assert (place / "gone").read_bytes() == made["upper"]["gone"]
    bind("lower", lower, "two")
    below = mount("lower", "two")
    assert (below / "gone").read_bytes() == made["lower"]["gone"]
    drop_page_cache()
    for each in (place, below):
        assert (each / "keep").read_bytes() == made["lower"]["keep"]
    raw = bytearray(lower.bootstrap.read_bytes())
    raw[raw.find(listed_digest(lower))] ^= 1
    (folder / "liar.boot").write_bytes(raw)
    status, message = request(
        "PUT", "/api/v2/blobs", entry("liar", lower._replace(bootstrap=folder / "liar.boot"), "two")
    )
    assert status == 500
    assert "another digest than in the image" in message
    for each in (place, below):
        unmount(each)
    for name in ("merged", "lower"):
        assert request("DELETE", f"/api/v2/blobs?domain_id=two&blob_id={name}")[0] == 204


def listed_digest(what: Image) -> bytes:
    """Of a chunk of the image."""
    return next(open_bootstrap(memoryview(what.bootstrap.read_bytes()), "", None).raw_chunks()).digest


def readers_live_through_a_kill_of_the_supervisor_and_of_the_guard() -> None:
    (guard,) = daemon.pids("guard")
    os.kill(guard, signal.SIGKILL)
    wait("another guard", lambda: daemon.pids("guard") not in ([], [guard]))
    bind("second", SECOND)
    place = mount("second")
    reader = Reader(SECOND, place)
    wait("a fetch", lambda: '"read_count":0' not in request("GET", "/api/v1/metrics/backend?id=/second")[1])
    daemon.end(signal.SIGKILL)
    daemon.start()
    reader.finish()
    drop_page_cache()
    same(FIRST, WORK / "first")


def an_image_that_was_bound_before_the_kill_is_bound_after_it() -> None:
    assert request("PUT", "/api/v2/blobs", entry("second", SECOND)) == (204, ""), "who lost an answer may repeat"
    status, message = request("PUT", "/api/v2/blobs", entry("second", SECOND))
    assert (status, "already exists" in message) == (500, True)


def a_dropped_image_is_served_while_it_is_mounted_and_culled_when_it_is_not() -> None:
    bind("third", THIRD)
    (blob,) = THIRD.blobs.iterdir()
    unmount(mount("third"))  # the kernel gives a file its name when it is closed
    wait("a file in the cache", lambda: list(CACHE.glob(f"cache/*/*/D{blob.name}")))
    place = mount("third")
    assert request("DELETE", f"/api/v2/blobs?domain_id={DOMAIN}&blob_id=third")[0] == 204
    same(THIRD, place)
    status, message = request("DELETE", f"/api/v2/blobs?blob_id={blob.name}")
    assert (status, "uses it still" in message) == (500, True)
    unmount(place)
    wait("a file in the cache", lambda: list(CACHE.glob(f"cache/*/*/D{blob.name}")))
    wait("the cull", lambda: request("DELETE", f"/api/v2/blobs?blob_id={blob.name}")[0] == 204)
    assert list(CACHE.glob(f"cache/*/*/D{blob.name}")) == []
    try:
        mount("third")
    except OSError:
        return
    raise AssertionError("a dropped image was mounted")


def a_full_cache_fails_reads_and_serves_them_when_there_is_room() -> None:
    bind("alone", THIRD, domain="")
    knob = Path("/proc/sys/cachefiles/error_injection")
    place = mount("alone", None)
    files = [row for row in manifest.load(THIRD.manifest).values() if "sha256" in row]
    largest = manifest.unescape(str(max(files, key=lambda row: int(str(row["size"])))["path"]))
    knob.write_text("1")
    try:
        with open(os.path.join(os.fsencode(place), largest), "rb") as f:
            f.read()
        raise AssertionError("a read went well without room")
    except OSError as e:
        assert e.errno == errno.EIO
    finally:
        knob.write_text("0")
    unmount(place)
    same(THIRD, mount("alone", None))


def a_stop_leaves_mounted_images_readable_and_the_next_daemon_serves_them() -> None:
    assert daemon.end(signal.SIGTERM) == 0
    assert len(daemon.pids("guard")) == 1
    drop_page_cache()
    same(SECOND, WORK / "second")
    daemon.start()
    unmount(WORK / "alone")
    same(THIRD, mount("alone", None))


def with_the_device_in_an_fd_store_everything_of_ours_may_be_killed_at_once() -> None:
    assert daemon.end(signal.SIGTERM) == 0
    store = Store()
    daemon.start(store)
    bind("kept", image("v6-toc"))
    place = mount("kept")
    store.take()
    reader = Reader(image("v6-toc"), place)
    kill_all()
    daemon.start(store)
    reader.finish()
    same(SECOND, WORK / "second")
    unmount(place)
    store.close()


def nobody_reads_zeros_when_all_processes_are_killed_at_once() -> None:
    bind("last", image("v6-none-sha256"))
    place = mount("last")
    kill_all()
    rows = manifest.load(image("v6-none-sha256").manifest)
    failed = 0
    for row in rows.values():
        if row.get("size") and "sha256" in row:
            path = os.path.join(os.fsencode(place), manifest.unescape(str(row["path"])))
            try:
                with open(path, "rb") as f:
                    content = f.read()
            except OSError:
                failed += 1
                continue
            assert hashlib.sha256(content).hexdigest() == row["sha256"], path
    assert failed, "nothing was left to be read from the cache"


def a_stop_without_mounts_leaves_nothing() -> None:
    for name in ("first", "second", "alone", "last"):
        unmount(WORK / name)
    daemon.start()
    bind("last", image("v6-none-sha256"))
    same(image("v6-none-sha256"), mount("last"))
    unmount(WORK / "last")
    assert daemon.end(signal.SIGTERM) == 0
    wait("their end", lambda: not daemon.pids(""))
    runtime = Path(os.environ["NYDUSD_RUNTIME_DIR"])
    assert [path.name for path in runtime.iterdir() if "fscache" in path.name] == []


CHECKS = (
    an_image_is_read_cold_while_workers_are_killed,
    what_is_cached_is_read_again_without_a_fetch,
    every_image_that_no_other_check_reads_shows_its_manifest,
    what_cannot_be_bound_or_mounted_is_refused,
    images_of_a_domain_share_a_blob_of_which_one_lists_more_and_a_liar_is_refused,
    readers_live_through_a_kill_of_the_supervisor_and_of_the_guard,
    an_image_that_was_bound_before_the_kill_is_bound_after_it,
    a_dropped_image_is_served_while_it_is_mounted_and_culled_when_it_is_not,
    a_full_cache_fails_reads_and_serves_them_when_there_is_room,
    a_stop_leaves_mounted_images_readable_and_the_next_daemon_serves_them,
    with_the_device_in_an_fd_store_everything_of_ours_may_be_killed_at_once,
    nobody_reads_zeros_when_all_processes_are_killed_at_once,
    a_stop_without_mounts_leaves_nothing,
)


def main() -> int:
    """Run all checks; the first that fails ends them, for the others build on it."""
    WORK.mkdir()
    os.environ["NYDUSD_RUNTIME_DIR"] = str(WORK / "run")
    for check in CHECKS:
        began = time.monotonic()
        try:
            check()
        except BaseException:
            print(f"FAILED {check.__name__}", flush=True)
            traceback.print_exc(file=sys.stdout)
            print("the daemon's log:")
            if daemon.log.exists():
                print(daemon.log.read_text(errors="replace")[-6000:], flush=True)
            return 1
        print(f"ok {check.__name__} {time.monotonic() - began:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
