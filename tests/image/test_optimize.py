"""`nydus-image optimize`: what an image needs first is in one blob, and daemons read that ahead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.erofs import erofs_mount
from nydusd.cli.nydusctl import main as nydusctl
from nydusd.errors import ConfigError
from nydusd.formats.model import BlobFeature
from nydusd.image.optimize import parse_wanted
from nydusd.image.reader import load_metadata
from tests.image.build import create, image, refused, rows
from tests.support import manifest, oracle
from tests.support.daemon import Daemon, image_config
from tests.support.discipline import wait_until
from tests.support.manifest import Row

PREFETCH = int(BlobFeature.IS_SEPARATED_WITH_PREFETCH_FILES)
LISTED = b"/text-300000\n/many\n/hard-link\n/no/such file\n/sparse\n"


def optimize(bootstrap: Path, blobs: Path, wanted: bytes, *more: str) -> Path:
    """The new bootstrap, in the folder of the old one; the new blob is beside the old ones."""
    listed, target = bootstrap.parent / "wanted", blobs.parent / "optimized"
    listed.write_bytes(wanted)
    where = ("-D", blobs, "--output-blob-dir", blobs, "-O", target)
    image("optimize", bootstrap, "--prefetch-files", listed, *where, *more)
    listed.unlink()
    return target


def test_path_that_is_no_text_is_named() -> None:
    data = json.dumps({"version": "v1", "files": [{"path": "/a"}, {"path": "/\ud800"}]})
    with pytest.raises(ConfigError, match=r"list: files\[1\]\.path: '/\\ud800' is no text"):
        parse_wanted(data.encode(), "list")


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("-v", "5", "--compressor", "lz4_block", "--digester", "sha256"),
        ("--encrypt", "--chunk-size", "4096"),
        ("--batch-size", "0x10000", "--chunk-size", "0x10000", "--features", "blob-toc"),
        ("--blob-inline-meta", "--features", "blob-toc"),
    ],
    ids=lambda options: " ".join(options) or "default",
)
def test_optimized_image_is_the_same_tree(
    tree: Path, expected: dict[str, Row], tmp_path: Path, options: tuple[str, ...]
) -> None:
    bootstrap, blobs = create(tree, tmp_path, *options), tmp_path / "blobs"
    target = optimize(bootstrap, blobs, LISTED)
    assert manifest.differences(expected, rows(target, blobs)) == []
    image("check", target, "-D", blobs)
    _, found = load_metadata(target)
    old, new = found.blobs
    assert new.features & PREFETCH and not old.features & PREFETCH
    # Each chunk once: text-300000, random-4097, those of the folder with 300 small files and a link, two of the sparse file.
    size = found.chunk_size
    many = {path for path in (tree / "many").iterdir() if path.stat().st_size}
    contents = [path.read_bytes() for path in (*many, tree / "text-300000", tree / "hard-link", tree / "sparse")]
    chunks = {content[at : at + size] for content in contents for at in range(0, len(content), size)}
    assert new.chunk_count == len(chunks)
    listed = [names["path"][0] for names in json.loads(image("inspect", target, "-R", "prefetch"))]
    assert listed == ["/text-300000", "/many", "/hard-link", "/sparse"]


def test_kernel_mounts_an_optimized_image(tree: Path, expected: dict[str, Row], tmp_path: Path) -> None:
    bootstrap, blobs = create(tree, tmp_path, "--chunk-size", "0x10000"), tmp_path / "blobs"
    target = optimize(bootstrap, blobs, LISTED)
    image("export", "--block", "-B", target, "-D", blobs, "-O", tmp_path / "disk")
    point = tmp_path / "mnt"
    point.mkdir()
    with erofs_mount(tmp_path / "disk", [], point):
        assert manifest.differences(expected, manifest.walk(point)) == []


@pytest.mark.parametrize("name", ["v6-targz-ref", "v5-lz4-sha256"])
def test_images_of_the_reference_are_optimized(tmp_path: Path, name: str) -> None:
    packed = oracle.image(name)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in packed.blobs.iterdir():
        (blobs / path.name).symlink_to(path)
    (tmp_path / "bootstrap").write_bytes(packed.bootstrap.read_bytes())
    target = optimize(tmp_path / "bootstrap", blobs, b"/sizes\n/dup\n")
    wanted = manifest.load(packed.manifest)
    assert manifest.differences(wanted, rows(target, blobs)) == []
    again = optimize(target, blobs, b"/dup\n")
    _, found = load_metadata(again)
    assert [bool(blob.features & PREFETCH) for blob in found.blobs] == [False, False, True]
    assert manifest.differences(wanted, rows(again, blobs)) == []


def test_parts_of_files_are_chosen_by_chunks(tree: Path, expected: dict[str, Row], tmp_path: Path) -> None:
    bootstrap, blobs = create(tree, tmp_path, "--chunk-size", "4096"), tmp_path / "blobs"
    files = [
        {"path": "/random-300000", "ranges": [[4095, 1], [8192, 4097], [400_000, 5]]},
        {"path": "/random-65537", "ranges": [[65536, 1]]},
        {"path": "relative"},
        {"path": "/bytes-\udcff\udcfe"},
    ]
    target = optimize(bootstrap, blobs, json.dumps({"version": "v1", "files": files}).encode())
    _, found = load_metadata(target)
    assert found.blobs[1].chunk_count == 1 + 2 + 1 + 1
    # Only what is wanted whole is in the table of files to be read ahead.
    assert json.loads(image("inspect", target, "-R", "prefetch"))[0]["path"][0].startswith("/bytes-")
    assert manifest.differences(expected, rows(target, blobs)) == []


def test_trace_of_a_daemon_makes_the_next_start_need_no_backend(
    tree: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    bootstrap, blobs = create(tree, tmp_path, "--chunk-size", "0x10000"), tmp_path / "blobs"

    def use(daemon: Daemon) -> None:
        for name in ("many/0042-" + "n" * 42, "text-65537", "random-300000"):
            assert (daemon.mountpoint / name).read_bytes() == (tree / name).read_bytes()

    with Daemon(bootstrap, blobs) as daemon:
        use(daemon)
        capfdbinary.readouterr()
        assert nydusctl(["-S", str(daemon.apisock), "trace", "--prefetch-list"]) == 0
        names = capfdbinary.readouterr().out
        assert nydusctl(["-S", str(daemon.apisock), "trace", "--prefetch-ranges"]) == 0
        wanted = capfdbinary.readouterr().out
    assert [file["path"].encode() for file in json.loads(wanted)["files"]] == names.splitlines()
    target = optimize(bootstrap, blobs, wanted)
    cache = tmp_path / "cache"
    cache.mkdir()
    config = image_config(blobs, cache) | {"fs_prefetch": {"enable": True, "prefetch_all": False}}
    with Daemon(target, blobs, cache=cache, config=config) as daemon:
        _, found = load_metadata(target)
        count = found.blobs[1].chunk_count

        def ready() -> bool:
            metrics = daemon.get("/api/v1/metrics/blobcache")
            assert isinstance(metrics, dict)
            # A read is counted when its worker reports it, a moment after the chunks are there.
            return bool(metrics["entries_count"] >= count and daemon.backend_reads())

        wait_until(ready, "the blob to be read ahead", 60)
        before = daemon.backend_reads()
        use(daemon)
        assert daemon.backend_reads() == before


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (b"/no/such/file\n", "nothing to optimize"),
        (b"", "nothing to optimize"),
        (b"{", "no valid JSON"),
        (b'{"version":"v2","files":[]}', "version must be 'v1', but is 'v2'"),
        (b'{"version":"v1"}', "files must be a list"),
        (b'{"version":"v1","files":[{"path":1}]}', "files[0].path must be a string"),
        (
            b'{"version":"v1","files":[{"path":"/a","ranges":[[1]]}]}',
            "files[0].ranges must be a list of [offset, length]",
        ),
        (b'{"version":"v1","files":[{"path":"/a","ranges":[[1,-1]]}]}', "must be from 0 to 2^63"),
    ],
)
def test_wrong_lists_are_refused_and_leave_nothing(small_tree: Path, tmp_path: Path, wanted: bytes, words: str) -> None:
    bootstrap = create(small_tree, tmp_path)
    listed = tmp_path / "list"
    listed.write_bytes(wanted)
    out = tmp_path / "out"
    out.mkdir()
    where = ("-D", tmp_path / "blobs", "--output-blob-dir", out, "-O", out / "bootstrap")
    assert words in refused("optimize", bootstrap, "-p", listed, *where)
    assert list(out.iterdir()) == []


def test_damaged_chunk_and_tarfs_images_are_refused(small_tree: Path, tmp_path: Path) -> None:
    bootstrap = create(small_tree, tmp_path)
    (blob,) = (tmp_path / "blobs").iterdir()
    blob.write_bytes(bytes(4096) + blob.read_bytes()[4096:])
    (tmp_path / "list").write_bytes(b"/\n")
    out = tmp_path / "out"
    out.mkdir()
    where = ("--output-blob-dir", out, "-O", out / "bootstrap")
    listed = ("-p", tmp_path / "list")
    assert f"blob {blob.name}" in refused("optimize", bootstrap, *listed, "-D", tmp_path / "blobs", *where)
    packed = oracle.image("v6-tarfs")
    assert "a tar that the kernel mounts" in refused("optimize", packed.bootstrap, *listed, "-D", packed.blobs, *where)
    assert list(out.iterdir()) == []
