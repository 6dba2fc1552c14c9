"""Unreadable sources, blobs that are gone, full disks: each command says what and where, and leaves nothing."""

from __future__ import annotations

import gzip
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nydusd.cli.exit_status import exit_status
from tests.image.build import HERE, create, image, refused
from tests.image.test_convert import source_layout
from tests.support.disk import NO_READS, Disk

Arguments = tuple[str | Path, ...]

FROM_SOURCES = (
    "create",
    "create -t tar-rafs",
    "create -t targz-rafs",
    "create -t targz-ref",
    "create -t tar-tarfs",
    "convert",
)
FROM_METADATA = ("merge", "chunkdict")
FROM_BLOBS = ("unpack", "export", "optimize", "compact")


class Inputs:
    """What the commands read: a tree, tars of it, an OCI layout, and an image of two layers. All data differs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tree, self.tar, self.layer = folder / "tree", folder / "tree.tar", folder / "layer.tgz"
        self.layout, self.blobs = folder / "oci", folder / "blobs"
        self.bootstrap, self.wanted = folder / "bootstrap", folder / "wanted"
        self.layers = folder / "lower.boot", folder / "upper.boot"

    def make(self) -> None:
        source = random.Random(7)
        (self.tree / "folder").mkdir(parents=True)
        (self.tree / "folder" / "file").write_bytes(source.randbytes(600_000))
        for number in range(10):
            (self.tree / f"name-{number:02}-{'n' * 200}").write_bytes(source.randbytes(10))
        with tarfile.open(self.tar, "w") as tar:
            tar.add(self.tree, ".")
        self.layer.write_bytes(gzip.compress(self.tar.read_bytes(), 1, mtime=0))
        source_layout(self.folder, [self.layer.read_bytes()], "app")
        upper = self.folder / "upper"
        upper.mkdir()
        (upper / "second").write_bytes(source.randbytes(100_000))
        for tree, layer in zip((self.tree, upper), self.layers, strict=True):
            create(tree, self.folder).rename(layer)
        image("merge", "-B", self.bootstrap, *self.layers)
        self.wanted.write_bytes(b"/folder/file\n")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    made = Inputs(tmp_path_factory.mktemp("inputs"))
    made.make()
    return made


def arguments(name: str, given: Inputs, out: Path) -> Arguments:
    """What each command is to be run with, so that all that it writes goes into the folder `out`."""
    of_image = (given.bootstrap, "-D", given.blobs)
    here = ("-B", out / "boot", "-D", out)
    backend = ("--backend-type", "localfs", "--backend-config", f'{{"dir": "{given.blobs}"}}')
    every: dict[str, Arguments] = {
        "create": ("create", *here, given.tree),
        "create -t tar-rafs": ("create", "-t", "tar-rafs", *here, given.tar),
        "create -t targz-rafs": ("create", "-t", "targz-rafs", *here, given.layer),
        "create -t targz-ref": ("create", "-t", "targz-ref", *here, given.layer),
        "create -t tar-tarfs": ("create", "-t", "tar-tarfs", *here, given.tar),
        "convert": ("convert", f"{given.layout}:app", f"{out / 'oci'}:app"),
        "merge": ("merge", "-B", out / "boot", *given.layers),
        "chunkdict": ("chunkdict", "generate", "-B", out / "boot", given.layers[0]),
        "unpack": ("unpack", *of_image, "--output", out / "tar"),
        "export": ("export", "--block", "-B", *of_image, "-O", out / "disk"),
        "optimize": ("optimize", *of_image, "-p", given.wanted, "--output-blob-dir", out, "-O", out / "boot"),
        "compact": ("compact", given.bootstrap, *backend, "-D", out, "-O", out / "boot"),
    }
    return every[name]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", [*FROM_SOURCES, *FROM_METADATA, *FROM_BLOBS])
def test_command_works_as_long_as_nothing_fails(inputs: Inputs, tmp_path: Path, name: str) -> None:
    """What fails below is then what was taken away."""
    image(*arguments(name, inputs, tmp_path))
    assert files(tmp_path)


@pytest.fixture(scope="module")
def full_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A disk of two blocks, which no output fits on."""
    folder = tmp_path_factory.mktemp("full")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("name", [*FROM_SOURCES, *FROM_METADATA, *FROM_BLOBS])
def test_full_disk_is_named_and_nothing_is_left(inputs: Inputs, full_disk: Path, name: str) -> None:
    text = refused(*arguments(name, inputs, full_disk))
    assert str(full_disk) in text and "the disk is full" in text
    assert files(full_disk) == []


def test_full_disk_for_the_layers_is_named(
    inputs: Inputs, full_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(full_disk))
    text = refused("convert", f"{inputs.layout}:app", tmp_path / "out")
    assert text.startswith(f"{full_disk}/") and text.endswith("No space left on device (the disk is full)")
    assert files(full_disk) == [] and files(tmp_path) == []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    text = refused("convert", f"{inputs.layout}:app", tmp_path / "out")
    assert text.startswith(str(tmp_path / "missing")) and "no place for the layers" in text


@pytest.fixture(scope="module")
def unreadable(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inputs]:
    """The inputs on a disk that gives EIO for all data that is not in the page cache: for root, too."""
    with Disk(tmp_path_factory.mktemp("bad"), "noatime") as disk:
        given = Inputs(disk.path / "all")
        shutil.copytree(inputs.folder, given.folder, symlinks=True)
        for path in given.folder.rglob("*"):
            if path.is_file():
                disk.forget_cached(path)
        disk.does(NO_READS)
        yield given


MEMBERS = {
    "create": "name-00",
    "create -t tar-rafs": "tree.tar",
    "create -t tar-tarfs": "tree.tar",
    "convert": "oci",
}


@pytest.mark.parametrize("name", FROM_SOURCES)
def test_source_that_cannot_be_read_is_named(unreadable: Inputs, tmp_path: Path, name: str) -> None:
    text = refused(*arguments(name, unreadable, tmp_path))
    assert MEMBERS.get(name, "layer.tgz") in text and "Input/output error" in text
    assert files(tmp_path) == []


@pytest.mark.parametrize("name", FROM_METADATA)
def test_metadata_that_cannot_be_read_is_named(unreadable: Inputs, tmp_path: Path, name: str) -> None:
    text = refused(*arguments(name, unreadable, tmp_path))
    assert f"{unreadable.layers[0]}: cannot be read: Input/output error" in text
    assert files(tmp_path) == []


@pytest.mark.parametrize("gone", [False, True], ids=["unreadable", "gone"])
@pytest.mark.parametrize("name", FROM_BLOBS)
def test_blob_that_cannot_be_read_is_named(
    inputs: Inputs, unreadable: Inputs, tmp_path: Path, name: str, gone: bool
) -> None:
    given = Inputs(inputs.folder)
    given.blobs = tmp_path / "blobs" if gone else unreadable.blobs
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "blobs").mkdir()
    text = refused(*arguments(name, given, out))
    assert any(blob.name in text for blob in inputs.blobs.iterdir())
    assert files(out) == []


def test_file_that_its_owner_hid_is_named_to_who_may_not_read_it(tmp_path: Path) -> None:
    """Not run as root, or as a root that may not read everything."""
    tree, out = tmp_path / "tree", tmp_path / "out"
    (tree / "folder").mkdir(parents=True)
    out.mkdir()
    (tree / "folder" / "secret").write_bytes(b"not for you")
    (tree / "folder" / "secret").chmod(0)
    os.chown(tree / "folder" / "secret", 12345, 12345)
    command = [sys.executable, "-m", "nydusd.cli.nydus_image", "create", "-D", str(out), str(tree)]
    few = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--inh-caps", "-all", "--"]
    done = subprocess.run([*few, *command], cwd=HERE, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "Error: folder/secret: cannot be read: Permission denied\n")
    assert files(out) == []


def test_too_little_memory_is_told_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(lambda: bytearray(1 << 62), str) == 1
    assert capsys.readouterr().err == "Error: it needs more memory than there is\n"
