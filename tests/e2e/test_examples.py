"""conf/registry-v2.toml mounts an image, as it is but for the registry's name and the cache folder."""

from __future__ import annotations

from pathlib import Path

from tests.support.daemon import Daemon
from tests.support.faulty_server import faulty, part_of
from tests.support.mounted import Tree

EXAMPLE = Path(__file__).parents[2] / "conf/registry-v2.toml"


def test_the_example_of_a_registry_mounts_an_image(tmp_path: Path) -> None:
    tree = Tree(["one", "two"], tmp_path)
    blob = (tree.bootstrap.parent / "blobs" / tree.blob_id).read_bytes()
    with faulty() as server:
        server.handlers[f"/v2/shop/frontend/blobs/sha256:{tree.blob_id}"] = lambda request: part_of(blob, request)
        text = EXAMPLE.read_text()
        changes = {
            "registry.example.org": server.host,
            '"https"': '"http"',
            "/var/lib/nydus/cache": str(tmp_path / "cache"),
        }
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "example.toml").write_text(text)
        daemon = Daemon(tree.bootstrap, tmp_path / "cache", cache=tmp_path / "cache")
        daemon.command[daemon.command.index("-C") + 1] = str(tmp_path / "example.toml")
        with daemon:
            assert {name: (daemon.mountpoint / name).read_bytes() for name in tree.contents} == tree.contents
        assert server.requests
