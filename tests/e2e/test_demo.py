"""`make demo`: what the README promises of it."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from nydusd.image.oci.layout import Layout
from nydusd.image.oci.model import OCI_MANIFEST, digest_of, packed
from tests.image.test_convert import put
from tests.support.registry import docker_registry

HERE = Path(__file__).resolve().parents[2]
RIGHT = "every byte of every file is the source's"
WRITES = "echo the image says $WORD in $PWD; echo written > /new && cat /new; ls /proc/1/comm; echo x > /dev/null"


def demo(source: str | Path, run: str = "") -> tuple[int, str]:
    """The exit status and what is said."""
    env = os.environ | {"SOURCE": str(source), "RUN": run}
    done = subprocess.run(
        [sys.executable, HERE / "scripts/demo"],
        env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
    )  # fmt: skip
    assert "Traceback" not in done.stdout
    return done.returncode, done.stdout


def shell_layers() -> list[bytes]:
    """Layers with a shell, its libraries and a few files, of which the upper removes, replaces and hides some."""
    programs = [Path(path).resolve() for path in map(shutil.which, ("sh", "cat", "ls")) if path]
    linked = subprocess.run(["ldd", *programs], check=True, capture_output=True, text=True).stdout
    files = {f"bin/{name}": path for name, path in zip(("sh", "cat", "ls"), programs, strict=True)}
    files |= {path[1:]: Path(path) for path in re.findall(r"(/\S+) \(", linked)}
    lower, upper = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=lower, mode="w") as tar:
        for name in ("gone", "hidden/below", "replaced", "kept", "folder/a"):
            add(tar, name, name.encode() * 1000)
        for name, path in files.items():
            add(tar, name, path.read_bytes())
    with tarfile.open(fileobj=upper, mode="w") as tar:
        for name in (".wh.gone", "hidden/.wh..wh..opq"):
            add(tar, name, b"")
        for name in ("hidden/above", "replaced", "work/here"):
            add(tar, name, b"of the upper layer " * 1000)
        link = tarfile.TarInfo("linked")
        link.type, link.linkname = tarfile.LNKTYPE, "replaced"
        tar.addfile(link)
    return [gzip.compress(made.getvalue(), 1, mtime=0) for made in (lower, upper)]


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o755
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def shell_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OCI layout with an image that can be run."""
    work = tmp_path_factory.mktemp("demo")
    layout, layers = Layout(work / "oci", ""), shell_layers()
    config: dict[str, object] = {
        "config": {
            "Entrypoint": ["/bin/sh", "-c"],
            "Cmd": [WRITES],
            "Env": ["WORD=hello", "PATH=/bin"],
            "WorkingDir": "/work",
        },
        "rootfs": {"type": "layers", "diff_ids": [digest_of(gzip.decompress(layer)) for layer in layers]},
    }
    manifest: dict[str, object] = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": put(layout, work, packed(config)),
        "layers": [put(layout, work, layer) for layer in layers],
    }
    layout.tag(packed(manifest), OCI_MANIFEST)
    return work / "oci"


def test_folder_without_a_program_is_read_and_compared(tmp_path: Path) -> None:
    (tmp_path / "tree/sub").mkdir(parents=True)
    (tmp_path / "tree/sub/random").write_bytes(os.urandom(3_000_000))
    (tmp_path / "tree" / os.fsdecode(b"no text \xff")).write_bytes(b"x")
    status, said = demo(tmp_path / "tree")
    assert status == 0, said
    assert "nothing of it is run" in said and RIGHT in said and said.count("2 files, 3.0 MB in") == 2


def test_without_a_source_python_runs_from_an_image_of_its_library() -> None:
    status, said = demo("")
    assert status == 0, said
    assert "all of them from the mount" in said and "it ended with status 0" in said and RIGHT in said


def test_oci_image_runs_above_the_mount_and_is_compared_with_its_layers(shell_image: Path) -> None:
    status, said = demo(shell_image)
    assert status == 0, said
    assert "  | the image says hello in /work\n  | written\n  | /proc/1/comm\n  it ended with status 0" in said
    assert RIGHT in said and not (shell_image.parent / "new").exists() and not Path("/new").exists()


def test_image_in_a_registry_is_fetched_from_there(tmp_path: Path, shell_image: Path) -> None:
    with docker_registry(tmp_path / "registry") as registry:
        name = f"{registry.host}/shop/shell:1"
        manifest = json.loads(Layout(shell_image, "").manifest()[0])
        for entry in (manifest["config"], *manifest["layers"]):
            data = (shell_image / "blobs/sha256" / entry["digest"][7:]).read_bytes()
            registry.push("shop/shell", data, entry["digest"][7:])
        registry.push_manifest("shop/shell", "1", OCI_MANIFEST, packed(manifest))
        status, said = demo(name, "ls /hidden /gone; exit 3")
        assert "  | above\n" in said and "No such file" in said and "it ended with status 3" in said and RIGHT in said
        assert status == 1  # what was asked for has failed
        status, said = demo(f"{registry.host}/shop/shell:2")
        assert (
            status == 1 and "manifest: status 404" in said and f"no image can be made of SOURCE={registry.host}" in said
        )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("/no/such/folder", "SOURCE=/no/such/folder: there is no such folder"),
        ("/etc/passwd", "SOURCE=/etc/passwd is no folder"),
        ("No:Name:Of/anything", "names no image: HOST/REPOSITORY:TAG is expected"),
        ("127.0.0.1:1/app", "connection refused"),
    ],
)
def test_wrong_source_is_told(source: str, expected: str) -> None:
    status, said = demo(source)
    assert status == 1 and expected in said, said
