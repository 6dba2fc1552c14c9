"""SIGKILL of processes of `nydusd erofs` while readers wait: they get the right bytes, or an error, and never a hole."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nydusd.storage.cache.manager import segments_in
from nydusd.storage.state.names import names
from nydusd.storage.state.segment import SYNCING, Segment
from tests.supervisor.lives import state_file
from tests.support.daemon import wait_for_role
from tests.support.discipline import cmdline, descendants, discipline, is_running, wait_until
from tests.support.faulty_server import Reply, Request, faulty
from tests.support.mounted import CHUNK, Hub, Mounted, Tree

Expect = Callable[..., None]
ROLES = ("erofs", "guard", "fetch", "decompress")
NAMES = [f"{number:02}" for number in range(8)]
MIDDLE = 32 * CHUNK
READ = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
print("open", flush=True)
try:
    sys.stdout.write(os.pread(fd, int(sys.argv[2]), int(sys.argv[3])).hex())
except OSError as error:
    sys.exit(error.errno)
"""


class Held:
    """A daemon whose registry answers nothing while `hold` is set."""

    def __init__(self, tree: Tree, hub: Hub, *args: str, **tuning: object) -> None:
        self.asked = threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self.tree = tree

        def answer(request: Request) -> Reply:
            self.asked.set()
            self.gate.wait(60)
            return hub.part(request)

        hub.always = answer
        hub.open_to_all = True
        backend: dict[str, object] = {"host": hub.server.host, "timeout": 60}
        self.mounted = Mounted(tree, backend, verb="erofs", args=args, tuning=tuning)
        self.daemon = self.mounted.daemon

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """The block has the daemon stop while two files are open: of the cached one all is read then, of the other no hole."""
        cached = os.open(self.daemon.mountpoint / NAMES[0], os.O_RDONLY)
        absent = os.open(self.daemon.mountpoint / NAMES[1], os.O_RDONLY)
        assert os.pread(cached, CHUNK, 0) == self.tree.contents[NAMES[0]]
        os.posix_fadvise(cached, 0, 0, os.POSIX_FADV_DONTNEED)
        yield
        self.daemon.wait_for_end()
        with pytest.raises(OSError) as failure:
            os.pread(absent, CHUNK, 0)
        assert failure.value.errno == errno.EIO
        assert os.pread(cached, CHUNK, 0) == self.tree.contents[NAMES[0]], "what is cached"
        os.close(absent)
        os.close(cached)

    def one(self, role: str) -> int:
        """The process of a role, once it is there."""
        wait_for_role(self.daemon, role, 1)
        return self.daemon.pids(role)[0]

    def hold(self) -> None:
        self.gate.clear()
        self.asked.clear()

    def read(self, name: str, size: int = 1 << 20, offset: int = 0) -> subprocess.Popen[bytes]:
        """A reader in a process of its own, which has the file open."""
        command = [sys.executable, "-c", READ, str(self.daemon.mountpoint / name), str(size), str(offset)]
        reader = subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0)  # the line, and no byte more
        assert reader.stdout is not None and reader.stdout.readline() == b"open\n"
        return reader

    def waiting_reader(self, name: str, size: int = 1 << 20, offset: int = 0) -> subprocess.Popen[bytes]:
        """A reader that waits for bytes that the registry holds back."""
        self.hold()
        reader = self.read(name, size, offset)
        assert self.asked.wait(30), "nobody asked the registry"
        return reader

    def right(self, reader: subprocess.Popen[bytes], name: str) -> None:
        """AssertionError unless the reader gets what is in the file."""
        out, _ = reader.communicate(timeout=60)
        assert reader.returncode == 0, f"{name}: {os.strerror(reader.returncode)}"
        assert bytes.fromhex(out.decode()) == self.tree.contents[name], f"{name}: wrong bytes"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(NAMES, tmp_path_factory.mktemp("tree"))


def own(role: str) -> list[int]:
    """Processes of a role below this one, whoever is their parent now."""
    return [pid for pid in descendants(os.getpid()) if is_running(pid) and cmdline(pid).startswith(f"nydusd: {role}")]


def another(role: str, former: int) -> int:
    """The process of a role that comes in the place of this one."""
    wait_until(lambda: own(role) not in ([], [former]) and former not in own(role), f"another {role}", 60)
    (pid,) = own(role)
    return pid


def test_a_reader_waits_through_the_death_of_any_process(tree: Tree, hub: Hub) -> None:
    held = Held(tree, hub)
    with held.mounted:
        for name, role in zip(NAMES, ROLES, strict=False):
            victim = held.one(role)
            reader = held.waiting_reader(name)
            held.daemon.kill(victim)
            wait_for_role(held.daemon, role, 1, without=victim)
            assert reader.poll() is None
            held.gate.set()
            held.right(reader, name)


@pytest.mark.parametrize("driver", ["fanotify", "blobfs"])
def test_a_reader_that_is_killed_leaves_no_hole_to_others(driver: str, tmp_path: Path) -> None:
    """Half of what it reads is there. Kernels before the fix of that have the page cache keep zeros for the rest."""
    tree = Tree(["large"], tmp_path / "tree", 64)
    with faulty() as server:
        held = Held(tree, Hub(tree, server), "--driver", driver)
        with held.mounted:
            fd = os.open(held.daemon.mountpoint / "large", os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            assert os.pread(fd, CHUNK, MIDDLE) == tree.contents["large"][MIDDLE : MIDDLE + CHUNK]
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            reader = held.waiting_reader("large", CHUNK, MIDDLE + CHUNK // 2)
            reader.kill()
            held.gate.set()
            reader.communicate()
            assert os.pread(fd, 2 * CHUNK, MIDDLE) == tree.contents["large"][MIDDLE : MIDDLE + 2 * CHUNK]
            os.close(fd)


def test_a_reader_waits_for_the_next_daemon(tree: Tree, hub: Hub) -> None:
    held = Held(tree, hub)
    with held.mounted:
        for name, others in zip(NAMES, ((), ("erofs",), ("guard",)), strict=False):
            kept = os.open(held.daemon.mountpoint / NAMES[-1], os.O_RDONLY)
            reader = held.waiting_reader(name)
            victims = [held.one(role) for role in others]
            held.daemon.kill_supervisor()
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            assert reader.poll() is None
            held.gate.set()
            held.daemon.start()
            held.right(reader, name)
            # It is the same mount: what was open before can be read on.
            assert os.pread(kept, CHUNK, 0) == tree.contents[NAMES[-1]]
            os.close(kept)


def test_a_stop_with_open_files_leaves_no_hole_to_read(tree: Tree, hub: Hub, expect_log: Expect) -> None:
    expect_log("a read failed: .*(the daemon was stopped|nobody has fetched it in time)")
    held = Held(tree, hub)
    with held.mounted:
        with held.stopping():
            os.kill(held.daemon.pid, signal.SIGTERM)
        wait_until(lambda: not own("erofs") and not own("guard"), "the end of those that stayed")


def test_a_stop_while_front_end_and_guard_are_dead_leaves_no_hole_to_read(
    tree: Tree, hub: Hub, expect_log: Expect
) -> None:
    """Nobody else holds the group: the stop has a guard started before it closes it."""
    expect_log("a read failed: .*(the daemon was stopped|nobody has fetched it in time)")
    held = Held(tree, hub)
    with held.mounted:
        with held.stopping():  # after which who has never served before does
            victims = [held.one("erofs"), held.one("guard")]
            os.kill(held.daemon.pid, signal.SIGSTOP)  # so that it learns of all at once
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not any(map(is_running, victims)), "their end", 60)
            for number in (signal.SIGTERM, signal.SIGCONT):
                os.kill(held.daemon.pid, number)
        wait_until(lambda: not own("erofs") and not own("guard"), "the end of those that stayed", 60)


def test_what_nobody_serves_any_more_is_refused(tree: Tree, hub: Hub, expect_log: Expect) -> None:
    expect_log("a read failed: .*nobody has fetched it in time")
    held = Held(tree, hub, read_deadline=1.0)
    with held.mounted:
        reader = held.waiting_reader(NAMES[0])
        front_end = held.one("erofs")
        held.daemon.kill_supervisor()
        os.kill(front_end, signal.SIGKILL)
        reader.communicate(timeout=60)
        assert reader.returncode == errno.EIO
        # The guard, which does it, has the cache files open as before: so no other daemon takes anything out of them.
        (alone,) = own("erofs")
        used = [os.readlink(entry) for entry in Path(f"/proc/{alone}/fd").iterdir()]
        assert [path for path in held.daemon.cache.glob("*.blob.data") if str(path) not in used] == []
        held.gate.set()
        held.daemon.start()
        held.right(held.read(NAMES[0]), NAMES[0])


def test_who_serves_alone_looks_on_the_disk_where_somebody_was_killed_at_a_sync(
    tree: Tree, hub: Hub, expect_log: Expect
) -> None:
    """Or where some of it is lost. Nobody says any more what: what is there is read, and the rest refused."""
    expect_log(
        "a read failed: .*nobody has fetched it in time|its disk did not take all that was written: who needs it waits"
    )
    expect_log("bytes in the cache file are not the chunk's; fetched again")
    held = Held(tree, hub, read_deadline=1.0)
    daemon = held.daemon
    with held.mounted, contextlib.ExitStack() as opened:

        def read(name: str) -> bytes | None:
            fd = os.open(daemon.mountpoint / name, os.O_RDONLY)
            opened.callback(os.close, fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            try:
                return os.pread(fd, CHUNK, 0)
            except OSError as e:
                assert e.errno == errno.EIO
                return None

        for name in NAMES[:3]:
            held.right(held.read(name), name)
        prefix = f"/nydusd.{state_file(daemon).parent.name}."
        (found,) = segments_in(names(prefix[1:]), prefix)
        segment = Segment.open(found)
        assert segment is not None
        opened.callback(segment.close)
        (data,) = daemon.cache.glob("*.blob.data")
        victims = [held.one("erofs"), *daemon.pids("decompress")]
        daemon.kill_supervisor()
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        segment.syncing[0] = SYNCING
        assert read(NAMES[0]) == tree.contents[NAMES[0]]
        assert read(NAMES[3]) is None
        segment.lost[0] = 1
        with open(data, "r+b") as file:
            file.seek(tree.plain.index(tree.contents[NAMES[1]]))
            file.write(bytes(CHUNK))
        assert read(NAMES[1]) is None
        assert read(NAMES[2]) == tree.contents[NAMES[2]]
        daemon.start()
        for name in NAMES:
            held.right(held.read(name), name)


def test_whoever_serves_alone_may_die_of_anything_and_who_is_last_clears_away(
    tree: Tree, hub: Hub, expect_log: Expect
) -> None:
    """The guard holds the group until somebody serves again. Who does outlives the guard, in its turn."""
    expect_log("a read failed: .*(the daemon was stopped|nobody has fetched it in time)")
    expect_log("it serves no more: journal")
    held = Held(tree, hub)
    with held.mounted:
        front_end, guard = held.one("erofs"), held.one("guard")
        absent = os.open(held.daemon.mountpoint / NAMES[0], os.O_RDONLY)
        with journal_of(guard) as memory:
            magic = os.pread(memory, 8, 0)
            os.pwrite(memory, bytes(8), 0)  # as of another release: who is to serve with it ends at once
            os.kill(held.daemon.pid, signal.SIGTERM)
            held.daemon.wait_for_end()
            os.kill(front_end, signal.SIGKILL)
            wait_until(lambda: "it serves no more" in held.mounted.log(), "one that cannot serve", 60)
            os.pwrite(memory, magic, 0)
        for victim in (0, guard):
            if victim:
                os.kill(victim, signal.SIGKILL)
            with pytest.raises(OSError) as failure:
                os.pread(absent, CHUNK, 0)
            assert failure.value.errno == errno.EIO
        os.close(absent)
        wait_until(lambda: not own("erofs") and not own("guard"), "the end of who has stayed", 60)
        notes = [path for path in discipline.runtime.glob("*.erofs.json") if str(guard) in path.read_text()]
        assert notes == []


def test_who_serves_alone_has_a_guard_again_where_that_was_killed(tree: Tree, hub: Hub, expect_log: Expect) -> None:
    """One after the other may be killed, however often: somebody holds the group, and nobody reads a hole."""
    expect_log("a read failed: .*nobody has fetched it in time")
    held = Held(tree, hub, read_deadline=1.0)
    with held.mounted:
        held.right(held.read(NAMES[0]), NAMES[0])
        serves, guard = held.one("erofs"), held.one("guard")
        absent = os.open(held.daemon.mountpoint / NAMES[1], os.O_RDONLY)
        held.daemon.kill_supervisor()
        for _ in range(3):
            os.kill(serves, signal.SIGKILL)
            with pytest.raises(OSError) as failure:
                os.pread(absent, CHUNK, 0)
            assert failure.value.errno == errno.EIO
            serves = another("erofs", serves)
            os.kill(guard, signal.SIGKILL)
            guard = another("guard", guard)
        held.daemon.start()
        assert os.pread(absent, CHUNK, 0) == tree.contents[NAMES[1]]
        os.close(absent)
        assert (len(own("erofs")), len(own("guard"))) == (1, 1), "the others were ended"
        assert guard not in own("guard")


@contextmanager
def journal_of(guard: int) -> Iterator[int]:
    """The journal that a guard holds."""
    (path,) = (e for e in Path(f"/proc/{guard}/fd").iterdir() if os.readlink(e).startswith("/memfd:nydusd-journal"))
    memory = os.open(path, os.O_RDWR)
    try:
        yield memory
    finally:
        os.close(memory)


def test_a_complete_image_is_read_without_the_front_end(tree: Tree, hub: Hub, tmp_path: Path) -> None:
    held = Held(tree, hub, checkpoint_interval=0.2)
    with held.mounted:
        for name in NAMES:
            held.right(held.read(name), name)
        wait_until(lambda: "the kernel reads it by itself" in held.mounted.log(), "all of it to be here")
        front_end = held.one("erofs")
        os.kill(front_end, signal.SIGSTOP)
        try:
            fd = os.open(held.daemon.mountpoint / NAMES[0], os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
            held.right(held.read(NAMES[0]), NAMES[0])
        finally:
            os.kill(front_end, signal.SIGCONT)
