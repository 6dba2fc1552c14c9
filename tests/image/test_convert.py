"""`nydus-image convert`: OCI images in layouts and registries become nydus images that snapshotters understand."""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import json
import tarfile
from pathlib import Path

import pytest
import zstandard

from nydusd.image.errors import ImageError
from nydusd.image.oci.layout import Layout
from nydusd.image.oci.model import OCI_INDEX, OCI_MANIFEST, digest_of, packed
from nydusd.image.oci.registry import Registry
from tests.image.build import image, refused, rows
from tests.image.test_create_tar import (
    ODD_ATTRIBUTES,
    file,
    gnu_tar,
    odd_attributes,
    sparse_1_0,
    tar_of,
    whole_seconds,
)
from tests.image.test_merge import LAYERS
from tests.support.certificates import Authority
from tests.support.manifest import Row, differences
from tests.support.registry import AUTH, PASSWORD, TokenServer, docker_registry

WANTED = {
    *(".", "etc", "etc/passwd", "opt", "opt/new", "bin", "bin/tool", "bin/hard", "replaced", "same", "other"),
    *("fresh", "fresh/there", "last"),
}


def put(layout: Layout, work: Path, data: bytes, **more: object) -> dict[str, object]:
    (work / "blob").write_bytes(data)
    layout.put(str(work / "blob"), digest_of(data), len(data))
    return {"mediaType": "application/octet-stream", "digest": digest_of(data), "size": len(data), **more}


def source_layout(work: Path, layers: list[bytes], name: str = "latest") -> Path:
    """A layout with an index of one image for this machine, and a name for it."""
    folder = work / "oci"
    layout = Layout(folder, name)
    tars = [gzip.decompress(layer) if layer[:2] == b"\x1f\x8b" else layer for layer in layers]
    config: dict[str, object] = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": ["/bin/tool"], "Env": ["A=1"]},
    }
    config["rootfs"] = {"type": "layers", "diff_ids": [digest_of(tar) for tar in tars]}
    config["history"] = [{"created_by": f"step {number}"} for number in range(len(layers))]
    manifest: dict[str, object] = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": put(layout, work, packed(config)),
        "layers": [put(layout, work, layer) for layer in layers],
        "annotations": {"kept": "yes"},
    }
    one = put(layout, work, packed(manifest), platform={"os": "linux", "architecture": "amd64"})
    other = put(layout, work, b"{}", platform={"os": "linux", "architecture": "s390x"})
    layout.tag(packed({"schemaVersion": 2, "manifests": [other, one]}), OCI_INDEX)
    return folder


def layers() -> list[bytes]:
    return [
        gzip.compress(tar_of(*LAYERS[0]), mtime=0),
        tar_of(*LAYERS[1]),
        gzip.compress(tar_of(*LAYERS[2]), mtime=0),
        gzip.compress(tar_of(*LAYERS[2]), mtime=0),
    ]


def blob_path(folder: Path, digest: object) -> Path:
    return folder / "blobs/sha256" / str(digest).removeprefix("sha256:")


def unpacked(folder: Path, name: str, work: Path) -> tuple[dict[str, object], dict[str, object]]:
    """The manifest and the config of an image in a layout; its metadata goes to `work`/image."""
    data, _ = Layout(folder, name).manifest()
    manifest = json.loads(data)
    config = json.loads(blob_path(folder, manifest["config"]["digest"]).read_bytes())
    with tarfile.open(blob_path(folder, manifest["layers"][-1]["digest"])) as tar:
        for member in tar:
            if member.isfile():
                (work / "image").mkdir(exist_ok=True)
                content = tar.extractfile(member)
                assert content is not None
                (work / member.name).write_bytes(content.read())
    return manifest, config


@pytest.mark.parametrize("version", ["5", "6"])
def test_layers_become_blobs_and_one_bootstrap(tmp_path: Path, version: str) -> None:
    source = source_layout(tmp_path, layers())
    target = tmp_path / "out"
    image("convert", f"{source}:latest", f"{target}:nydus", "-v", version, "--platform", "linux/amd64")
    manifest, config = unpacked(target, "nydus", tmp_path)
    entries = manifest["layers"]
    assert isinstance(entries, list)
    for entry in entries[:-1]:
        assert entry["mediaType"] == "application/vnd.oci.image.layer.nydus.blob.v1"
        assert entry["annotations"]["containerd.io/snapshot/nydus-blob"] == "true"
    marks = {"containerd.io/snapshot/nydus-bootstrap": "true", "containerd.io/snapshot/nydus-fs-version": version}
    assert entries[-1]["annotations"] == marks and manifest["annotations"] == {"kept": "yes"}
    assert config["config"] == {"Cmd": ["/bin/tool"], "Env": ["A=1"]}
    rootfs, history = config["rootfs"], config["history"]
    assert isinstance(rootfs, dict) and isinstance(history, list)
    assert rootfs["diff_ids"][:-1] == [entry["digest"] for entry in entries[:-1]]
    told = [one["created_by"] for one in history]
    assert told == ["step 0", "step 1", "step 2", "step 3", "nydus-image convert"]
    assert [one.get("empty_layer", False) for one in history].count(False) == len(entries)
    tar = gzip.decompress(blob_path(target, entries[-1]["digest"]).read_bytes())
    assert rootfs["diff_ids"][-1] == digest_of(tar)
    found = rows(tmp_path / "image/image.boot", target / "blobs/sha256")
    assert found.keys() == WANTED
    assert found["other"]["sha256"] == hashlib.sha256(b"removed below and added here").hexdigest()


def test_the_same_image_is_made_again_and_layers_come_from_the_cache(tmp_path: Path) -> None:
    source = source_layout(tmp_path, layers())
    options = ("--platform", "linux/amd64", "--cache", tmp_path / "cache")
    first = image("convert", source, tmp_path / "one", *options)
    made = sorted(path.stat().st_ino for path in (tmp_path / "cache").iterdir())
    assert len(made) == 3  # two of the four layers are one
    assert image("convert", source, tmp_path / "two", *options, "--processes", "1") == first
    assert sorted(path.stat().st_ino for path in (tmp_path / "cache").iterdir()) == made


def test_reference_leaves_the_layers_alone(tmp_path: Path) -> None:
    source = source_layout(tmp_path, layers())
    target = tmp_path / "out"
    image("convert", source, target, "--oci-ref", "--platform", "linux/amd64")
    manifest, config = unpacked(target, "", tmp_path)
    entries = manifest["layers"]
    assert isinstance(entries, list)
    # None of the layers is in the manifest, or whoever pulls it would unpack them; but they are there.
    referred = [entry["annotations"]["containerd.io/snapshot/nydus-ref"] for entry in entries[:-1]]
    assert referred == list(dict.fromkeys(digest_of(layer) for layer in layers()))
    assert all(entry["annotations"]["containerd.io/snapshot/nydus-blob"] for entry in entries[:-1])
    assert [blob_path(target, digest).read_bytes() for digest in referred] == list(dict.fromkeys(layers()))
    names = sorted(path.name for path in (tmp_path / "image").iterdir())
    assert names[-1] == "image.boot" and all(name.endswith(".blob.meta") for name in names[:-1])
    rootfs = config["rootfs"]
    assert isinstance(rootfs, dict) and len(rootfs["diff_ids"]) == len(entries)
    assert rows(tmp_path / "image/image.boot", target / "blobs/sha256").keys() == WANTED


@pytest.mark.parametrize("options", [(), ("--oci-ref",)], ids=["blobs", "reference"])
@pytest.mark.parametrize("form", ["pax", "gnu"])
def test_odd_layers_are_converted_in_full_and_packed_if_they_cannot_be_referred_to(
    tree: Path, expected: dict[str, Row], tmp_path: Path, form: str, options: tuple[str, ...]
) -> None:
    gnu_tar(tree, tmp_path / "tar", f"--format={form}", *(["--xattrs", "--xattrs-include=*"] if form == "pax" else []))
    sparse = sparse_1_0(b"1\n96\n4\n", 100)
    others = tar_of(file("twice", b"old and longer"), file("twice", b"new")) + odd_attributes("many/odd")
    data = [gzip.compress((tmp_path / "tar").read_bytes(), 1), gzip.compress(sparse), zstandard.compress(others)]
    source, target = source_layout(tmp_path, data), tmp_path / "out"
    image("convert", source, target, "--platform", "linux/amd64", *options)
    manifest, _ = unpacked(target, "", tmp_path)
    found = rows(tmp_path / "image/image.boot", target / "blobs/sha256")
    added = {name: found.pop(name) for name in ("thin", "twice", "many/odd")}
    contents = {"thin": bytes(96) + b"data", "twice": b"new", "many/odd": b"content"}
    assert {name: row["sha256"] for name, row in added.items()} == {
        name: hashlib.sha256(content).hexdigest() for name, content in contents.items()
    }
    assert added["many/odd"]["xattrs"] == ODD_ATTRIBUTES
    wanted = {path: row for path, row in expected.items() if path != "socket"}
    if form == "gnu":
        wanted = {
            path: {key: row[key] for key in row if key != "xattrs"} for path, row in whole_seconds(wanted).items()
        }
    assert differences(wanted, found) == []
    entries = manifest["layers"]
    assert isinstance(entries, list)
    referred = [entry["annotations"].get("containerd.io/snapshot/nydus-ref") for entry in entries[:-1]]
    assert referred == [digest_of(data[0]) if options else None, None, None]
    assert [blob_path(target, digest_of(layer)).exists() for layer in data] == [bool(options), False, False]
    assert sum(path.name.endswith(".blob.meta") for path in (tmp_path / "image").iterdir()) == len(options)


def test_registry_gives_and_takes_images(tmp_path: Path) -> None:
    source = source_layout(tmp_path, layers())
    (tmp_path / "registry").mkdir()
    with docker_registry(tmp_path / "registry") as registry:
        host = registry.host
        options = ("--platform", "linux/amd64", "--plain-http")
        there = image("convert", source, f"{host}/some/repo:nydus", *options)
        again = image("convert", source, tmp_path / "here", *options)
        assert there == again
        pull = contextlib.closing(Registry(f"{host}/some/repo:nydus", plain_http=True))
        with pull as made, pytest.raises(ImageError, match=r"/dev/full: cannot be written: .*the disk is full"):
            made.fetch(json.loads(made.manifest()[0])["layers"][-1], "/dev/full")
        text = refused("convert", f"{host}/some/repo:missing", tmp_path / "x", *options)
        assert "manifest: status 404" in text
        text = refused("convert", f"{host}/some/repo:nydus", tmp_path / "x", *options)
        assert "layer sha256:" in text  # a nydus blob is no tar


@pytest.mark.parametrize("auth", ["htpasswd", "token"])
def test_registry_that_wants_a_login_gets_docker_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], auth: str
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    (tmp_path / "keys").mkdir()
    source, authority = source_layout(tmp_path, layers()), Authority(tmp_path / "keys")
    tokens = TokenServer(authority)
    given: dict[str, object] = {"authority": authority, "tokens": tokens} if auth == "token" else {}
    with contextlib.closing(tokens), docker_registry(tmp_path / "registry", auth=auth, **given) as registry:
        target = f"{registry.host}/some/repo:nydus"
        options = ("--platform", "linux/amd64", "--plain-http")
        said = [refused("convert", source, target, *options)]
        assert "it wants credentials" in said[0] or "it gives no token (status 401)" in said[0]
        for password, right in ((b"user:wrong", False), (base64.b64decode(AUTH), True)):
            login = {"auths": {registry.host: {"auth": base64.b64encode(password).decode()}}}
            (tmp_path / "config.json").write_text(json.dumps(login))
            if right:
                said.append(image("convert", source, target, *options))
            else:
                said.append(refused("convert", source, target, *options))
                assert "status 401" in said[-1]
        assert image("convert", source, tmp_path / "here", "--platform", "linux/amd64") == said[-1]
        printed = "".join((*said, *capsys.readouterr()))
        assert AUTH not in printed and PASSWORD not in printed and "wrong" not in printed


def test_broken_images_are_refused_by_name(tmp_path: Path) -> None:
    bad = gzip.compress(tar_of(file("../../etc/passwd")))
    source = source_layout(tmp_path, [layers()[0], bad])
    text = refused("convert", source, tmp_path / "out", "--platform", "linux/amd64")
    assert digest_of(bad) in text and "leads out of the image" in text
    assert "no manifest for linux/vax, only for: linux/amd64, linux/s390x" in refused(
        "convert", source, tmp_path / "out", "--platform", "linux/vax"
    )
    assert "0 images named 'other'" in refused("convert", f"{source}:other", tmp_path / "out")
    blob_path(source, digest_of(bad)).write_bytes(b"damaged")
    assert "another digest" in refused("convert", source, tmp_path / "out", "--platform", "linux/amd64")
    assert "HOST/REPOSITORY:TAG is expected" in refused("convert", "Nothing", tmp_path / "out")
    assert not (tmp_path / "out/index.json").exists()
