"""A registry that asks for a password: the snapshotter puts it into the daemon's configuration, and nobody else sees it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.containerd.images import SMALL, find_image
from tests.containerd.node import Node, http_get
from tests.containerd.oci import push_image
from tests.support.discipline import cmdline, descendants
from tests.support.registry import AUTH, PASSWORD, docker_registry


def test_an_image_of_a_registry_with_a_password_runs(tmp_path: Path) -> None:
    with docker_registry(tmp_path / "registry", auth="htpasswd") as registry, Node("dedicated") as node:
        reference = push_image(registry, "shop/python", find_image(SMALL), {"Authorization": f"Basic {AUTH}"})
        with pytest.raises(AssertionError, match="authorization failed"):
            node.nerdctl("pull", "--quiet", reference)
        node.log_in(registry.host, AUTH)
        assert node.run_python(reference, "import json; print(42)") == "42\n"

        (log,) = node.watch_daemon_logs()
        (pid,) = node.daemon_pids()
        config = next((node.folder / "sn" / "config").glob("*/config.json")).read_text()
        assert AUTH in config
        sock = next((node.folder / "sn" / "socket").glob("*/api.sock"))
        shown = [log.read_text(), str(http_get(str(sock), "/api/v1/daemon"))]
        shown += [cmdline(process) for process in [pid, *descendants(pid)]]
        assert not [text for text in shown if AUTH in text or PASSWORD in text]
