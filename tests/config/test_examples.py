"""The examples in conf/ load as they are, and say nothing that is ignored."""

from __future__ import annotations

from pathlib import Path

import pytest

from nydusd.config import bare_config, load_config_file

FOLDER = Path(__file__).parents[2] / "conf"
BACKENDS = {"localfs-v1.json": "localfs", "localfs-v2.toml": "localfs", "registry-v2.toml": "registry"}


def test_every_example_is_tested() -> None:
    assert {path.name for path in FOLDER.iterdir()} - {"README.md", "grafana.json", "nydusd.toml"} == set(BACKENDS)


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
