"""`nydus-image create` from tars: every form that a tar may have, and layers that are broken or hostile."""

from __future__ import annotations

import gzip
import io
import os
import re
import struct
import subprocess
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from nydusd.errors import NydusError
from nydusd.image.chunking import pieces_of
from nydusd.image.create import create as make_image
from nydusd.image.node import Node, Segment
from nydusd.image.options import BuildOptions, Source
from nydusd.image.tar.spool import TarFile
from tests.image.build import create, image, refused, rows
from tests.support import manifest
from tests.support.manifest import Row


@pytest.fixture(scope="module")
def tar_rows(expected: dict[str, Row]) -> dict[str, Row]:
    """The manifest of `tree` without what a tar cannot hold: the socket."""
    return {path: row for path, row in expected.items() if path != "socket"}


def gnu_tar(tree: Path, to: Path, *options: str) -> None:
    command: list[str | Path] = [
        "tar",
        "-C",
        tree,
        "-cf",
        to,
        "--numeric-owner",
        "--warning=no-file-ignored",
        *options,
        ".",
    ]
    subprocess.run(command, check=True)


def whole_seconds(rows_by_path: dict[str, Row]) -> dict[str, Row]:
    return {path: row | {"mtime_ns": int(str(row["mtime_ns"])) // 10**9 * 10**9} for path, row in rows_by_path.items()}


@pytest.mark.parametrize("sparse", ["0.0", "0.1", "1.0", None])
def test_pax_tar_gives_the_tree_with_attributes_and_nanoseconds(
    tree: Path, tar_rows: dict[str, Row], tmp_path: Path, sparse: str | None
) -> None:
    options = ["--sparse", f"--sparse-version={sparse}"] if sparse else []
    gnu_tar(tree, tmp_path / "layer.tar", "--format=pax", "--xattrs", "--xattrs-include=*", *options)
    found = rows(create(tmp_path / "layer.tar", tmp_path, "--type", "tar-rafs"))
    assert manifest.differences(tar_rows, found) == []


@pytest.mark.parametrize("options", [(), ("--sparse",)], ids=["plain", "sparse"])
def test_gnu_tar_with_long_names_gives_the_tree(
    tree: Path, tar_rows: dict[str, Row], tmp_path: Path, options: tuple[str, ...]
) -> None:
    gnu_tar(tree, tmp_path / "layer.tar", "--format=gnu", *options)
    found = rows(create(tmp_path / "layer.tar", tmp_path, "--type", "tar-rafs", "--chunk-size", "65536"))
    wanted = {path: {key: row[key] for key in row if key != "xattrs"} for path, row in whole_seconds(tar_rows).items()}
    assert manifest.differences(wanted, found) == []


def test_blob_of_a_tar_is_that_of_the_folder(tree: Path, tmp_path: Path) -> None:
    gnu_tar(tree, tmp_path / "layer.tar", "--format=pax")
    create(tmp_path / "layer.tar", tmp_path / "tar", "--type", "tar-rafs")
    create(tree, tmp_path / "folder")
    names = [[path.name for path in (tmp_path / which / "blobs").iterdir()] for which in ("tar", "folder")]
    assert names[0] == names[1]


def _compressed(data: bytes) -> dict[str, bytes]:
    half = len(data) // 2 // 512 * 512
    return {
        "gzip": gzip.compress(data, 1),
        "members": gzip.compress(data[:half], 1) + gzip.compress(b"") + gzip.compress(data[half:], 1) + bytes(100),
        "zstd": zstandard.compress(data),
        "frames": _zstd(data[:half]) + b"\x50\x2a\x4d\x18\4\0\0\0skip" + zstandard.compress(data[half:]),
    }


def _zstd(data: bytes) -> bytes:
    """A frame without its length in front, and with a checksum behind it."""
    packer = zstandard.ZstdCompressor(write_checksum=True, write_content_size=False).compressobj()
    return packer.compress(data) + packer.flush()


def _names(count: int) -> bytes:
    return tar_of(*(file(f"name-{number}", b"") for number in range(count)), form=tarfile.USTAR_FORMAT)


@pytest.mark.parametrize("kind", ["gzip", "members", "zstd", "frames"])
@pytest.mark.parametrize("pipe", [False, True])
def test_compressed_and_piped_layers_are_inflated(tree: Path, tmp_path: Path, kind: str, pipe: bool) -> None:
    gnu_tar(tree / "many", tmp_path / "layer.tar", "--format=pax")
    expected = {
        "./" + path: row for path, row in rows(create(tmp_path / "layer.tar", tmp_path, "-t", "tar-rafs")).items()
    }
    layer = tmp_path / "layer"
    data = _compressed((tmp_path / "layer.tar").read_bytes())[kind]
    out = tmp_path / "out"
    if pipe:
        os.mkfifo(layer)
        with subprocess.Popen(["dd", f"of={layer}", "bs=3000", "status=none"], stdin=subprocess.PIPE) as writer:
            assert writer.stdin is not None
            feeder = threading.Thread(target=writer.communicate, args=(data,))
            feeder.start()
            bootstrap = create(layer, out, "-t", "targz-rafs")
            feeder.join()
    else:
        layer.write_bytes(data)
        bootstrap = create(layer, out, "-t", "targz-rafs")
    found = {"./" + path: row for path, row in rows(bootstrap).items()}
    assert manifest.differences(expected, found) == []
    assert [path.name for path in (out / "blobs").iterdir()] == [path.name for path in (tmp_path / "blobs").iterdir()]


Entry = tuple[dict[str, object], bytes]


def tar_of(*entries: Entry, form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of members given by the attributes of their `TarInfo`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as tar:
        for attributes, data in entries:
            info = tarfile.TarInfo()
            for key, value in attributes.items():
                setattr(info, key, value)
            info.size = len(data) if "size" not in attributes else info.size
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def file(name: str, data: bytes = b"content", **more: object) -> Entry:
    return {"name": name, **more}, data


def folder(name: str, **more: object) -> Entry:
    return {"name": name, "type": tarfile.DIRTYPE, "mode": 0o755, **more}, b""


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> Entry:
    return {"name": name, "type": kind, "linkname": target}, b""


def contents(tmp_path: Path, data: bytes, *options: str) -> dict[str, Row]:
    (tmp_path / "layer.tar").write_bytes(data)
    return rows(create(tmp_path / "layer.tar", tmp_path, "-t", "tar-rafs", *options))


_ODD_VALUE = b"\0a\n12 b=c\n\0\xff="
ODD_ATTRIBUTES = {
    "security.capability": (b"\1\0\0\2" + bytes(16)).hex(),
    "security.selinux": b"u:r:t\0".hex(),
    "user.b=c": b"hello".hex(),
    "user.odd": _ODD_VALUE.hex(),
}


def odd_attributes(name: str) -> bytes:
    """A tar of a file with these attributes."""

    def record(key: bytes, value: bytes) -> bytes:
        body = b" " + key + b"=" + value + b"\n"
        length = len(body) + 1
        while len(b"%d" % length) + len(body) != length:
            length += 1
        return b"%d" % length + body

    pax = record(b"SCHILY.xattr.user.odd", _ODD_VALUE)
    pax += record(b"SCHILY.xattr.security.capability", b"\1\0\0\2" + bytes(16))
    pax += record(b"LIBARCHIVE.xattr.user.b%3Dc", b"aGVsbG8") + record(b"RHT.security.selinux", b"u:r:t\0")
    header = tarfile.TarInfo("PaxHeader")
    header.type, header.size = b"x", len(pax)
    return header.tobuf(tarfile.USTAR_FORMAT) + pax + bytes(-len(pax) % 512) + tar_of(file(name))


def test_attributes_with_newlines_and_nuls_are_kept(tmp_path: Path) -> None:
    assert contents(tmp_path, odd_attributes("odd"))["odd"]["xattrs"] == ODD_ATTRIBUTES


def test_later_members_replace_earlier_ones_and_folders_keep_their_content(tmp_path: Path) -> None:
    found = contents(
        tmp_path,
        tar_of(
            file("a/file", b"old and longer"),
            folder("a", mode=0o700),
            file("./a//file", b"new"),
            file("was-folder/inside"),
            file("was-folder", b"now a file"),
            link("was-link", "/nowhere"),
            folder("was-link"),
            file("was-link/inside", b"x"),
            folder(".", mode=0o711, mtime=77),
        ),
    )
    assert found.keys() == {".", "a", "a/file", "was-folder", "was-link", "was-link/inside"}
    assert (found["a"]["mode"], found["a/file"]["size"], found["was-folder"]["size"]) == ("0o40700", 3, 10)
    assert (found["."]["mode"], found["."]["mtime_ns"]) == ("0o40711", 77 * 10**9)


def test_hard_links_share_an_inode_across_folders(tmp_path: Path) -> None:
    found = contents(
        tmp_path,
        tar_of(
            file("usr/bin/a"),
            link("bin/b", "usr/bin/a", tarfile.LNKTYPE),
            link("other/c", "./bin/b", tarfile.LNKTYPE),
            link("s", "nowhere"),
            link("s2", "s", tarfile.LNKTYPE),
            file("usr/bin/a", b"replaced: the others keep the old content"),
        ),
    )
    assert found["bin/b"]["nlink"] == 2 and found["other/c"]["same_inode_as"] == "bin/b"
    assert found["usr/bin/a"]["nlink"] == 1 and found["s"]["nlink"] == 2 and found["s2"]["target"] == "nowhere"


def test_names_are_relative_to_the_root_and_symlinks_on_the_way_are_followed_inside(tmp_path: Path) -> None:
    found = contents(
        tmp_path,
        tar_of(
            folder("usr"),
            folder("usr/lib"),
            link("lib", "usr/lib"),
            link("up", "../../../usr"),
            link("absolute", "/usr/lib"),
            file("lib/in-lib"),
            file("up/in-usr"),
            file("/absolute/also-in-lib"),
            link("usr/hard", "lib/in-lib", tarfile.LNKTYPE),
        ),
    )
    assert {"usr/lib/in-lib", "usr/in-usr", "usr/lib/also-in-lib"} < found.keys()
    assert found["usr/lib/in-lib"]["nlink"] == 2 and found["lib"]["target"] == "usr/lib"


def test_marks_of_removed_files_and_devices_are_kept(tmp_path: Path) -> None:
    device: Entry = ({"name": "null", "type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 300}, b"")
    found = contents(
        tmp_path,
        tar_of(
            file(".wh.gone", b""),
            file("d/.wh..wh..opq", b""),
            device,
            ({"name": "pipe", "type": tarfile.FIFOTYPE}, b""),
            ({"name": "old-folder/", "type": tarfile.AREGTYPE}, b""),
        ),
    )
    wanted = {".", ".wh.gone", "d", "d/.wh..wh..opq", "null", "pipe", "old-folder"}
    assert found.keys() == wanted
    assert found["null"]["rdev"] == [1, 300] and str(found["old-folder"]["mode"]).startswith("0o40")


def test_files_about_a_stargz_layer_are_left_out_of_such_layers_only(tmp_path: Path) -> None:
    names = ("stargz.index.json", ".prefetch.landmark", ".no.prefetch.landmark")
    layer = tar_of(*(file(name) for name in names), file("d/.prefetch.landmark"), file("other"))
    assert contents(tmp_path, layer).keys() == {".", *names, "d", "d/.prefetch.landmark", "other"}
    found = rows(create(tmp_path / "layer.tar", tmp_path / "stargz", "-t", "estargz-rafs"))
    assert found.keys() == {".", "d", "d/.prefetch.landmark", "other"}
    (tmp_path / "layer.tar").write_bytes(tar_of(folder(".prefetch.landmark")))
    assert rows(create(tmp_path / "layer.tar", tmp_path / "folder", "-t", "estargz-rafs")).keys() == {
        ".",
        ".prefetch.landmark",
    }


def test_numbers_beyond_octal_and_times_before_1970_are_read(tmp_path: Path) -> None:
    data = tar_of(file("big", uid=3_000_000_000, gid=70_000, mtime=-5), form=tarfile.GNU_FORMAT)
    data += tar_of(file("pax", mtime=-1.25, uid=4_000_000_000))  # and tars that were joined are read to the end
    found = contents(tmp_path, data)
    assert (found["big"]["uid"], found["big"]["mtime_ns"]) == (3_000_000_000, -5 * 10**9 + (1 << 64) * 10**9)
    assert (found["pax"]["uid"], found["pax"]["mtime_ns"]) == (4_000_000_000, (-2 + (1 << 64)) * 10**9 + 750_000_000)


def _patched(data: bytes, at: int, new: bytes) -> bytes:
    block = bytearray(data)
    block[at : at + len(new)] = new
    start = at // 512 * 512
    block[start + 148 : start + 156] = b" " * 8
    block[start + 148 : start + 156] = b"%06o\0 " % sum(block[start : start + 512])
    return bytes(block)


def sparse_1_0(text: bytes, size: int, name: str = "thin") -> bytes:
    headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": name,
        "GNU.sparse.realsize": str(size),
    }
    return tar_of(file("x", text.ljust(512, b"\0") + b"data", pax_headers=headers))


def sparse_gnu(*pieces: tuple[int, int]) -> bytes:
    """A sparse file of GNU tar's old form: 600 bytes, of which the tar has 4."""
    data = tar_of(file("thin", b"data"), form=tarfile.GNU_FORMAT)
    sparse = b"".join(
        (at | 1 << 95).to_bytes(12, "big") + (length % (1 << 96)).to_bytes(12, "big")
        if length < 0
        else b"%011o\0%011o\0" % (at, length)
        for at, length in pieces
    )
    return _patched(_patched(_patched(data, 386, sparse), 483, b"%011o\0" % 600), 156, b"S")


HOSTILE: list[tuple[str, Callable[[], bytes], str]] = [
    ("climbs out", lambda: tar_of(file("a/../../etc/passwd")), "leads out of the image"),
    ("link climbs out", lambda: tar_of(file("a"), link("b", "../a", tarfile.LNKTYPE)), "b: the path ../a leads out"),
    (
        "link to nothing",
        lambda: tar_of(link("b", "no/such", tarfile.LNKTYPE)),
        "b: a hard link to no/such, which is not",
    ),
    ("link to folder", lambda: tar_of(folder("d"), link("b", "d", tarfile.LNKTYPE)), "b: a hard link to the folder d"),
    ("link to itself", lambda: tar_of(link("b", "b", tarfile.LNKTYPE)), "b: a hard link to b, which is not"),
    ("through a file", lambda: tar_of(file("f"), file("f/x")), "f/x: f is on the way to it and no folder"),
    ("links in a circle", lambda: tar_of(link("a", "b"), link("b", "a"), file("a/x")), "a/x: more than 40 symlinks"),
    ("long name", lambda: tar_of(file("n" * 256)), "a name of 256 bytes"),
    ("long path", lambda: tar_of(file("d/" * 3000 + "f")), "a path of 6001 bytes"),
    ("root is a file", lambda: tar_of(file("./.")), "the root of the image must be a folder"),
    ("empty target", lambda: tar_of(link("s", "")), "s: a symlink without target"),
    ("cut in data", lambda: tar_of(file("big", bytes(5000)))[:2000], "big: the tar ends inside it, after"),
    ("cut in header", lambda: tar_of(file("a"))[:100], "ends inside a header"),
    (
        "claims a lot",
        lambda: _patched(tar_of(file("x"), form=tarfile.USTAR_FORMAT), 124, b"77777777777\0"),
        "x: the tar ends",
    ),
    (
        "negative size",
        lambda: _patched(tar_of(file("x"), form=tarfile.GNU_FORMAT), 124, b"\xff" * 12),
        "x: a size of -1",
    ),
    ("no octal", lambda: _patched(tar_of(file("x")), 124, b"12345x78901\0"), "no octal number"),
    ("damaged", lambda: tar_of(file("x"))[:3] + b"?" + tar_of(file("x"))[4:], "wrong checksum"),
    (
        "unknown type",
        lambda: _patched(tar_of(file("x"), form=tarfile.USTAR_FORMAT), 156, b"M"),
        "x: a member of type b'M'",
    ),
    ("no tar", lambda: b"PK\3\4" + bytes(range(256)) * 4, "no tar, or damaged"),
    (
        "pax without end",
        lambda: _patched(tar_of(file("x", pax_headers={"a": "b"})), 124, b"00000000005\0"),
        "extended header",
    ),
    ("only a long name", lambda: tar_of(file("n" * 200), form=tarfile.GNU_FORMAT)[:1024], "before its member"),
    (
        "huge long name",
        lambda: _patched(tar_of(file("n" * 200), form=tarfile.GNU_FORMAT), 124, b"00010000000\0"),
        "at most 65536",
    ),
    ("many pieces", lambda: sparse_1_0(b"99999999999999\n", 5), "thin: sparse map: 99999999999999 pieces"),
    ("endless map", lambda: sparse_1_0(b"3\n1\n1\n2\n1\n3", 5), "thin: sparse map: it does not end"),
    ("pieces overlap", lambda: sparse_1_0(b"2\n0\n2\n1\n2\n", 5), "thin: sparse map: 2 bytes at 1 of 5"),
    ("piece beyond", lambda: sparse_1_0(b"1\n4\n4\n", 5), "thin: sparse map: 4 bytes at 4 of 5"),
    ("piece not stored", lambda: sparse_1_0(b"1\n0\n90\n", 100), "thin: sparse map: 90 bytes at 0 of 100, 4 of them"),
    (
        "piece of negative length",
        lambda: sparse_gnu((0, 4), (4, -4), (0, 4)),
        "thin: sparse map: -4 bytes at 4 of 600",
    ),
    (
        "sparse files without end",
        lambda: sparse_1_0(b"0\n", 1 << 43, "a") + sparse_1_0(b"0\n", 1 << 43, "b") + sparse_1_0(b"0\n", 1 << 21),
        "thin: the sparse files up to it have more than 16777216 chunks",
    ),
    (
        "deep by symlinks",
        lambda: tar_of(
            folder("a/" * 1500), link("s", "a/" * 1500), folder("s/" + "b/" * 546), file("s/" + "b/" * 547 + "f")
        ),
        "f: it is more than 2047 levels deep",
    ),
    (
        "long ways of symlinks",
        lambda: tar_of(folder("a"), link("s", "a/../" * 800 + "a"), *(file(f"s/{number}") for number in range(900))),
        "the symlinks on the ways to it and to the members before it are too many steps",
    ),
    ("gzip cut", lambda: gzip.compress(tar_of(file("x", os.urandom(3000))))[:-20], "the gzip stream ends too early"),
    ("gzip damaged", lambda: gzip.compress(os.urandom(3000))[:20] + bytes(2990), "gzip stream"),
    ("gzip and more", lambda: gzip.compress(tar_of(file("x"))) + b"x", "bytes behind the gzip stream"),
    ("zstd cut at once", lambda: _zstd(_names(2000))[:50], "the zstd stream ends too early"),
    ("zstd cut between members", lambda: _zstd(_names(2000))[:2600], "the zstd stream ends too early"),
    ("zstd cut before its checksum", lambda: _zstd(_names(2000))[:-4], "the zstd stream ends too early"),
    ("zstd cut in the second frame", lambda: _zstd(_names(1)) + _zstd(_names(1))[:3], "the zstd stream ends too early"),
    ("zstd damaged", lambda: _zstd(_names(2000))[:-4] + bytes(4), "the zstd stream is damaged"),
    ("empty", lambda: b"", "layer.tar: it is empty"),
    (
        "too many chunks",
        lambda: sparse_1_0(b"0\n", 1 << 50),
        "thin: 1125899906842624 bytes are more than 16777216 chunks",
    ),
]


@pytest.mark.parametrize(
    ("make", "message"), [(case[1], case[2]) for case in HOSTILE], ids=[case[0] for case in HOSTILE]
)
def test_hostile_tar_is_refused_by_name_and_leaves_nothing(
    tmp_path: Path, make: Callable[[], bytes], message: str
) -> None:
    layer, out = tmp_path / "layer.tar", tmp_path / "out"
    layer.write_bytes(make())
    out.mkdir()
    options = BuildOptions(source=layer, kind=Source.TAR_RAFS, blob_dir=out, bootstrap=out / "bootstrap")
    with pytest.raises(NydusError, match=re.escape(message)):
        make_image(options)
    assert list(out.iterdir()) == []


def test_folder_at_the_deepest_level_can_be_read(tmp_path: Path) -> None:
    found = contents(tmp_path, tar_of(folder("a/" * 1500), link("s", "a/" * 1500), folder("s/" + "b/" * 547)))
    assert max(path.count("/") for path in found) == 2046


def test_map_of_many_pieces_is_gone_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk image: as many pieces as chunks."""
    looked = 0

    class Segments(tuple[Segment, ...]):
        def __getitem__(self, index: int) -> Segment:  # type: ignore[override]
            nonlocal looked
            looked += 1
            return super().__getitem__(index)

        def __iter__(self) -> Iterator[Segment]:
            return (self[index] for index in range(len(self)))

    node = Node(b"disk", None, 0o100644)
    node.size, node.segments = 4096 * 3000, Segments((4096 * n + 100, 10, 10 * n) for n in range(3000))
    assert [piece.segments for piece in pieces_of(node, 4096, 0)] == [
        ((4096 * n + 100, 10, 10 * n),) for n in range(3000)
    ]
    assert looked < 10 * 3000


def test_layer_of_tiny_gzip_members_is_not_copied_for_each_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from isal import isal_zlib

    given = 0
    new = isal_zlib.decompressobj

    class Counted:
        def __init__(self, bits: int) -> None:
            self._stream = new(bits)

        def __getattr__(self, name: str) -> object:
            return getattr(self._stream, name)

        def decompress(self, data: bytes, most: int) -> bytes:
            nonlocal given
            given += len(data)
            return bytes(self._stream.decompress(data, most))

    monkeypatch.setattr(isal_zlib, "decompressobj", Counted)
    plain = tar_of(file("x", bytes(range(256)) * 40))
    layer = b"".join(gzip.compress(plain[at : at + 1]) for at in range(len(plain)))
    (tmp_path / "layer").write_bytes(layer)
    with TarFile(tmp_path / "layer", tmp_path) as tar:
        assert os.pread(tar.fd, tar.size + 1, 0) == plain
    assert len(layer) > 200_000 and given < len(layer) * 500


def test_attribute_whose_name_has_a_nul_is_refused(tmp_path: Path) -> None:
    data = odd_attributes("file").replace(b"SCHILY.xattr.user.odd=", b"SCHILY.xattr.user.o\0d=")
    for version in ("5", "6"):
        (tmp_path / "layer.tar").write_bytes(data)
        where = ("-B", tmp_path / "boot", "-D", tmp_path)
        text = refused("create", "-t", "tar-rafs", "-v", version, *where, tmp_path / "layer.tar")
        assert text.startswith("file: attribute b'user.o\\x00d': a name of ")


def test_bomb_of_zeros_needs_no_disk(tmp_path: Path) -> None:
    """A gzip of 64 MiB of zeros: the plain tar is all hole."""
    size = 64 << 20
    header = tarfile.TarInfo("zeros")
    header.size = size
    packer = zlib.compressobj(9, wbits=31)
    data = packer.compress(header.tobuf()) + b"".join(packer.compress(bytes(1 << 20)) for _ in range(size >> 20))
    data += packer.compress(bytes(1024)) + packer.flush()
    assert struct.unpack("<I", data[-4:])[0] == size + 1536 and len(data) < 1 << 20
    (tmp_path / "layer.tgz").write_bytes(data)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", blobs], check=True)
    try:
        image("create", "-t", "targz-rafs", "-B", tmp_path / "bootstrap", "-D", blobs, tmp_path / "layer.tgz")
        (blob,) = blobs.iterdir()
        assert blob.stat().st_size < 10_000
    finally:
        subprocess.run(["umount", blobs], check=True)
