"""What daemons do while somebody is killed: each scene begins cold, reads every byte, and looks at what is left at the end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from nydusd.storage.cache.manager import SEGMENT_DIGITS
from nydusd.storage.state.map_file import HEADER_SIZE
from nydusd.storage.state.segment import Segment, names
from tests.killing.plan import Plan
from tests.support.daemon import Daemon
from tests.support.discipline import becomes_true, detach_mount, discipline, wait_until
from tests.support.faulty_server import faulty
from tests.support.mounted import CHUNK, REPO, Hub, Tree
from tests.support.segments import in_child, join

SECONDS = 60.0
FILES = [f"{number:02}" for number in range(4)]
Config = dict[str, object]


def read(path: Path, direct: bool = True) -> bytes:
    """The content of a file of at most a chunk, past the page cache if `direct`."""
    fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.pread(fd, CHUNK, 0)
    finally:
        os.close(fd)


class Scene:
    """One daemon, or one after the other. `turn` does the same again, from a cold cache, and checks what is left."""

    verb = "fuse"
    bare = True
    """The daemon is started without an image."""

    def __init__(self, tree: Tree, folder: Path, **tuning: object) -> None:
        self.tree = tree
        self.folder = folder
        self.plan = Plan(folder / "plan")
        self.turns = 0
        self.tuning: Config = {"front_ends": 2, "fetch_workers": 1, "decompress_workers": 1} | tuning
        self.daemon = self.make()
        self._stack = ExitStack()

    def make(self) -> Daemon:
        bootstrap = None if self.bare else self.tree.bootstrap
        return Daemon(
            bootstrap,
            self.folder,
            cache=self.cache,
            config=self.config(),
            environment=self.plan.environment,
            verb=self.verb,
            args=("--fuse-threads", "2") if self.bare else (),
        )

    @property
    def cache(self) -> Path:
        return self.folder / f"cache{self.turns}"

    def backend(self) -> Config:
        return {"type": "localfs", "config": {"dir": str(self.tree.bootstrap.parent / "blobs")}}

    def config(self) -> Config:
        cache = {"type": "blobcache", "config": {"work_dir": str(self.cache)}}
        device = {"backend": self.backend(), "cache": cache}
        return {"device": device, "mode": "direct", "amplify_io": 0, "nydusd": self.tuning}

    def __enter__(self) -> Self:
        self._stack.__enter__()
        self.open(self._stack)
        return self

    def open(self, stack: ExitStack) -> None:
        stack.enter_context(self.daemon)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    # --- a turn -----------------------------------------------------------------------------------------------

    def turn(self, point: str = "", number: int = 0) -> tuple[bool, dict[str, int]]:
        """Whether somebody was killed at this point, passed for the `number`-th time; and how often each was passed."""
        self.turns += 1
        self.before()
        self.plan.begin(point, number)
        problems: list[BaseException] = []

        def work() -> None:
            try:
                self.work()
            except BaseException as error:
                problems.append(error)

        worker = threading.Thread(target=work)
        worker.start()
        while worker.is_alive():
            self.keep()
            worker.join(0.005)
        found = self.plan.end()
        if problems:
            raise problems[0]
        self.settle()
        self.after()
        self.check_cache()
        return found

    def keep(self) -> None:
        """Start the same command again when what was started was killed."""
        process = self.daemon._process
        if process is not None and process.poll() == -signal.SIGKILL:
            self.daemon.launch()

    def settle(self) -> None:
        """What was started last may have been killed in the last moment."""

        def serves() -> bool:
            self.keep()
            return self.daemon.serves()

        wait_until(serves, "the daemon to serve", SECONDS)

    def before(self) -> None:
        """What comes before anybody may be killed."""

    def work(self) -> None:
        raise NotImplementedError

    def after(self) -> None:
        """What comes when nobody is killed any more."""

    def read_all(self, place: str = "") -> None:
        """AssertionError for a wrong byte, OSError for a read that fails."""
        for name in FILES:
            assert read(self.daemon.mountpoint / place / name) == self.tree.contents[name], f"{name}: wrong bytes"

    def read_while_front_ends_are_killed(self, role: str, place: str = "") -> None:
        """They have read requests then that no worker does anything about; afterwards the workers do."""
        workers = self.daemon.pids("decompress")
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        problems: list[BaseException] = []

        def reads() -> None:
            try:
                self.read_all(place)
            except BaseException as error:
                problems.append(error)

        reader = threading.Thread(target=reads)
        reader.start()
        # If the supervisor is killed, these workers end, and others do the work.
        wait_until(lambda: self.waiting() or not reader.is_alive(), "a read to wait", SECONDS)
        for pids, number in ((self.daemon.pids(role), signal.SIGKILL), (workers, signal.SIGCONT)):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
        reader.join()
        if problems:
            raise problems[0]

    def waiting(self) -> bool:
        """Whether a read waits for the supervisor, as far as that can be asked."""
        try:
            status, body = self.daemon.request("GET", "/api/v1/nydusd/load", seconds=5)
        except OSError:
            return False
        return status == 200 and bool(json.loads(body)["waiting"])

    def check_cache(self) -> None:
        """Each bit of the stored map is true, and there are no files but those of the blob."""
        data = self.cache / f"{self.tree.blob_id}.blob.data"
        if not data.exists():
            return
        plain = self.tree.plain
        have = data.read_bytes()
        for chunk in self.stored():
            at = chunk * CHUNK
            assert have[at : at + CHUNK] == plain[at : at + CHUNK], f"chunk {chunk}: claimed, and not there"
        ours = {data.name, f"{data.name}.chunk_map", f"{data.name}.chunk_map.nydusd", f"{self.tree.blob_id}.blob.meta"}
        left = {path.name for path in self.cache.iterdir()} - ours
        assert not left, f"left in the cache folder: {sorted(left)}"
        shutil.rmtree(self.cache)

    def stored(self) -> list[int]:
        path = self.cache / f"{self.tree.blob_id}.blob.data.chunk_map"
        if not path.exists():
            return []
        raw = path.read_bytes()
        count = len(self.tree.plain) // CHUNK
        assert len(raw) == HEADER_SIZE + -(-count // 8)
        every = any(raw[12:16])
        return [i for i in range(count) if every or raw[HEADER_SIZE + i // 8] >> (7 - i % 8) & 1]

    def instance(self) -> str:
        """What the names of the daemon's shared memory begin with."""
        for path in discipline.runtime.glob("*/state.json"):
            if json.loads(path.read_bytes())["mountpoint"] == str(self.daemon.mountpoint):
                return f"nydusd.{path.parent.name}."
        raise AssertionError("the daemon has no run-time folder")


class Shared(Scene):
    """An image is mounted by the API, read, unmounted."""

    @property
    def place(self) -> str:
        return f"m{self.turns}"

    def mount(self) -> None:
        command = {"fs_type": "rafs", "source": str(self.tree.bootstrap), "config": json.dumps(self.config())}
        self.ask("POST", json.dumps(command).encode())

    def umount(self) -> None:
        self.ask("DELETE", None)

    def ask(self, method: str, body: bytes | None) -> None:
        """Ask until there is an answer: it may have been lost, with what was asked for done or not done."""
        path = f"/api/v1/mount?mountpoint=/{self.place}"
        until = time.monotonic() + SECONDS
        tries = 0
        while True:
            tries += 1
            answer = b""
            try:
                status, answer = self.daemon.request(method, path, body, seconds=5)
            except OSError:
                status = 0
            if status == 204 or (method == "DELETE" and tries > 1 and b"doesn't exist" in answer):
                return
            assert time.monotonic() < until, f"{method} {path}: {status} {answer!r}"
            time.sleep(0.01)

    def work(self) -> None:
        self.mount()
        self.read_all(self.place)
        self.end()

    def end(self) -> None:
        """Unmount: nothing of the image is left then, but its files in the cache folder."""
        self.umount()
        self.after()

    def after(self) -> None:
        """Wait for the end of what was mounted; AssertionError for what stays."""
        wait_until(self.daemon.serves, "the daemon to serve", SECONDS)
        prefix = self.instance()
        kept = (".arena", ".stage", ".mounts", ".inflight")

        def left() -> list[str]:
            return [name for name in names(prefix) if not name.endswith(kept)]

        assert becomes_true(lambda: not left(), SECONDS), f"left in shared memory: {left()}"
        folder = discipline.runtime / prefix.split(".")[1]
        wait_until(lambda: os.listdir(folder / "mounts") == ["table.json"], "the end of the records", SECONDS)

        def stray() -> list[str]:
            return [str(p) for p in folder.rglob("*") if p.name.endswith(".tmp") or p.name.startswith("trace")]

        assert becomes_true(lambda: not stray(), SECONDS), stray()


class InMemory(Shared):
    """The same without a cache: the bytes come in slots of shared memory."""

    def config(self) -> Config:
        config = super().config()
        device = config["device"]
        assert isinstance(device, dict)
        return config | {"device": device | {"cache": {"type": ""}}}


class Remote(Shared):
    """The blob comes from a registry, through the stage."""

    def open(self, stack: ExitStack) -> None:
        self.hub = Hub(self.tree, stack.enter_context(faulty()))
        self.hub.open_to_all = True
        super().open(stack)

    def backend(self) -> Config:
        if not hasattr(self, "hub"):
            return super().backend()
        host = self.hub.server.host
        return {"type": "registry", "config": {"scheme": "http", "host": host, "repo": REPO, "timeout": 30}}


class TakeOver(Shared):
    """The supervisor is killed while an image is mounted, of which half was read."""

    def before(self) -> None:
        self.mount()
        for name in FILES[::2]:
            assert read(self.daemon.mountpoint / self.place / name) == self.tree.contents[name]

    def work(self) -> None:
        pid = self.daemon.pid
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: self.daemon.pid != pid, "the next one", SECONDS)
        self.read_all(self.place)
        self.end()


class Successors(Shared):
    """Front ends are killed while reads wait in them; their successors take these up."""

    def before(self) -> None:
        self.mount()

    def work(self) -> None:
        self.read_while_front_ends_are_killed("fuse", self.place)
        self.end()


class LockLeft(Shared):
    """Who had the lock of the blob's segment was killed."""

    def before(self) -> None:
        self.mount()
        wait_until(lambda: bool(self.segments()), "the segment", SECONDS)
        assert join(in_child(self.die_with_the_lock)) == -signal.SIGKILL

    def segments(self) -> list[str]:
        """Those of blobs that are open."""
        prefix = self.instance()
        return [name for name in names(prefix) if len(name.removeprefix(f"/{prefix}")) == SEGMENT_DIGITS]

    def die_with_the_lock(self) -> None:
        (name,) = self.segments()
        segment = Segment.open(name)
        assert segment is not None
        with segment.lock():
            os.kill(os.getpid(), signal.SIGKILL)


class MakeRoom(Shared):
    """Chunks are taken out of the cache file while they are asked for, and files of a blob that nobody uses are removed."""

    def config(self) -> Config:
        return super().config() | {"nydusd": self.tuning | {"cache_keep": 0}}

    def before(self) -> None:
        self.mount()
        self.read_all(self.place)
        self.end()  # the map is stored then
        assert len(self.stored()) == len(FILES)
        self.mount()
        for suffix in ("", ".chunk_map"):
            (self.cache / f"{'0' * 64}.blob.data{suffix}").write_bytes(b"x" * CHUNK)

    def work(self) -> None:
        def room() -> None:
            try:
                self.daemon.ctl("cache", "gc", "--to", "0")
            except AssertionError:  # it was asked of a supervisor that was killed
                wait_until(self.daemon.serves, "the daemon to serve", SECONDS)
                self.daemon.ctl("cache", "gc", "--to", "0")

        orders = threading.Thread(target=room)
        orders.start()
        while orders.is_alive():
            self.read_all(self.place)
        orders.join()
        self.read_all(self.place)
        self.end()


class Life(Scene):
    """A daemon of one image, from its start to its end."""

    bare = False

    def open(self, stack: ExitStack) -> None:
        """Each turn has a daemon of its own."""

    def before(self) -> None:
        self.daemon = self.make()

    def keep(self) -> None:
        process = self.daemon._process
        if process is not None and process.poll() == -signal.SIGKILL and not self.stopping:
            self.daemon.launch()

    stopping = False

    def settle(self) -> None:
        """It has ended."""

    def serve(self) -> None:
        wait_until(self.daemon.serves, "the daemon to serve", SECONDS)
        self.read_all()

    def work(self) -> None:
        self.stopping = False
        self.daemon.launch()
        self.serve()
        self.stopping = True
        self.end()

    def end(self) -> None:
        """Have the daemon stop; if it is killed meanwhile, the next one."""
        process = self.daemon._process
        assert process is not None
        os.kill(self.daemon.pid, signal.SIGTERM)
        wait_until(self.daemon.has_ended, "the end of the daemon", SECONDS)
        if process.poll() == -signal.SIGKILL:
            assert self.plan.killed()
            self.daemon.launch()
            self.serve()
            os.kill(self.daemon.pid, signal.SIGTERM)
            wait_until(self.daemon.has_ended, "the end of the next daemon", SECONDS)

    def after(self) -> None:
        self.daemon.__exit__(None, None, None)


class Anew(Life):
    """The same, where a daemon has been all of whose processes were killed at once when half of the image was cached."""

    def before(self) -> None:
        super().before()
        self.daemon.start()
        for name in FILES[::2]:
            assert read(self.daemon.mountpoint / name) == self.tree.contents[name]
        self.daemon.kill_all()
        self.daemon.forget()
        detach_mount(str(self.daemon.mountpoint))


class OfOthers(Life):
    """The same over the cache of a daemon that has no record of ours: each chunk is looked at before it is believed."""

    def open(self, stack: ExitStack) -> None:
        with self.make() as daemon:
            for name in FILES:
                assert read(daemon.mountpoint / name) == self.tree.contents[name]
        self.filled = self.cache
        (record,) = self.filled.glob("*.chunk_map.nydusd")
        record.unlink()

    def before(self) -> None:
        super().before()
        shutil.copytree(self.filled, self.cache)
