"""Images that refer to a layer: gzip with random-access contexts, a plain tar, tarfs."""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.erofs import erofs_mount
from nydusd.codec.errors import CodecError
from nydusd.codec.gzip_index import GzipIndex
from nydusd.formats.model import BlobFeature
from nydusd.image.reader import load_metadata
from tests.image.build import image, refused, rows
from tests.image.test_create_tar import file, gnu_tar, tar_of
from tests.support import manifest, oracle
from tests.support.daemon import Daemon
from tests.support.manifest import Row

GZIP_LAYER = next(path for path in oracle.image("v6-targz-ref").blobs.iterdir() if path.read_bytes()[:2] == b"\x1f\x8b")
(TAR_LAYER,) = oracle.image("v6-tarfs").blobs.iterdir()


def refer(layer: Path, out: Path, kind: str, *options: str) -> Path:
    """An image that refers to a layer, which is put beside what was made, under its id. The bootstrap's path."""
    blobs = out / "blobs"
    blobs.mkdir(parents=True)
    where = [] if "--blob-inline-meta" in options else ["-B", str(out / "bootstrap")]
    image("create", "-t", kind, *where, "-D", blobs, *options, layer)
    bootstrap = out / "bootstrap" if where else next(blobs.iterdir())
    _, parsed = load_metadata(bootstrap)
    for blob in parsed.blobs:
        shutil.copyfile(layer, blobs / blob.blob_id)
    return bootstrap


@pytest.mark.parametrize("options", [(), ("--features", "blob-toc"), ("--chunk-size", "4096"), ("--blob-inline-meta",)])
def test_gzip_layer_is_read_through_contexts(tmp_path: Path, options: tuple[str, ...]) -> None:
    bootstrap = refer(GZIP_LAYER, tmp_path, "targz-ref", *options)
    found = rows(bootstrap, tmp_path / "blobs")
    assert manifest.differences(manifest.load(oracle.SMALL / "manifest-tar.jsonl"), whole(found)) == []
    _, parsed = load_metadata(bootstrap)
    wanted = BlobFeature.ALIGNED | BlobFeature.CHUNK_INFO_V2 | BlobFeature.ZRAN | BlobFeature.SEPARATE
    assert parsed.blobs[0].features & wanted == wanted and parsed.blobs[0].blob_id == GZIP_LAYER.name


def whole(found: dict[str, Row]) -> dict[str, Row]:
    """Whole seconds, as the manifest of tars has them."""
    return {path: row | {"mtime_ns": int(str(row["mtime_ns"])) // 10**9 * 10**9} for path, row in found.items()}


def test_structure_is_that_of_the_reference_builder(tmp_path: Path) -> None:
    _, ours = load_metadata(refer(GZIP_LAYER, tmp_path, "targz-ref"))
    _, theirs = load_metadata(oracle.image("v6-targz-ref").bootstrap)
    keys = (
        "features",
        "chunk_count",
        "compressed_size",
        "uncompressed_size",
        "compressor",
        "digester",
        "ci_compressor",
    )
    for key in keys:
        assert getattr(ours.blobs[0], key) == getattr(theirs.blobs[0], key), key
    same = [
        [(chunk.digest, chunk.flags, chunk.uoff, chunk.usize, chunk.crc) for chunk in one.raw_chunks()]
        for one in (ours, theirs)
    ]
    assert same[0] == same[1]


def test_daemon_reads_the_layer(tmp_path: Path) -> None:
    bootstrap = refer(GZIP_LAYER, tmp_path, "targz-ref", "--features", "blob-toc")
    with Daemon(bootstrap, tmp_path / "blobs") as daemon:
        found = whole(manifest.walk(daemon.mountpoint))
    assert manifest.differences(manifest.load(oracle.SMALL / "manifest-tar.jsonl"), found) == []


def test_plain_tar_is_referred_to_without_contexts(tree: Path, expected: dict[str, Row], tmp_path: Path) -> None:
    gnu_tar(tree, tmp_path / "layer.tar", "--format=pax", "--xattrs", "--xattrs-include=*")
    bootstrap = refer(tmp_path / "layer.tar", tmp_path / "out", "targz-ref")
    wanted = {path: row for path, row in expected.items() if path != "socket"}
    assert manifest.differences(wanted, rows(bootstrap)) == []
    _, parsed = load_metadata(bootstrap)
    assert not parsed.blobs[0].features & BlobFeature.ZRAN


def test_tarfs_is_mounted_by_the_kernel_and_read_by_us(tmp_path: Path) -> None:
    bootstrap = refer(TAR_LAYER, tmp_path, "tar-tarfs")
    wanted = manifest.load(oracle.SMALL / "manifest-tar.jsonl")
    assert manifest.differences(wanted, whole(rows(bootstrap))) == []
    assert [path.name for path in (tmp_path / "blobs").iterdir()] == [TAR_LAYER.name]
    point = tmp_path / "mnt"
    point.mkdir()
    with erofs_mount(bootstrap, [TAR_LAYER], point):
        assert manifest.differences(wanted, whole(manifest.walk(point))) == []


def test_what_cannot_be_referred_to_is_refused(tree: Path, tmp_path: Path) -> None:
    gnu_tar(tree, tmp_path / "sparse.tar", "--format=pax", "--sparse")
    where = ("-B", tmp_path / "bootstrap", "-D", tmp_path)
    assert "sparse: a sparse file" in refused("create", "-t", "targz-ref", *where, tmp_path / "sparse.tar")
    assert "sparse: a sparse file" in refused("create", "-t", "tar-tarfs", *where, tmp_path / "sparse.tar")
    assert "a plain tar is needed" in refused("create", "-t", "tar-tarfs", *where, GZIP_LAYER)
    (tmp_path / "cut.gz").write_bytes(GZIP_LAYER.read_bytes()[:-9])
    assert "it is cut" in refused("create", "-t", "targz-ref", *where, tmp_path / "cut.gz")
    for option in (("-v", "5"), ("--encrypt",), ("--batch-size", "4096"), ("--blob-id", "x")):
        assert "cannot be used with --type targz-ref" in refused(
            "create", "-t", "targz-ref", *where, *option, GZIP_LAYER
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.gz", "sparse.tar"]


def test_layer_without_content_needs_no_blob(tmp_path: Path) -> None:
    (tmp_path / "layer.tgz").write_bytes(gzip.compress(tar_of(file("empty", b""))))
    for kind in ("targz-ref", "tar-tarfs"):
        layer = tmp_path / "layer.tgz"
        if kind == "tar-tarfs":
            layer = tmp_path / "layer.tar"
            layer.write_bytes(tar_of(file("empty", b"")))
        bootstrap = refer(layer, tmp_path / kind, kind)
        assert rows(bootstrap).keys() == {".", "empty"} and not list((tmp_path / kind / "blobs").iterdir())


@settings(max_examples=15)
@given(
    sizes=st.lists(st.integers(0, 70_000), min_size=1, max_size=12),
    cut=st.integers(0, 200_000),
    level=st.integers(0, 9),
    piece=st.sampled_from([1000, 65536, 1 << 20]),
)
def test_contexts_of_any_gzip_stream_give_the_plain_bytes(sizes: list[int], cut: int, level: int, piece: int) -> None:
    """Members of any level, cut anywhere; every range of the plain stream can be inflated from its context alone."""
    import tempfile

    from nydusd.codec.zran import inflate_context
    from nydusd.formats.blob_meta import CONTEXT_SIZE, zran_context
    from nydusd.image.zran import ZranContexts

    plain = b"".join(os.urandom(size // 3) + b"words and words " * (size // 24) for size in sizes) or b"x"
    cut = min(cut, len(plain))
    layer = gzip.compress(plain[:cut], level) + gzip.compress(plain[cut:], 6) + bytes(100)

    def pieces() -> Iterator[bytes]:
        for at in range(0, len(layer), piece):
            yield layer[at : at + piece]

    index = GzipIndex()
    assert b"".join(index.inflate(pieces())) == plain
    with tempfile.TemporaryFile() as tar:
        tar.write(plain)
        tar.flush()
        contexts = ZranContexts(index.borders, tar.fileno())
        places = [(at, min(30_000, len(plain) - at)) for at in range(0, len(plain), 31_000)]
        found = [contexts.place(at, size) for at, size in places]
        packed = contexts.pack()
    for (at, size), (number, offset, coff, csize) in zip(places, found, strict=True):
        ctx = zran_context(packed, number)
        begin = CONTEXT_SIZE * contexts.count + ctx.dict_offset
        data = layer[ctx.in_offset : ctx.in_offset + ctx.in_len]
        out = inflate_context(data, ctx.ctx_byte, ctx.ctx_bits, packed[begin : begin + ctx.dict_size], ctx.out_len)
        assert out[offset : offset + size] == plain[at : at + size]
        assert ctx.in_offset <= coff and coff + csize <= ctx.in_offset + ctx.in_len


def test_blocks_without_number_in_a_gzip_stream_are_not_all_noted() -> None:
    """Each of 10 bits and without output."""
    unit = sum(0b010 << 10 * place for place in range(4)).to_bytes(5, "little")
    layer = gzip.compress(b"", mtime=0)[:10] + unit * 5000 + b"\x03\0" + bytes(8)
    index = GzipIndex()
    assert b"".join(index.inflate(iter([layer]))) == b"" == gzip.decompress(layer)
    assert len(index.borders) < 500
    assert [border.in_offset for border in (index.borders[0], index.borders[-1])] == [10, len(layer)]


def test_damaged_gzip_stream_is_an_error() -> None:
    layer = bytearray(gzip.compress(os.urandom(50_000)))
    layer[20_000] ^= 0xFF
    with pytest.raises(CodecError, match="gzip"):
        list(GzipIndex().inflate(iter([bytes(layer)])))
