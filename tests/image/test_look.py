"""`nydus-image` check, inspect and stat."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from nydusd.codec.compress import Buffer
from nydusd.errors import FormatError
from nydusd.formats.chunk_info import CHUNK_INFO
from nydusd.formats.model import ChunkRecord, RawChunk
from nydusd.formats.rafs_v5 import RafsV5
from nydusd.formats.rafs_v6 import RafsV6
from nydusd.formats.walk import paths_of
from nydusd.formats.write.rafs_v6_split import are_listed
from nydusd.image.errors import ImageError
from nydusd.image.reader import ImageReader, load_metadata
from nydusd.image.unpack import paths
from nydusd.storage.backend import make_backend
from nydusd.storage.cache.decode import ChunkDecoder
from tests.image.build import create, image, refused
from tests.support import oracle
from tests.support.patched import PatchedV5

NAMES = [one.name for one in oracle.images() if ":" not in one.name]


@pytest.mark.parametrize("name", NAMES)
def test_images_of_the_reference_are_valid(name: str) -> None:
    packed = oracle.image(name)
    text = image("check", packed.bootstrap, "-D", packed.blobs)
    assert text.startswith("RAFS filesystem metadata is valid") and "chunks read and verified" in text


def test_every_kind_of_damage_is_found(tree: Path, tmp_path: Path) -> None:
    bootstrap = create(tree, tmp_path, "-v", "5")
    (blob,) = (tmp_path / "blobs").iterdir()
    good = blob.read_bytes()
    blob.write_bytes(good[:5000] + b"?" + good[5001:])
    assert f"blob {blob.name} chunk" in refused("check", bootstrap, "-D", tmp_path / "blobs")
    image("check", "--bootstrap", bootstrap)
    data = bytearray(bootstrap.read_bytes())
    at = bytes(data).rindex(b"text-65537") - 128
    data[at] ^= 1
    bootstrap.write_bytes(data)
    assert "inode.digest" in refused("check", bootstrap)
    bootstrap.write_bytes(data[:-8])
    assert str(bootstrap) in refused("check", bootstrap)


def shared_entries(tmp_path: Path) -> Path:
    """Metadata of which 150 folders have the entries of one: 90,000 names in a file of 200 KB."""
    tree = tmp_path / "tree"
    (tree / "all").mkdir(parents=True)
    for number in range(600):
        (tree / "all" / f"{number:03}{'n' * 30}").write_bytes(b"x")
    for number in range(150):
        (tree / f"{number:03}").mkdir()
    bootstrap = create(tree, tmp_path)
    data = bytearray(bootstrap.read_bytes())
    image = RafsV6(memoryview(bytes(data)), "tree")
    meta = int.from_bytes(data[1024 + 40 : 1024 + 44], "little") * 4096

    def at(name: bytes) -> int:
        ino = image.lookup(image.root_ino, name)
        assert ino is not None
        return meta + 32 * ino

    blocks = data[at(b"all") + 16 : at(b"all") + 20]
    first = int.from_bytes(blocks, "little") * 4096
    (nid,) = struct.unpack_from("<Q", data, first + 24)
    assert data[first + 8] == data[first + 20] - 1, "'.' is the first name"
    for number in range(150):
        struct.pack_into("<H", data, at(b"%03d" % number), 1)
        struct.pack_into("<Q", data, at(b"%03d" % number) + 8, 6 * 4096)
        data[at(b"%03d" % number) + 16 : at(b"%03d" % number) + 20] = blocks
    # An entry that is no '.' may be in any of them.
    struct.pack_into("<Q", data, first, nid)
    data[first + int.from_bytes(data[first + 8 : first + 10], "little")] = ord("-")
    bootstrap.write_bytes(data)
    return bootstrap


def test_names_in_no_proportion_to_the_metadata_are_refused(tmp_path: Path) -> None:
    """They are a product: some megabytes would fill any memory."""
    bootstrap = shared_entries(tmp_path)
    assert "tree: inode" in (text := refused("check", bootstrap)) and "have room for" in text
    _, parsed = load_metadata(bootstrap)
    assert isinstance(parsed, RafsV6)
    with pytest.raises(ImageError, match="more names up to it than the metadata has room for"):
        list(paths(parsed))
    with pytest.raises(FormatError, match="more entries than there is room for"):
        paths_of(parsed, {1 << 40})
    with pytest.raises(FormatError, match="more entries below inode"):
        are_listed(memoryview(bootstrap.read_bytes()), parsed, "tree")


def test_attributes_in_no_proportion_to_the_metadata_are_refused(tmp_path: Path) -> None:
    v5 = PatchedV5()
    for path in (b"dup/a", b"dup/b", b"sizes/1048577"):
        area = v5.after_name(path)
        size = len(v5.data) - 8 - area - 8 & ~7
        v5.put(v5.record_at(path) + 80, "Q", 4)
        v5.put(v5.record_at(path) + 64, "Q", 0)
        v5.put(v5.record_at(path) + 96, "I", 0)
        v5.put(area, "Q", size)
        v5.data[area + 8 : area + 19] = (size - 4).to_bytes(4, "little") + b"user.x\0"
    (tmp_path / "boot").write_bytes(v5.data)
    assert "bytes have room for" in refused("check", tmp_path / "boot")


def test_neighbours_that_are_far_apart_in_a_blob_are_not_read_at_once(tree: Path, tmp_path: Path) -> None:
    """Between them may be what no memory holds."""
    bootstrap = create(tree, tmp_path, "-v", "5", "--compressor", "none")
    (blob,) = (tmp_path / "blobs").iterdir()
    data = bytearray(bootstrap.read_bytes())
    image = RafsV5(memoryview(bytes(data)), "tree")
    first = next(chunk for chunk in image.raw_chunks() if chunk.index == 0)
    stored = CHUNK_INFO.pack(*first)
    far = CHUNK_INFO.pack(*first._replace(coff=1 << 39))
    assert data.count(stored) == 1
    data = data.replace(stored, far)
    (table,) = struct.unpack_from("<Q", data, 72)
    struct.pack_into("<Q", data, table + 16, 1 << 40)
    bootstrap.write_bytes(data)
    with open(blob, "r+b") as file:
        file.truncate(1 << 40)
    assert f"blob {blob.name} chunk 0: " in refused("check", bootstrap, "-D", tmp_path / "blobs")


def test_what_a_few_stored_bytes_stand_for_is_not_all_kept(tmp_path: Path) -> None:
    """Ten chunks of 16 MiB are stored in a few kilobytes."""
    (tmp_path / "tree").mkdir()
    with open(tmp_path / "tree" / "file", "wb") as file:
        for number in range(10):
            file.write(b"%d" % number)
            file.truncate(file.seek((number + 1) << 24))
    bootstrap = create(tmp_path / "tree", tmp_path, "--chunk-size", "0x1000000")
    tracemalloc.start()
    text = image("check", bootstrap, "-D", tmp_path / "blobs")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "10 chunks read and verified" in text and peak < 110 << 20


def test_chunks_that_nothing_describes_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A blob may claim 16 million of them: they have no bytes to be decoded."""
    v5 = PatchedV5()
    v5.put(v5.get(72, "Q"), "I", 1 << 16)
    (tmp_path / "boot").write_bytes(v5.data)
    longest = 0
    decode = ChunkDecoder.decode_range

    def counted(self: ChunkDecoder, records: Sequence[ChunkRecord], *args: Any) -> Iterator[tuple[int, Buffer]]:
        nonlocal longest
        longest = max(longest, len(records))
        return decode(self, records, *args)

    monkeypatch.setattr(ChunkDecoder, "decode_range", counted)
    assert "318 chunks read" in image("check", tmp_path / "boot", "-D", oracle.image("v5-zstd-blake3").blobs)
    assert 0 < longest <= 4096


def test_metadata_is_gone_through_once_for_all_blobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A v5 image may have thousands of them."""
    layers = []
    for number in range(5):
        (tree := tmp_path / f"tree{number}").mkdir()
        (tree / f"file{number}").write_bytes(b"%d" % number * 5000)
        layers.append(create(tree, tmp_path).rename(tmp_path / f"layer{number}"))
    image("merge", "-B", tmp_path / "merged", *layers)
    times = 0
    listed = RafsV6.raw_chunks

    def counted(self: RafsV6) -> Iterator[RawChunk]:
        nonlocal times
        times += 1
        return listed(self)

    with ImageReader(tmp_path / "merged", make_backend("localfs", {"dir": str(tmp_path / "blobs")})) as reader:
        monkeypatch.setattr(RafsV6, "raw_chunks", counted)
        contents = [
            b"".join(reader.content(ino)) for _, ino in paths(reader.bootstrap) if ino != reader.bootstrap.root_ino
        ]
    assert contents == [b"%d" % number * 5000 for number in range(5)] and times == 1


def test_metadata_that_no_memory_holds_is_refused(tmp_path: Path) -> None:
    bootstrap = tmp_path / "boot"
    bootstrap.write_bytes(PatchedV5().data)
    with open(bootstrap, "r+b") as file:
        file.truncate(1 << 42)
    assert f"{bootstrap}: metadata of {1 << 42} bytes; at most" in refused("check", bootstrap)


def test_check_names_the_blobs_in_its_summary(tree: Path, tmp_path: Path) -> None:
    bootstrap = create(tree, tmp_path)
    text = image("check", "-v", "-J", tmp_path / "out.json", bootstrap)
    _, parsed = load_metadata(bootstrap)
    assert json.loads((tmp_path / "out.json").read_text())["blobs"] == [parsed.blobs[0].blob_id]
    assert "text-65537" in text and "373 names" in text
    assert "name the metadata once" in refused("check")
    assert "name the metadata once" in refused("check", bootstrap, "-B", bootstrap)


def test_requests_are_answered_with_json(tree: Path, tmp_path: Path) -> None:
    bootstrap = create(tree, tmp_path, "--prefetch-policy", "fs", stdin=b"/many\n/random-4097\n")
    _, parsed = load_metadata(bootstrap)
    blob = parsed.blobs[0]
    assert json.loads(image("inspect", bootstrap, "-R", "stats")) == {"inodes_count": 373}
    assert json.loads(image("inspect", bootstrap, "-R", "blobs")) == [
        {
            "blob_id": blob.blob_id,
            "readahead_offset": 0,
            "readahead_size": 0,
            "decompressed_size": blob.uncompressed_size,
            "compressed_size": blob.compressed_size,
        }
    ]
    listed = json.loads(image("inspect", bootstrap, "--request", "prefetch"))
    assert [one["path"] for one in listed] == [["/many"], ["/hard-link", "/random-4097"]]
    assert [one["inode"] for one in listed] == parsed.prefetch_inodes()
    assert "unknown command" in refused("inspect", bootstrap, "-R", "format c:")


@pytest.mark.parametrize("version", ["5", "6"])
def test_dialogue_walks_the_tree(tree: Path, tmp_path: Path, version: str) -> None:
    bootstrap = create(tree, tmp_path, "-v", version, "--chunk-size", "65536")
    _, parsed = load_metadata(bootstrap)
    ino = parsed.lookup(parsed.root_ino, b"text-300000")
    asked = b"\n".join(
        [
            b"stats",
            b"blobs",
            b"prefetch",
            b"cd many",
            b"ls",
            b"cd nowhere",
            b"cd ..",
            b"stat text-300000",
            b"stat short-link",
            b"icheck %d" % (ino or 0),
            b"icheck 99999999",
            b"chunk 0",
            b"cd d0/d1",
            b"stat .",
            b"help",
            b"what",
            b"",
            b"exit",
        ]
    )
    text = image("inspect", bootstrap, stdin=asked + b"\nstats\n")
    assert text.count("Inodes Count:") == 1
    for part in ("Blob ID:", "Total Prefetching Files: 0", "/many :> ", "0001-n", "nowhere: no folder", "Chunk list:"):
        assert part in text
    for part in ("file offset 262144", "Target:                 random-1", "/text-300000", "no inode of this number"):
        assert part in text
    for part in ("File: /", "/d0/d1 :> ", "icheck INODE", "unknown command"):
        assert part in text
    assert image("inspect", bootstrap, stdin=b"ls\n").endswith(":> \n")


def test_statistics_count_what_images_have_in_common(tree: Path, tmp_path: Path) -> None:
    base = create(tree, tmp_path / "base", "--chunk-size", "65536")
    other = tmp_path / "other"
    other.mkdir()
    (other / "copy").write_bytes((tree / "random-65536").read_bytes())
    (other / "new").write_bytes(b"new")
    target = create(other, tmp_path / "target", "--chunk-size", "65536")
    image("stat", "-B", base, "-T", target, "-J", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["target_enabled"] and found["target_image"]["ref_chunks"] == found["target_image"]["own_chunks"] == 1
    base_image = found["base_image"]
    assert (base_image["dirs"], base_image["symlinks"]) == (43, 2)
    assert base_image["own_chunks"] == base_image["dedup_chunks"] < base_image["chunks"]
    assert base_image["file_sizes"][17] == 4  # 65,536 and 65,537 bytes: 17 bits
    assert "dedup chunks" in image("stat", "-B", base)
    assert "one of --bootstrap" in refused("stat")
