"""`nydus-image create --fs-version 5`, read back by the parser and the daemon, and compared with the reference's builder."""

from __future__ import annotations

from pathlib import Path

import pytest

from nydusd.formats.rafs_v5 import RafsV5
from nydusd.image.reader import load_metadata
from tests.image.build import create, refused, rows
from tests.support import manifest, oracle
from tests.support.daemon import Daemon
from tests.support.manifest import Row


@pytest.mark.parametrize(
    "options", [(), ("--compressor", "lz4_block", "--digester", "sha256", "--aligned-chunk"), ("--blob-inline-meta",)]
)
def test_every_option_gives_the_source_tree_back(
    tree: Path, expected: dict[str, Row], tmp_path: Path, options: tuple[str, ...]
) -> None:
    assert manifest.differences(expected, rows(create(tree, tmp_path, "--fs-version", "5", *options))) == []


def test_daemon_shows_the_source_tree(tree: Path, expected: dict[str, Row], tmp_path: Path) -> None:
    bootstrap = create(tree, tmp_path, "-v", "5", "--chunk-size", "65536", "--prefetch-policy", "fs", stdin=b"/many\n/")
    _, parsed = load_metadata(bootstrap)
    assert parsed.prefetch_inodes() == [parsed.lookup(1, b"many"), 1]
    with Daemon(bootstrap, tmp_path / "blobs") as daemon:
        assert manifest.differences(expected, manifest.walk(daemon.mountpoint)) == []


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("v5-zstd-blake3", ()),
        ("v5-lz4-sha256", ("--compressor", "lz4_block", "--digester", "sha256")),
        ("v5-aligned", ("--compressor", "lz4_block", "--aligned-chunk")),
    ],
)
def test_bootstrap_is_the_reference_builders_but_for_compressed_sizes(
    small_tree: Path, tmp_path: Path, name: str, options: tuple[str, ...]
) -> None:
    data, ours = load_metadata(create(small_tree, tmp_path, "-v", "5", *options))
    other_data, theirs = load_metadata(oracle.image(name).bootstrap)
    assert isinstance(ours, RafsV5) and isinstance(theirs, RafsV5)
    assert len(data) == len(other_data)
    assert ours.superblock_facts() == theirs.superblock_facts()
    assert ours.blobs[0].features == theirs.blobs[0].features
    assert ours.blobs[0].uncompressed_size == theirs.blobs[0].uncompressed_size
    same = [
        [chunk._replace(csize=0, coff=0, flags=chunk.flags & ~1) for chunk in parsed.raw_chunks()]
        for parsed in (ours, theirs)
    ]
    assert same[0] == same[1]
    root_digest = slice(int(str(ours.superblock_facts()["extended_blob_table_offset"])) + 64, None)
    assert data[root_digest][:32] == other_data[root_digest][:32]  # over names' order and all content


@pytest.mark.parametrize("option", [("--batch-size", "4096"), ("--features", "blob-toc"), ("--encrypt",)])
def test_what_the_version_cannot_do_is_refused(tree: Path, tmp_path: Path, option: tuple[str, ...]) -> None:
    assert "cannot be used with --fs-version 5" in refused("create", "-v", "5", "-D", tmp_path, *option, tree)
