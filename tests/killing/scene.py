"""`Scene`: what daemons do while somebody is killed. It begins cold, reads every byte, and looks at what is left at the end."""

from __future__ import annotations

import json
import os
import signal
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from nydusd.storage.state.map_file import HEADER_SIZE
from tests.killing.plan import Plan
from tests.support.daemon import Daemon
from tests.support.discipline import discipline, wait_until
from tests.support.mounted import CHUNK, Tree

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


def remove(folder: Path) -> None:
    """A cache folder. A worker that finds a chunk map deleted removes what goes with that, perhaps before us."""
    for path in folder.iterdir():
        path.unlink(missing_ok=True)
    folder.rmdir()


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
            args=self.args(),
        )

    def args(self) -> tuple[str, ...]:
        """What is added to the command line."""
        return ("--fuse-threads", "2") if self.bare else ()

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
        remove(self.cache)

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
