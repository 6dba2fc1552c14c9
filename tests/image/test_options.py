"""Options of `nydus-image` that no other test here reads back, and old spellings that callers of the reference use."""

from __future__ import annotations

import gzip
import io
import json
import re
from pathlib import Path

import pytest

from nydusd.image.progress import Progress
from nydusd.image.reader import load_metadata
from tests.image.build import create, image, refused, rows
from tests.image.test_convert import WANTED, layers, source_layout, unpacked
from tests.image.test_create_reference import refer
from tests.image.test_create_tar import file, tar_of
from tests.support import manifest
from tests.support.certificates import Authority
from tests.support.manifest import Row
from tests.support.registry import docker_registry


def test_old_spellings_do_what_the_new_ones_do(tree: Path, tmp_path: Path) -> None:
    options = ("-t", "directory", "-C", "/no/such", "--compressor", "none")
    old = create(tree, tmp_path / "old", "--source-type", *options[1:])
    new = create(tree, tmp_path / "new", "--type", "dir-rafs", "--compressor", "none")
    assert old.read_bytes() == new.read_bytes()
    (tmp_path / "blobs").mkdir()
    image("create", "-D", tmp_path / "blobs", "--inline-bootstrap", tree)
    (blob,) = (tmp_path / "blobs").iterdir()
    assert load_metadata(blob)[1].blobs[0].blob_id == blob.name


def test_blob_is_found_under_the_name_that_it_was_given(tree: Path, expected: dict[str, Row], tmp_path: Path) -> None:
    bootstrap = create(tree, tmp_path, "--blob-id", "my-blob")
    assert [path.name for path in (tmp_path / "blobs").iterdir()] == ["my-blob"]
    assert manifest.differences(expected, rows(bootstrap)) == []


def test_v5_blob_begins_with_what_is_to_be_read_ahead(tree: Path, expected: dict[str, Row], tmp_path: Path) -> None:
    listed = b"/text-300000\n/many\n"
    bootstrap = create(tree, tmp_path, "-v", "5", "--prefetch-policy", "blob", stdin=listed)
    _, parsed = load_metadata(bootstrap)
    (blob,) = parsed.blobs
    assert parsed.prefetch_inodes() == [] and blob.prefetch_offset == 0
    ends = []
    for name in (b"text-300000", b"many"):
        ino = parsed.lookup(parsed.root_ino, name) or 0
        inos = [entry.ino for entry in parsed.readdir(ino, 0) if entry.name[0] != 0x2E] if name == b"many" else [ino]
        chunks = [chunk for one in inos for chunk in parsed.file_chunks(one)]  # type: ignore[attr-defined]
        ends.append(max(chunk.coff + chunk.csize for chunk in chunks))
    assert blob.prefetch_size == max(ends) < (tmp_path / "blobs" / blob.blob_id).stat().st_size
    assert manifest.differences(expected, rows(bootstrap)) == []


def test_estargz_layer_is_referred_to_without_the_files_about_it(tmp_path: Path) -> None:
    entries = (file("stargz.index.json", b"{}"), file("folder/stargz.index.json", b"kept"), file("data", b"d" * 70_000))
    (tmp_path / "layer.tgz").write_bytes(gzip.compress(tar_of(*entries)))
    bootstrap = refer(tmp_path / "layer.tgz", tmp_path / "out", "estargz-ref")
    found = rows(bootstrap)
    assert found.keys() == {".", "folder", "folder/stargz.index.json", "data"}
    assert found["data"]["size"] == 70_000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-t", "stargz_index"), "--type stargz_index: .* use --type estargz-ref"),
        (("-t", "estargztoc-ref", "--blob-data-size", "0x1000"), "--type estargztoc-ref: .* use --type estargz-ref"),
        (("--blob-data-size", "0x1000"), "--blob-data-size: .* use --type estargz-ref"),
        (("--processes", "-3"), "--processes: must be a number of processes, 0 to 9999, but is '-3'"),
        (("--attributes", "x"), "--attributes: no daemon reads .* use --type targz-ref"),
        (("--external-blob", "x"), "--external-blob: no daemon reads .* use --type targz-ref"),
    ],
)
def test_what_no_daemon_could_read_is_refused_with_what_to_use(
    tree: Path, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    assert re.search(words, refused("create", "-D", tmp_path, *options, tree))
    assert list(tmp_path.iterdir()) == []


def test_progress_is_shown_on_a_terminal_only() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, other = Terminal(), io.StringIO()
    for stream in (terminal, other):
        progress = Progress(2_000_000, stream)
        progress.add(1_000_000)
        progress.add(1_000_000)
        progress.end()
    assert "100%  2.0 of 2.0 MB" in terminal.getvalue() and terminal.getvalue().endswith("\n")
    assert other.getvalue() == ""


def test_merge_takes_the_ids_of_the_original_blobs(tmp_path: Path) -> None:
    made = []
    for number, data in enumerate((b"lower" * 1000, b"upper" * 1000)):
        tree = tmp_path / f"tree{number}"
        tree.mkdir()
        (tree / f"file{number}").write_bytes(data)
        made.append(create(tree, tmp_path / f"layer{number}"))
    ids = ["a" * 64, "b" * 64]
    image("merge", "-B", tmp_path / "merged", "--original-blob-ids", ",".join(ids), *made)
    assert [blob.blob_id for blob in load_metadata(tmp_path / "merged")[1].blobs] == ids
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, name in enumerate(ids):
        (blob,) = (tmp_path / f"layer{number}" / "blobs").iterdir()
        blob.rename(blobs / name)
    assert rows(tmp_path / "merged", blobs)["file1"]["size"] == 5000


def test_image_is_read_from_a_backend_of_a_file_and_of_a_daemons_configuration(tree: Path, tmp_path: Path) -> None:
    bootstrap = create(tree, tmp_path)
    backend = {"dir": str(tmp_path / "blobs")}
    (tmp_path / "backend.json").write_text(json.dumps(backend))
    config = {"version": 2, "backend": {"type": "localfs", "localfs": backend}, "cache": {"type": "dummycache"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ways = {
        "backend file": ("--backend-type", "localfs", "--backend-config-file", tmp_path / "backend.json"),
        "configuration": ("-C", tmp_path / "config.json"),
        "folder": ("-D", tmp_path / "blobs"),
    }
    tars = set()
    for name, way in ways.items():
        image("unpack", "-B", bootstrap, *way, "--output", tmp_path / name)
        tars.add((tmp_path / name).read_bytes())
    assert len(tars) == 1
    for way in (ways["configuration"], ways["folder"]):
        assert "chunks read and verified" in image("check", "-B", bootstrap, *way)
        assert json.loads(image("inspect", "-B", bootstrap, *way, "-R", "stats")) == {"inodes_count": 373}
    image("optimize", "-B", bootstrap, *ways["configuration"], *_optimized(tmp_path, "one"))
    image("optimize", "-B", bootstrap, *ways["backend file"], *_optimized(tmp_path, "two"))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("text", [b"\xff", b"[" * 100_000, b"[]"])
def test_backend_file_that_is_no_json_object_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "backend.json").write_bytes(text)
    way = ("--backend-type", "localfs", "--backend-config-file", tmp_path / "backend.json")
    assert "--backend-config: " in refused("unpack", "-B", tmp_path / "boot", *way, "--output", tmp_path / "tar")


def _optimized(tmp_path: Path, name: str) -> tuple[str | Path, ...]:
    (tmp_path / "wanted").write_bytes(b"/text-300000\n")
    return "-p", tmp_path / "wanted", "--output-blob-dir", tmp_path / "blobs", "-O", tmp_path / name


def test_statistics_of_all_images_in_a_folder(tree: Path, small_tree: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, source in enumerate((tree, small_tree)):
        create(source, tmp_path / str(number)).rename(folder / str(number))
    image("stat", "-D", folder, "-J", tmp_path / "both.json", "-C", "x", "--digester", "sha256")
    counts = []
    for number in range(2):
        image("stat", "-B", folder / str(number), "-J", tmp_path / "one.json")
        counts.append(json.loads((tmp_path / "one.json").read_text())["base_image"]["files"])
    assert json.loads((tmp_path / "both.json").read_text())["base_image"]["files"] == sum(counts)


def test_converted_image_has_the_version_and_chunks_that_were_asked_for(tmp_path: Path) -> None:
    source = source_layout(tmp_path, layers())
    options = ("--fs-version", "5", "--compressor", "lz4_block", "--chunk-size", "0x10000")
    image("convert", source, tmp_path / "out", "--platform", "linux/amd64", *options)
    unpacked(tmp_path / "out", "", tmp_path)
    _, parsed = load_metadata(tmp_path / "image/image.boot")
    assert (parsed.version, parsed.chunk_size) == (5, 0x10000)
    assert {blob.compressor.name for blob in parsed.blobs} == {"LZ4_BLOCK"}
    assert rows(tmp_path / "image/image.boot", tmp_path / "out/blobs/sha256").keys() == WANTED


def test_certificate_of_a_registry_is_checked_unless_it_is_not_to_be(tmp_path: Path) -> None:
    source, authority = source_layout(tmp_path, layers()), Authority(tmp_path / "keys")
    with docker_registry(tmp_path / "registry", authority=authority) as registry:
        target = (f"{registry.host}/some/repo:nydus", "--platform", "linux/amd64")
        assert "its certificate is not trusted" in refused("convert", source, *target)
        there = image("convert", source, *target, "--insecure")
        assert image("convert", source, tmp_path / "here", "--platform", "linux/amd64") == there
