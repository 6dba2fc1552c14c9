"""Images that `nydus-image convert` made in a registry run under nydus-snapshotter, and their old layers are not pulled."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest
import zstandard

from nydusd.image.oci.model import OCI_CONFIG, OCI_LAYER_GZIP, OCI_MANIFEST, digest_of, packed
from tests.containerd.images import cache_folder
from tests.containerd.node import Node
from tests.image.build import image, refused
from tests.image.test_create_tar import file, folder, tar_of
from tests.support.registry import AUTH, PASSWORD, DockerRegistry, docker_registry

REPO = "shop/mini"
HEADERS = {"Authorization": f"Basic {AUTH}"}
LIBRARIES = "lib/x86_64-linux-gnu"


def layers() -> list[bytes]:
    """Two layers with a shell, `cat` and what these need: the upper one removes a file and changes another. It is zstd, which
    cannot be referred to: with --oci-ref there is a layer of either kind."""
    tree = cache_folder() / "debian-python3"
    loader = (tree / LIBRARIES / "ld-linux-x86-64.so.2").read_bytes()
    lower = tar_of(
        folder("etc/"),
        file("etc/gone"),
        file("etc/changed", b"old"),
        *(
            file(f"bin/{to}", (tree / "bin" / name).read_bytes(), mode=0o755)
            for to, name in (("sh", "dash"), ("cat",) * 2)
        ),
        file(f"{LIBRARIES}/libc.so.6", (tree / LIBRARIES / "libc.so.6").read_bytes(), mode=0o755),
        file("lib64/ld-linux-x86-64.so.2", loader, mode=0o755),
    )
    upper = tar_of(file("etc/.wh.gone", b""), file("etc/changed", b"new"))
    return [gzip.compress(lower, 1, mtime=0), zstandard.compress(upper)]


def push(registry: DockerRegistry, data: list[bytes]) -> str:
    """An OCI image of these layers: its reference."""
    tars = [digest_of(gzip.decompress(data[0])), digest_of(zstandard.decompress(data[1]))]
    config = packed(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Env": ["PATH=/bin"], "Cmd": ["/bin/sh"]},
            "rootfs": {"type": "layers", "diff_ids": tars},
        }
    )
    for blob in (*data, config):
        registry.push(REPO, blob, hashlib.sha256(blob).hexdigest(), HEADERS)

    def entry(kind: str, blob: bytes) -> dict[str, object]:
        return {"mediaType": kind, "digest": digest_of(blob), "size": len(blob)}

    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": entry(OCI_CONFIG, config),
        "layers": [entry(OCI_LAYER_GZIP, data[0]), entry(OCI_LAYER_GZIP.replace("gzip", "zstd"), data[1])],
    }
    registry.push_manifest(REPO, "oci", OCI_MANIFEST, json.dumps(manifest).encode(), HEADERS)
    return f"{registry.host}/{REPO}:oci"


def test_converted_images_run_and_their_old_layers_are_not_pulled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    data = layers()
    with docker_registry(tmp_path / "registry", auth="htpasswd") as registry, Node("dedicated") as node:
        source = push(registry, data)
        node.log_in(registry.host, AUTH)
        options = ("--plain-http", "--platform", "linux/amd64")
        assert "it wants credentials" in refused("convert", source, f"{registry.host}/{REPO}:nydus", *options)
        (tmp_path / "config.json").write_text(json.dumps({"auths": {registry.host: {"auth": AUTH}}}))
        out = tmp_path / "out"
        out.mkdir()
        for name, more in (("nydus", ()), ("ref", ("--oci-ref",))):
            target = f"{registry.host}/{REPO}:{name}"
            said = image("convert", source, target, *options, *more)
            assert AUTH not in said and PASSWORD not in said
            script = f"cd /etc; {{ cat changed; echo; echo *; }} >/out/{name}"
            node.nerdctl("run", "--rm", "--net", "host", "--volume", f"{out}:/out", target, "sh", "-c", script)
            text = (out / name).read_text()
            assert text.startswith("new\nchanged") and "gone" not in text
        pulled = {path.name for path in node.folder.glob("ctd/root/*.content/blobs/sha256/*")}
        assert pulled and not pulled & {hashlib.sha256(layer).hexdigest() for layer in data}
        node.watch_daemon_logs()
