"""The node's own file: it fills in what a configuration does not say in the table `nydusd`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nydusd.config import bare_config, load_config, localfs_dir_config
from nydusd.config import node as node_file
from nydusd.errors import ConfigError

V1 = {"device": {"backend": {"type": "localfs", "config": {"dir": "/blobs"}}}, "mode": "direct"}
V2 = {"version": 2, "backend": {"type": "localfs", "localfs": {"dir": "/blobs"}}}


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "nydusd.toml"
    node_file._read.cache_clear()
    monkeypatch.setenv("NYDUSD_DEFAULTS", str(path))
    return path


@pytest.mark.parametrize("form", [V1, V2])
def test_what_a_configuration_does_not_say_the_node_does(node: Path, form: dict[str, object]) -> None:
    node.write_text('[nydusd]\ncache_quota = 1000\nread_deadline = 5.0\nmetrics_listen = "127.0.0.1:9"\n')
    config = load_config(json.dumps(form | {"nydusd": {"read_deadline": 7}}), "it").nydusd
    assert (config.cache_quota, config.read_deadline, config.metrics_listen) == (1000, 7.0, "127.0.0.1:9")
    assert load_config(json.dumps(form), "it").nydusd.read_deadline == 5.0
    assert bare_config().nydusd == localfs_dir_config("/blobs").nydusd == load_config(json.dumps(form), "it").nydusd


def test_what_runs_stays_as_it_was_started(node: Path) -> None:
    """A file that is wrong now fails no mount of a daemon that serves."""
    node.write_text("[nydusd]\ncache_quota = 1000\n")
    assert bare_config().nydusd.cache_quota == 1000
    node.write_text("[nydusd")
    assert load_config(json.dumps(V1), "it").nydusd.cache_quota == 1000


def test_without_the_file_all_is_as_documented(node: Path) -> None:
    assert load_config(json.dumps(V2), "it").nydusd == bare_config().nydusd
    assert bare_config().nydusd.cache_quota == 0


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[nydusd]\ncache_qouta = 1\n", "nydusd.cache_qouta: unknown"),
        ("[backend]\ntype = 'localfs'\n", "backend: unknown"),
        ("[nydusd]\ncache_quota = 'much'\n", "nydusd.cache_quota: "),
        ("[nydusd]\nmetrics_listen = 'nowhere'\n", "nydusd.metrics_listen: "),
        ("nydusd = 1\n", "nydusd: must be a table"),
        ("[nydusd", "not valid TOML"),
        ("\xff", "not valid TOML"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(node: Path, text: str, complaint: str) -> None:
    node.write_text(text, encoding="latin-1")
    for load in (bare_config, lambda: load_config(json.dumps(V2), "it")):
        with pytest.raises(ConfigError) as raised:
            load()
        assert str(raised.value).startswith(f"{node}: {complaint}")
