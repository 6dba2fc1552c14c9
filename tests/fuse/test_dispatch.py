"""The dispatcher without a kernel: a socket pair takes the place of /dev/fuse, so that it can be told anything."""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nydusd.errors import FormatError, InternalError
from nydusd.formats.model import Extent
from nydusd.frontends.fuse import protocol as p
from nydusd.frontends.fuse.complaints import Complaints
from nydusd.frontends.fuse.journal import Journal, create
from nydusd.frontends.fuse.loop import FrontEnd
from nydusd.frontends.fuse.mount import INODE_BITS, INODE_MAX, Mount
from nydusd.frontends.fuse.namespace import Namespace, View
from nydusd.frontends.fuse.ops import FOREVER, Operations
from nydusd.frontends.fuse.parking import Client
from nydusd.storage.api.device import Pieces
from nydusd.storage.api.io import BlobIoVec, ChunkRun, runs_of
from tests.fuse.tree import CHUNK, Tree, noise, sample

ALL_FLAGS = (1 << 64) - 1


class WholeDevice:
    """A device that has every chunk."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.hints: list[ChunkRun] = []

    def handle(self, blob: int) -> int:
        return blob

    def missing(self, vec: BlobIoVec, again: bool = False) -> list[ChunkRun]:
        return []

    def describe(self, vec: object) -> str:
        return "blob"

    def known(self, ino: int, extent: Extent) -> None:
        """It remembers nothing: each read goes the whole way."""

    def settled(self, vec: list[Extent]) -> list[Extent]:
        return vec

    def runs(self, vec: list[Extent]) -> list[ChunkRun]:
        raise AssertionError("nothing is ever missing")

    def evictions(self, vec: object) -> int:
        return 0

    def refresh(self, vec: BlobIoVec) -> None:
        raise AssertionError("nothing is ever stale")

    def read_into(self, vec: BlobIoVec, buf: memoryview, pieces: Pieces | None = None) -> int:
        done = 0
        for _, _, uoff, offset, length, _ in vec:
            buf[done : done + length] = self.tree.blob[uoff + offset : uoff + offset + length]
            done += length
        return done

    def count_errors(self, vec: BlobIoVec) -> None:
        raise AssertionError("nothing fails")

    def close(self) -> bool:
        """It has nothing open."""
        return False


def single(mount: Mount, flags: int) -> Namespace:
    """A namespace of one image at "/" that nothing is ever added to."""
    namespace = Namespace("", memoryview(bytearray(16)).cast("Q"), flags, lambda _spec, _index: mount)
    operations = Operations(mount, flags, namespace.root_entry)
    namespace[0] = View(mount, operations.table(), operations)
    return namespace


def no_supervisor() -> Client:
    raise AssertionError("no miss, no supervisor")


class Kernel:
    """The other end of a front end's fd."""

    def __init__(self, tree: Tree, flags: int = ALL_FLAGS, xattr: bool = False) -> None:
        self.tree = tree
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.ours, self.theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self.ours.setblocking(False)
        self.mount = Mount("/", tree, WholeDevice(tree), xattr)
        fd = create()
        self.journal = Journal(fd)
        os.close(fd)
        self.front_end = FrontEnd(self.theirs.fileno(), self.journal, single(self.mount, flags), no_supervisor)

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()
        del self.front_end, self.journal  # the mapping holds a descriptor

    def send(self, packet: bytes) -> bytes | None:
        """Hand over the bytes of a request; gives the reply, None if there was none."""
        self.journal.request[: len(packet)] = packet
        self.front_end.dispatch(len(packet))
        try:
            return self.ours.recv(2 << 20)
        except BlockingIOError:
            return None

    def call(self, opcode: int, node: int = p.ROOT_ID, body: bytes = b"", unique: int = 8) -> bytes:
        """A request that succeeds; gives the reply's body."""
        code, reply = self.exchange(opcode, node, body, unique)
        assert code == 0, os.strerror(code)
        return reply

    def fails(self, opcode: int, node: int = p.ROOT_ID, body: bytes = b"") -> int:
        """A request that fails; gives the errno."""
        code, reply = self.exchange(opcode, node, body, 8)
        assert reply == b""
        return code

    def exchange(self, opcode: int, node: int, body: bytes, unique: int) -> tuple[int, bytes]:
        reply = self.send(request(opcode, node, body, unique))
        assert reply is not None
        length, error, echoed = p.OUT_HEADER.unpack_from(reply)
        assert (length, echoed) == (len(reply), unique)
        return -error, reply[p.OUT_HEADER.size :]


def request(opcode: int, node: int, body: bytes, unique: int = 8) -> bytes:
    return p.IN_HEADER.pack(p.IN_HEADER.size + len(body), opcode, unique, node, 0, 0, 1, 0, 0) + body


def read_in(offset: int, size: int) -> bytes:
    return p.READ_IN.pack(0, offset, size, 0, 0, 0, 0)


def dirents(reply: bytes, plus: bool = False) -> list[tuple[bytes, int, int]]:
    """(name, ino, offset) of each entry."""
    found = []
    at = 0
    while at < len(reply):
        start = at + (p.ENTRY_OUT.size if plus else 0)
        ino, offset, length, _ = p.DIRENT.unpack_from(reply, start)
        start += p.DIRENT.size
        found.append((reply[start : start + length], ino, offset))
        at = (start + length + 7) & ~7
    assert at == len(reply)
    return found


@pytest.fixture(scope="module")
def tree() -> Tree:
    return sample()


@pytest.fixture
def kernel(tree: Tree) -> Iterator[Kernel]:
    made = Kernel(tree)
    yield made
    made.close()


def test_lookup_gives_an_entry_for_ever(kernel: Kernel) -> None:
    fields = p.ENTRY_OUT.unpack(kernel.call(p.LOOKUP, body=b"hello\0"))
    ino = kernel.tree.find(b"hello").ino
    assert fields[:7] == (ino, 0, FOREVER, FOREVER, 0, 0, ino)


def test_lookup_of_nothing_is_a_negative_entry_for_ever(kernel: Kernel) -> None:
    fields = p.ENTRY_OUT.unpack(kernel.call(p.LOOKUP, body=b"nothing\0"))
    assert fields[0] == 0
    assert fields[2] == FOREVER == 1 << 32


def test_lookup_of_the_dots(kernel: Kernel) -> None:
    folder = kernel.tree.find(b"dir").ino
    assert p.ENTRY_OUT.unpack(kernel.call(p.LOOKUP, folder, b".\0"))[0] == folder
    assert p.ENTRY_OUT.unpack(kernel.call(p.LOOKUP, folder, b"..\0"))[0] == p.ROOT_ID


def test_lookup_of_a_bad_name(kernel: Kernel) -> None:
    assert kernel.fails(p.LOOKUP, body=b"n" * 256 + b"\0") == errno.ENAMETOOLONG
    assert kernel.fails(p.LOOKUP, body=b"no end") == errno.EINVAL


def test_open_is_refused_for_good_only_where_the_kernel_knows_it(tree: Tree) -> None:
    new, old = Kernel(tree), Kernel(tree, flags=0)
    try:
        assert new.fails(p.OPEN) == new.fails(p.OPENDIR) == errno.ENOSYS
        assert p.OPEN_OUT.unpack(old.call(p.OPEN)) == (0, p.FOPEN_KEEP_CACHE, 0)
        assert p.OPEN_OUT.unpack(old.call(p.OPENDIR)) == (0, p.FOPEN_KEEP_CACHE | p.FOPEN_CACHE_DIR, 0)
    finally:
        new.close()
        old.close()


def test_xattrs_are_refused_for_good_where_nobody_has_any(tree: Tree) -> None:
    bare = Tree()
    body = p.GETXATTR_IN.pack(100, 0)
    for wanted, code in ((False, errno.ENOSYS), (True, errno.ENODATA)):
        kernel = Kernel(bare, xattr=wanted)
        try:
            assert kernel.fails(p.GETXATTR, body=body + b"user.a\0") == code
            if wanted:
                assert kernel.call(p.LISTXATTR, body=body) == b""
            else:
                assert kernel.fails(p.LISTXATTR, body=body) == code
        finally:
            kernel.close()


def test_read_echoes_the_resend_bit(kernel: Kernel) -> None:
    node = kernel.tree.find(b"big").ino
    reply = kernel.call(p.READ, node, read_in(CHUNK - 5, 10), unique=6 | p.UNIQUE_RESEND)
    assert reply == noise("big", CHUNK + 5)[-10:]


def test_read_of_a_whole_mebibyte_and_of_too_much(kernel: Kernel) -> None:
    node = kernel.tree.find(b"big").ino
    assert kernel.call(p.READ, node, read_in(0, 1 << 20)) == noise("big", 1 << 20)
    assert kernel.call(p.READ, node, read_in(0, (1 << 32) - 1)) == noise("big", p.MAX_READ)


@pytest.mark.parametrize("opcode", [p.READDIR, p.READDIRPLUS])
def test_a_folder_is_listed_once_whatever_the_buffer(kernel: Kernel, opcode: int) -> None:
    node = kernel.tree.find(b"dir").ino
    for size in (300, 500, 4096):
        names, offset = [], 0
        while found := dirents(kernel.call(opcode, node, read_in(offset, size)), opcode == p.READDIRPLUS):
            names += [name for name, _, _ in found]
            offset = found[-1][2]
        assert names == [b".", b"..", b"nested", b"\xff\xfe bytes"]


def test_no_entry_fits_a_tiny_buffer(kernel: Kernel) -> None:
    assert kernel.call(p.READDIR, body=read_in(0, 16)) == b""


def test_readdirplus_gives_no_entry_for_dots_and_broken_inodes(kernel: Kernel) -> None:
    reply = kernel.call(p.READDIRPLUS, body=read_in(0, 65536))
    at, nodes = 0, {}
    for name, _, _ in dirents(reply, plus=True):
        nodes[name] = p.ENTRY_OUT.unpack_from(reply, at)[0]
        at += (p.DIRENTPLUS.size + len(name) + 7) & ~7
    assert nodes[b"."] == nodes[b".."] == nodes[b"broken"] == 0
    assert nodes[b"hello"] == kernel.tree.find(b"hello").ino


def test_forgets_and_interrupts_have_no_reply(kernel: Kernel) -> None:
    assert kernel.send(request(p.FORGET, 5, bytes(8))) is None
    assert kernel.send(request(p.BATCH_FORGET, 0, bytes(8 + 16 * 50))) is None
    assert kernel.send(request(p.INTERRUPT, 0, p.INTERRUPT_IN.pack(8))) is None


def test_what_changes_the_image_is_refused(kernel: Kernel) -> None:
    for opcode in (p.SETATTR, p.WRITE, p.CREATE, p.UNLINK, p.SETXATTR, p.FALLOCATE, p.COPY_FILE_RANGE, p.TMPFILE):
        assert kernel.fails(opcode) == errno.EROFS


def test_unknown_requests_are_refused(kernel: Kernel) -> None:
    for opcode in (0, 63, 64, 4096, 0xFFFFFFFF, p.INIT):
        assert kernel.fails(opcode) == errno.ENOSYS
    assert kernel.fails(p.IOCTL) == errno.ENOTTY


def test_access(kernel: Kernel) -> None:
    assert kernel.call(p.ACCESS, body=p.ACCESS_IN.pack(4, 0)) == b""
    assert kernel.fails(p.ACCESS, body=p.ACCESS_IN.pack(2, 0)) == errno.EROFS


@pytest.mark.parametrize("length", range(p.IN_HEADER.size))
def test_a_truncated_header_gets_no_answer(kernel: Kernel, length: int) -> None:
    assert kernel.send(request(p.GETATTR, 1, b"")[:length]) is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(opcode=st.integers(0, 70), node=st.integers(0, (1 << 64) - 1) | st.integers(0, 60), body=st.binary(max_size=64))
def test_any_request_gets_at_most_one_well_formed_answer(kernel: Kernel, opcode: int, node: int, body: bytes) -> None:
    reply = kernel.send(request(opcode, node, body))
    if opcode in (p.FORGET, p.BATCH_FORGET, p.INTERRUPT) and reply is None:
        return
    assert reply is not None
    length, error, unique = p.OUT_HEADER.unpack_from(reply)
    assert (length, unique) == (len(reply), 8)
    assert error == 0 or (-4096 < error < 0 and length == p.OUT_HEADER.size)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FormatError("f", "x", "is wrong"), errno.EIO),
        (InternalError("gone"), errno.EIO),
        (OSError(errno.EMFILE, "x"), errno.EIO),
        (RecursionError(), errno.EIO),
        (struct.error("short"), errno.EINVAL),
    ],
)
def test_an_error_becomes_an_errno_and_one_line_that_names_the_mount(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, code: int
) -> None:
    def broken(ino: int) -> None:
        raise error

    monkeypatch.setattr(tree, "inode", broken)
    kernel = Kernel(tree)
    try:
        for _ in range(50):
            assert kernel.fails(p.GETATTR) == code
    finally:
        kernel.close()
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert caplog.records[0].getMessage().startswith("mount /: ")
    assert bool(caplog.records[0].exc_info) == isinstance(error, InternalError | OSError | RecursionError)
    caplog.clear()
    error.__traceback__ = None  # its frames hold views of the journal


def test_complaints_say_how_many_were_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 100.0
    monkeypatch.setattr("nydusd.frontends.fuse.complaints.time.monotonic", lambda: now)
    complaints = Complaints("mount /")
    for _ in range(4):
        complaints.log("bad %d", 1)
    now = 101.5
    complaints.log("worse")
    assert [record.getMessage() for record in caplog.records] == [
        "mount /: bad 1",
        "mount /: worse (3 more lines were left out)",
    ]


@given(root=st.integers(0, 1 << 35), ino=st.integers(0, 1 << 35), index=st.sampled_from((0, 1, 300, 1 << 27)))
def test_node_ids_are_never_zero_and_lead_back(root: int, ino: int, index: int) -> None:
    tree = Tree(root_ino=root)
    mount = Mount("/", tree, WholeDevice(tree), index=index)
    assert mount.node_of(root) == p.ROOT_ID
    assert mount.ino_of(p.ROOT_ID) == root
    node = mount.node_of(ino)
    assert 0 < node < 1 << 64
    assert mount.ino_of(node) == ino
    assert (node == p.ROOT_ID) == (ino == root)
    assert node == p.ROOT_ID or node >> INODE_BITS == index
    assert mount.shown(ino) > 0


def test_an_inode_number_that_no_image_has_gets_no_node(tree: Tree) -> None:
    with pytest.raises(FormatError, match="/x: inode"):
        Mount("/x", tree, WholeDevice(tree), index=1).node_of(INODE_MAX)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6)), max_size=12))
def test_runs_cover_exactly_the_chunks_of_the_extents(pieces: list[tuple[int, int]]) -> None:
    runs = runs_of([Extent(blob, chunk, chunk * CHUNK, 0, 1, 1) for blob, chunk in pieces])
    covered = {(blob, first + i) for blob, first, count in runs for i in range(count)}
    assert covered == set(pieces)
