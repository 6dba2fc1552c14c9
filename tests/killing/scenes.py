"""Scenes of one daemon that serves images by FUSE: mounted by the API, or from its start to its end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from contextlib import ExitStack

from nydusd.storage.cache.manager import segments_in
from nydusd.storage.state.names import names
from nydusd.storage.state.segment import Segment
from nydusd.supervisor.runtime import TRIAL
from tests.killing.scene import FILES, SECONDS, Config, Scene, read
from tests.support.discipline import (
    becomes_true,
    cmdline,
    descendants,
    detach_mount,
    discipline,
    is_running,
    wait_until,
)
from tests.support.faulty_server import faulty
from tests.support.mounted import CHUNK, REPO, Hub
from tests.support.segments import in_child, join


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
            return [name for name in names(prefix) if not name.endswith(kept) or TRIAL in name]

        assert becomes_true(lambda: not left(), SECONDS), f"left in shared memory: {left()}"
        folder = discipline.runtime / prefix.split(".")[1]
        wait_until(lambda: os.listdir(folder / "mounts") == ["table.json"], "the end of the records", SECONDS)

        def stray() -> list[str]:
            return [str(p) for p in folder.rglob("*") if p.name.endswith(".tmp") or p.name.startswith(("trace", TRIAL))]

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


class HalfRead(Shared):
    """Half of an image was read when it begins, and no process but the daemon's is there when it ends."""

    def before(self) -> None:
        self.mount()
        for name in FILES[len(FILES) // 2 :]:  # the latter half: what comes behind a chunk is taken along
            assert read(self.daemon.mountpoint / self.place / name) == self.tree.contents[name]

    def after(self) -> None:
        super().after()
        assert becomes_true(lambda: not self.strays(), SECONDS), f"left: {self.strays()}"

    def strays(self) -> list[str]:
        """Processes that were the daemon's once."""
        known = {self.daemon.pid, *self.daemon.family()}
        titles = {pid: cmdline(pid) for pid in descendants(os.getpid()) if pid not in known and is_running(pid)}
        return [f"{pid} ({title})" for pid, title in titles.items() if title.startswith("nydusd: ")]


class TakeOver(HalfRead):
    """The supervisor is killed while an image is mounted, of which half was read."""

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
        return segments_in(names(prefix), f"/{prefix}")

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
        if process.poll() in (-signal.SIGKILL, -signal.SIGTERM):  # the latter: it had just been started, by `keep`
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
