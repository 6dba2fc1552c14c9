"""The examples in conf/ load as they are, and say nothing that is ignored."""

from __future__ import annotations

from pathlib import Path

import pytest

from nydusd.config import bare_config, load_config_file

FOLDER = Path(__file__).parents[2] / "conf"
BACKENDS = {
    "localfs-v1.json": "localfs",
    "localfs-v2.toml": "localfs",
    "nydusd-registry-v1.json": "registry",
    "registry-v2.toml": "registry",
}
OTHERS = {"README.md", "grafana.json", "nydusd.toml", "containerd-nydus.toml", "nydus-snapshotter.toml"}
"""The last two are what tests/containerd runs."""


def test_every_example_is_tested() -> None:
    assert {path.name for path in FOLDER.iterdir()} - OTHERS == set(BACKENDS)
    explained = (FOLDER / "README.md").read_text()
    assert [name for name in BACKENDS.keys() | OTHERS if f"`{name}`" not in explained] == ["README.md"]


@pytest.mark.parametrize("name", BACKENDS)
def test_example_loads(name: str) -> None:
    config = load_config_file(str(FOLDER / name))
    assert config.backend is not None
    assert config.backend.type == BACKENDS[name]
    assert config.unknown_keys == ()
    assert config.warnings == ()
    assert config.cache is not None
    assert config.cache.prefetch.enable


def test_the_two_local_examples_say_the_same() -> None:
    old = load_config_file(str(FOLDER / "localfs-v1.json"))
    new = load_config_file(str(FOLDER / "localfs-v2.toml"))
    assert old == new


def test_the_example_for_a_node_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NYDUSD_DEFAULTS", str(FOLDER / "nydusd.toml"))  # no other test names this one
    assert bare_config().nydusd.cache_quota == 20_000_000_000
