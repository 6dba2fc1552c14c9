"""`nydus-image create` from a folder: every option, read back by the product's parsers, the daemon, and the kernel."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.erofs import erofs_mount
from nydusd.errors import FormatError
from nydusd.formats.model import BlobFeature, Compressor, Digester
from nydusd.formats.superblock import SuperFlag
from nydusd.image.bootstrap_v6 import BootstrapV6
from nydusd.image.chunking import Chunker, Task, pieces_of, slot_size, tasks_of
from nydusd.image.create import build
from nydusd.image.errors import ImageError, SourceError
from nydusd.image.folder import scan
from nydusd.image.node import Node
from nydusd.image.options import BuildOptions
from nydusd.image.pool import Pool
from nydusd.image.prefetch import parse_list, storage_order
from nydusd.image.reader import ImageReader, load_metadata
from nydusd.image.whiteout import Whiteouts
from nydusd.storage.backend import make_backend
from tests.image.build import HERE, create, image, refused, rows, run_image
from tests.support import manifest, oracle
from tests.support.daemon import Daemon
from tests.support.discipline import descendants, is_running, wait_until
from tests.support.manifest import Row

OPTIONS = [
    (),
    ("--compressor", "lz4_block", "--digester", "sha256"),
    ("--compressor", "none", "--chunk-size", "0x1000"),
    ("--chunk-size", "65536", "--batch-size", "0x10000"),
    ("--compressor", "lz4_block", "--chunk-size", "4096", "--batch-size", "4096"),
    ("--features", "blob-toc"),
    ("--blob-inline-meta",),
    ("--blob-inline-meta", "--features", "blob-toc", "--digester", "sha256"),
    ("--encrypt",),
    ("--encrypt", "--batch-size", "0x10000", "--chunk-size", "0x10000", "--features", "blob-toc"),
    ("--chunk-size", "0x1000000"),
]


def _names(options: tuple[str, ...]) -> str:
    return " ".join(option.removeprefix("--") for option in options) or "defaults"


@pytest.mark.parametrize("options", OPTIONS, ids=_names)
def test_every_option_gives_the_source_tree_back(
    tree: Path, expected: dict[str, Row], tmp_path: Path, options: tuple[str, ...]
) -> None:
    assert manifest.differences(expected, rows(create(tree, tmp_path, *options))) == []


@pytest.mark.parametrize("options", [OPTIONS[7], OPTIONS[9]], ids=_names)
def test_daemon_shows_the_source_tree(
    tree: Path, expected: dict[str, Row], tmp_path: Path, options: tuple[str, ...]
) -> None:
    bootstrap = create(tree, tmp_path, *options)
    with Daemon(bootstrap, tmp_path / "blobs") as daemon:
        assert manifest.differences(expected, manifest.walk(daemon.mountpoint)) == []


@pytest.mark.parametrize("chunk_size", [4096, 65536, 1 << 20])
def test_kernel_mounts_the_image_over_its_cache_files(
    tree: Path, expected: dict[str, Row], tmp_path: Path, chunk_size: int
) -> None:
    cache, point = tmp_path / "cache", tmp_path / "mnt"
    cache.mkdir()
    point.mkdir()
    bootstrap = tmp_path / "bootstrap"
    image("create", "-B", bootstrap, "--blob-cache-dir", cache, "--chunk-size", str(chunk_size), tree)
    (data,) = cache.glob("*.blob.data")
    with erofs_mount(bootstrap, [data], point):
        assert manifest.differences(expected, manifest.walk(point)) == []


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--chunk-size", "4096", "--digester", "sha256"),
        ("--repeatable", "--whiteout-spec", "none"),
        ("--prefetch-policy", "fs"),
    ],
    ids=_names,
)
def test_debian_erofs_tools_accept_the_metadata(tree: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    bootstrap = tmp_path / "bootstrap"
    image("create", "-B", bootstrap, "--blob-cache-dir", cache, *options, tree, stdin=b"/many\n")
    (data,) = cache.glob("*.blob.data")
    checked = subprocess.run(["fsck.erofs", f"--device={data}", bootstrap], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    dumped = subprocess.run(
        ["dump.erofs", f"--device={data}", "-s", bootstrap], capture_output=True, text=True, check=True
    )
    assert "0xE0F5E1E2" in dumped.stdout


def test_cache_files_are_complete_and_a_daemon_takes_the_metadata(tree: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    image("create", "-B", tmp_path / "bootstrap", "--blob-cache-dir", cache, tree)
    _, bootstrap = load_metadata(tmp_path / "bootstrap")
    (blob,) = bootstrap.blobs
    assert sorted(path.name for path in cache.iterdir()) == [f"{blob.blob_id}.blob.data", f"{blob.blob_id}.blob.meta"]
    assert (cache / f"{blob.blob_id}.blob.data").stat().st_size == blob.uncompressed_size
    assert blob.compressor is Compressor.NONE


def test_image_of_the_small_tree_is_the_reference_builders_byte_for_byte(small_tree: Path, tmp_path: Path) -> None:
    reference = oracle.image("v6-none-sha256")
    bootstrap = create(small_tree, tmp_path, "--compressor", "none", "--digester", "sha256")
    (theirs,), (ours,) = reference.blobs.iterdir(), (tmp_path / "blobs").iterdir()
    assert ours.name == theirs.name
    assert ours.read_bytes() == theirs.read_bytes()
    made, packed = bytearray(bootstrap.read_bytes()), bytearray(reference.bootstrap.read_bytes())
    # The reference writes the two attributes of one file in a random order.
    _, parsed = load_metadata(bootstrap)
    folder = parsed.lookup(parsed.root_ino, b"xattr") or 0
    node = parsed.lookup(folder, b"user") or 0
    begin = int(str(parsed.superblock_facts()["meta_blkaddr"])) * 4096 + node * 32 + 64
    assert parsed.xattrs(node) == {b"user.bin": bytes(range(256)), b"user.comment": b"hello"}
    for image_bytes in (made, packed):
        image_bytes[begin : begin + 300] = bytes(300)
    assert made == packed


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("v6-zstd-blake3", ()),
        ("v6-lz4-sha256", ("--compressor", "lz4_block", "--digester", "sha256")),
        ("v6-batch", ("--batch-size", "0x10000")),
        ("v6-smallchunk", ("--compressor", "lz4_block", "--chunk-size", "0x1000")),
        ("v6-toc", ("--features", "blob-toc")),
        ("v6-encrypt", ("--encrypt",)),
        ("v6-prefetch", ("--prefetch-policy", "fs")),
    ],
)
def test_structure_is_that_of_the_reference_builder(
    small_tree: Path, tmp_path: Path, name: str, options: tuple[str, ...]
) -> None:
    """All but compressed sizes, which depend on the version of the compressing library, and random keys."""
    stdin = b"/sizes\n/dup/a\n" if name == "v6-prefetch" else b""
    _, ours = load_metadata(create(small_tree, tmp_path, *options, stdin=stdin))
    _, theirs = load_metadata(oracle.image(name).bootstrap)
    assert ours.superblock_facts() == theirs.superblock_facts()
    assert ours.prefetch_inodes() == theirs.prefetch_inodes()
    for mine, other in zip(ours.blobs, theirs.blobs, strict=True):
        for key in ("features", "chunk_count", "uncompressed_size", "ci_uncompressed_size", "toc_size", "cipher"):
            assert getattr(mine, key) == getattr(other, key), key
    same = [
        [
            (chunk.digest, chunk.index, chunk.flags & ~1, chunk.usize, chunk.uoff, chunk.crc)
            for chunk in image.raw_chunks()
        ]
        for image in (ours, theirs)
    ]
    assert same[0] == same[1]


def test_output_does_not_depend_on_processes_nor_on_the_order_of_the_folder(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    subprocess.run(["cp", "-a", "--sparse=always", tree, tmp_path / "other" / "tree"], check=True)
    options = ("--chunk-size", "65536", "--batch-size", "4096", "--features", "blob-toc")
    one = create(tree, tmp_path / "one", "--processes", "1", *options)
    listed = os.listdir

    def backwards(path: str | bytes) -> list[str] | list[bytes]:
        """As a file system with another order gives names: those with the same names mostly give the same order."""
        return listed(path)[::-1]

    monkeypatch.setattr(os, "listdir", backwards)
    many = create(tmp_path / "other" / "tree", tmp_path / "many", "--processes", "5", *options)
    assert one.read_bytes() == many.read_bytes()
    assert [path.name for path in (tmp_path / "one/blobs").iterdir()] == [
        path.name for path in (tmp_path / "many/blobs").iterdir()
    ]


def test_repeatable_image_has_no_owners(tree: Path, tmp_path: Path) -> None:
    _, bootstrap = load_metadata(create(tree, tmp_path, "--repeatable"))
    assert not bootstrap.flags & SuperFlag.EXPLICIT_UID_GID
    ino = bootstrap.lookup(bootstrap.root_ino, b"text-4096")
    assert ino is not None and bootstrap.inode(ino).uid == os.geteuid()


def test_equal_chunks_are_stored_once_and_listed_files_first(tree: Path, tmp_path: Path) -> None:
    bootstrap = create(
        tree, tmp_path, "--prefetch-policy", "fs", "--chunk-size", "65536", stdin=b"/text-300000\n/many/\n/missing\n"
    )
    backend = make_backend("localfs", {"dir": str(tmp_path / "blobs")})
    reader = ImageReader(bootstrap, backend)
    parsed = reader.bootstrap
    root = parsed.root_ino
    inos = {name: parsed.lookup(root, name) for name in (b"text-300000", b"many", b"random-0", b"equal-chunks")}
    assert parsed.prefetch_inodes() == [inos[b"text-300000"], inos[b"many"]]
    first = parsed.extents(inos[b"text-300000"] or 0, 0, 300_000)
    assert [extent.chunk for extent in first] == [0, 1, 2, 3, 4]
    assert {extent.chunk for extent in parsed.extents(inos[b"equal-chunks"] or 0, 0, 3 * 65536)} == {
        parsed.extents(inos[b"equal-chunks"] or 0, 0, 1)[0].chunk
    }
    backend.close()


def test_lines_of_the_list_that_say_nothing_new_are_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert parse_list([b"/a/b\n", b"/a/b/c\n", b"a\n", b"\n", b" //f/./ \n", b"/a/bc\n"]) == [b"/a/b", b"/f", b"/a/bc"]
    assert [record.message for record in caplog.records] == [
        "prefetch list: /a/b/c is below an earlier path: left out",
        "prefetch list: a is no absolute path: left out",
    ]
    assert parse_list([b"/" + b"a/" * 2048, b"/a" * 2048]) == [b"/a" * 2048]
    assert caplog.records[-1].message.endswith(": a path of 4097 bytes: left out")


def test_whiteouts_are_left_out_as_the_specification_says(tmp_path: Path) -> None:
    source = tmp_path / "tree"
    source.mkdir()
    (source / ".wh.gone").touch()
    (source / ".wh..wh..opq").touch()
    os.mknod(source / "removed", 0o020000, 0)
    (source / "file").write_bytes(b"content")
    for spec, names in (
        ("oci", {".", "file", "removed"}),
        ("overlayfs", {".", "file", ".wh.gone", ".wh..wh..opq"}),
        ("none", {".", "file", "removed", ".wh.gone", ".wh..wh..opq"}),
    ):
        assert rows(create(source, tmp_path / spec, "--whiteout-spec", spec)).keys() == names


@pytest.mark.parametrize("options", [(), ("--blob-inline-meta", "--features", "blob-toc")], ids=_names)
def test_tree_without_content_becomes_an_image_without_chunks(tmp_path: Path, options: tuple[str, ...]) -> None:
    source = tmp_path / "tree"
    (source / "folder").mkdir(parents=True)
    (source / "empty").touch()
    bootstrap = create(source, tmp_path, *options)
    _, parsed = load_metadata(bootstrap)
    assert not parsed.blobs
    assert manifest.differences(manifest.walk(source), rows(bootstrap)) == []
    assert len(list((tmp_path / "blobs").iterdir())) == bool(options)


def test_command_ends_with_a_status_and_one_line_of_error(tree: Path, tmp_path: Path) -> None:
    done = run_image("create", "-D", tmp_path, "-l", "info", tree)
    assert done.returncode == 0 and done.stdout.startswith(b"373 names") and not done.stderr
    for args, status, message in (
        (("-D", str(tmp_path), "/no/such"), 1, "Error: /no/such: No such file or directory\n"),
        (("-D", str(tmp_path), "--chunk-size", "1", str(tree)), 2, "Error: --chunk-size: 0x1 must be"),
    ):
        done = run_image("create", *args)
        assert done.returncode == status and done.stderr.decode().startswith(message) and not done.stdout


def test_summary_names_what_was_made(tree: Path, tmp_path: Path) -> None:
    create(tree, tmp_path, "--output-json", str(tmp_path / "out.json"), "--digester", "sha256")
    summary = json.loads((tmp_path / "out.json").read_text())
    _, parsed = load_metadata(tmp_path / "bootstrap")
    assert summary["blobs"] == [parsed.blobs[0].blob_id]
    assert (summary["bootstrap"], summary["fs_version"], summary["compressor"]) == (
        str(tmp_path / "bootstrap"),
        "6",
        "zstd",
    )
    assert parsed.blobs[0].digester is Digester.SHA256


def test_blob_goes_to_a_named_file_or_through_a_fifo(tree: Path, expected: dict[str, Row], tmp_path: Path) -> None:
    image("create", "-b", tmp_path / "blob", "--blob-inline-meta", tree)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with open(tmp_path / "copy", "wb") as copy:
        reader = subprocess.Popen(["cat", str(fifo)], stdout=copy)
        image("create", "-b", fifo, "--blob-inline-meta", tree)
        assert reader.wait(timeout=30) == 0
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "blob").read_bytes()
    _, parsed = load_metadata(tmp_path / "blob")
    assert parsed.blobs[0].features & BlobFeature.INLINED_FS_META and parsed.blobs[0].blob_id == "blob"


def test_bootstrap_without_a_name_is_called_by_its_digest(tree: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    image("create", "-D", blobs, "--blob-id", "my-blob", tree)
    assert len(list(blobs.iterdir())) == 2 and (blobs / "my-blob").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--chunk-size", "5000"), "--chunk-size: 0x1388 must be a power of two"),
        (("--chunk-size", "0x2000000"), "--chunk-size"),
        (("--chunk-size", "much"), "must be a number of bytes"),
        (("--batch-size", "0x200000"), "--batch-size: 0x200000 must be at most the chunk size"),
        (("--chunk-size", "0x1000000", "--encrypt"), "take half of it"),
        (("--encrypt", "--repeatable"), "--encrypt cannot be used with --repeatable"),
        (("--blob-inline-meta", "-B", "x"), "cannot be used with --bootstrap"),
        (("--blob-id", "../x"), "--blob-id"),
        (("--compressor", "gzip"), "invalid choice"),
    ],
)
def test_wrong_options_are_refused_and_leave_nothing(
    tree: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    text = refused("create", "-D", tmp_path, *options, tree)
    assert message in text
    assert list(tmp_path.iterdir()) == []


def test_places_that_are_missing_are_named(tree: Path, tmp_path: Path) -> None:
    assert "one of --blob, --blob-dir" in refused("create", "-B", tmp_path / "b", tree)
    assert "no-such" in refused("create", "-D", tmp_path / "no-such", tree)
    assert "must be a folder" in refused("create", "-D", tmp_path, "/etc/hostname")
    assert list(tmp_path.iterdir()) == []


def test_attribute_of_a_name_space_that_the_format_has_not_is_named(tmp_path: Path) -> None:
    root = Node(b"", None, 0o040755)
    folder = root.children[b"folder"] = Node(b"folder", root, 0o040755)
    folder.children[b"the file"] = Node(b"the file", folder, 0o100644, xattrs={b"btrfs.compression": b"zstd"})
    with pytest.raises(FormatError, match=r"folder/the file: attribute b'btrfs.compression': is in none of the name"):
        BootstrapV6(root, [], flags=0, chunk_size=4096)


@pytest.mark.parametrize("options", [(), ("--batch-size", "0x20000")], ids=_names)
def test_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, options: tuple[str, ...]) -> None:
    source, blobs = tmp_path / "tree", tmp_path / "blobs"
    source.mkdir()
    blobs.mkdir()
    for number in range(60):
        (source / f"file{number}").write_bytes(os.urandom(40_000))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", blobs], check=True)
    try:
        text = refused("create", "-B", tmp_path / "bootstrap", "-D", blobs, *options, source)
        assert "the disk is full" in text and str(blobs) in text
        assert list(blobs.iterdir()) == []
    finally:
        subprocess.run(["umount", blobs], check=True)
    assert not (tmp_path / "bootstrap").exists()


def test_file_that_changes_while_it_is_packed_is_named(tmp_path: Path) -> None:
    source, blobs = tmp_path / "tree", tmp_path / "blobs"
    (source / "folder").mkdir(parents=True)
    blobs.mkdir()
    (source / "folder" / "file").write_bytes(b"before")
    options = BuildOptions(source=source, blob_dir=blobs)
    scanned = scan(os.fsencode(source), owners=True, whiteouts=Whiteouts.OCI)
    changes: tuple[tuple[Callable[[Path], object], str], ...] = (
        (lambda file: file.write_bytes(b"after it"), "changed while the image was made (6 bytes before, 8 now)"),
        (lambda file: file.unlink(), "cannot be read: No such file"),
        (lambda file: file.symlink_to("/etc/passwd"), "cannot be read: Too many levels of symbolic links"),
    )
    for change, message in changes:
        change(source / "folder" / "file")
        with pytest.raises(SourceError, match=re.escape("folder/file: ") + ".*" + re.escape(message)):
            build(options, scanned)
        assert list(blobs.iterdir()) == []


def test_killed_worker_is_replaced_and_the_image_is_the_same(tree: Path, tmp_path: Path) -> None:
    """Each of the first workers kills itself over its second task."""
    died = tmp_path / "died"

    class Dying(Chunker):
        def __call__(self, task: Task, slot: memoryview) -> bytes:
            if any(piece.member == b"sparse" for piece in task.pieces) and not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(task, slot)

    def packed(chunker: Chunker) -> list[tuple[bytes, bytes]]:
        scanned = scan(os.fsencode(tree), owners=True, whiteouts=Whiteouts.NONE)
        order, _ = storage_order(scanned, [])
        tasks = tasks_of(piece for node in order for piece in pieces_of(node, 4096, 0))
        with Pool(chunker, 2, slot_size(4096)) as pool:
            return [(task.pieces[0].member, bytes(data[:16])) for task, _, data in pool.run(tasks)]

    top = os.fsencode(tree)
    undisturbed = packed(Chunker(Compressor.NONE, Digester.SHA256, top=top))
    assert packed(Dying(Compressor.NONE, Digester.SHA256, top=top)) == undisturbed
    assert died.exists()


def test_task_that_kills_every_worker_is_an_error() -> None:
    def deadly(task: int, slot: memoryview) -> int:
        if task == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return task

    done = []
    with pytest.raises(ImageError, match="died 3 times over 5"), Pool(deadly, 2, 4096) as pool:
        for _, result, _ in pool.run(range(10)):
            done.append(result)
    assert done == [0, 1, 2, 3, 4]


def test_tasks_taken_in_any_order_are_all_done_when_a_worker_dies(tmp_path: Path) -> None:
    died = tmp_path / "died"

    def dying(task: int, slot: memoryview) -> int:
        if task == 2 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return task * task

    with Pool(dying, 2, 4096) as pool:
        done = dict(pool.run_any(range(7), lambda: None))
    assert done == {task: task * task for task in range(7)} and died.exists()


def test_killed_command_leaves_no_process_and_nothing_under_a_final_name(tree: Path, tmp_path: Path) -> None:
    fifo = tmp_path / "list"
    os.mkfifo(fifo)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    stream = tmp_path / "stream"
    os.mkfifo(stream)
    command = [
        sys.executable,
        "-m",
        "nydusd.cli.nydus_image",
        "create",
        "-b",
        str(stream),
        "-B",
        str(tmp_path / "boot"),
    ]
    with subprocess.Popen([*command, "--compressor", "none", str(tree)], cwd=HERE) as process:
        reader = os.open(stream, os.O_RDONLY)
        os.read(reader, 1)  # the first chunks are packed, and nobody reads the rest: it hangs in the middle
        family = descendants(process.pid)
        assert family
        process.kill()
        process.wait()
        os.close(reader)
        wait_until(lambda: not any(is_running(pid) for pid in family), "the workers to end")
    assert not (tmp_path / "boot").exists()
