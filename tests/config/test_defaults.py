"""Every key that may be left out has the default that clients count on. Golden tables, written out once more here."""

from __future__ import annotations

import json
import os

import msgspec
import pytest

from nydusd.config import Config, load_config, localfs_dir_config

PROXY = {
    "url": "",
    "ping_url": "",
    "fallback": True,
    "check_interval": 5,
    "use_http": False,
    "check_pause_elapsed": 300,
    "dragonfly_scheduler_endpoint": "",
}
REMOTE = {
    "skip_verify": False,
    "ca_cert_files": [],
    "timeout": 5,
    "connect_timeout": 5,
    "retry_limit": 0,
    "failure_memory": 5.0,
    "proxy": PROXY,
    "mirrors": [],
}
KEYS = {
    "scheme": "https",
    "object_prefix": "",
    "access_key_id": "",
    "access_key_secret": "",
    "session_token": "",
    "credentials_file": "",
}
BACKENDS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "localdisk": ({"device_path": "/dev/x"}, {"device_path": "/dev/x", "disable_gpt": False}),
    "localfs": ({"dir": "/b"}, {"blob_file": "", "dir": "/b", "alt_dirs": []}),
    "oss": ({"endpoint": "e", "bucket_name": "b"}, {**REMOTE, **KEYS, "endpoint": "e", "bucket_name": "b"}),
    "s3": (
        {"endpoint": "", "region": "r", "bucket_name": "b"},
        {**REMOTE, **KEYS, "endpoint": "", "region": "r", "bucket_name": "b", "virtual_host": False},
    ),
    "registry": (
        {"host": "h", "repo": "r"},
        {
            **REMOTE,
            "scheme": "https",
            "host": "h",
            "repo": "r",
            "auth": None,
            "registry_token": None,
            "blob_url_scheme": "",
            "blob_redirected_host": "",
        },
    ),
    "http-proxy": ({"addr": "http://h"}, {**REMOTE, "addr": "http://h", "path": ""}),
}
NO_PREFETCH = {
    "enable": False,
    "threads": 0,
    "batch_size": 0,
    "bandwidth_limit": 0,
    "prefetch_all": False,
    "stream_prefetch": False,
}
PREFETCH = {**NO_PREFETCH, "enable": True, "threads": 8, "batch_size": 1 << 20}
RAFS = {
    "mode": "direct",
    "batch_size": 1 << 20,
    "validate": False,
    "enable_xattr": False,
    "iostats_files": False,
    "access_pattern": False,
    "latest_read_files": False,
    "prefetch": NO_PREFETCH,
}
CACHE = {
    "type": "",
    "compressed": False,
    "validate": False,
    "filecache": None,
    "fscache": None,
    "prefetch": NO_PREFETCH,
}
FILE_CACHE = {
    "work_dir": ".",
    "disable_indexed_map": False,
    "enable_encryption": False,
    "enable_convergent_encryption": False,
    "encryption_key": "",
}
TUNING = {
    "front_ends": 0,
    "decompress_workers": 0,
    "fetch_workers": 0,
    "read_deadline": 60.0,
    "checkpoint_interval": 5.0,
    "worker_patience": 10.0,
    "worker_idle": 15.0,
    "node_decompress_workers": 0,
    "node_fetch_workers": 0,
    "arena_size": 64 << 20,
    "cache_quota": 0,
    "cache_keep": 10,
    "guardian": 0.0,
    "metrics_listen": "",
}
NOTHING = {"localdisk": None, "localfs": None, "oss": None, "s3": None, "registry": None, "http-proxy": None}


def load(data: dict[str, object]) -> dict[str, object]:
    """The tables of a text as plain data, lists for tuples, secrets as they are."""
    config = load_config(json.dumps(data), "test")
    assert config.unknown_keys == ()
    plain: dict[str, object] = json.loads(msgspec.json.encode(config))
    del plain["unknown_keys"], plain["warnings"]
    return plain


def v1(**device: object) -> dict[str, object]:
    return {"device": {"backend": {"type": "localfs", "config": {"dir": "/b"}}, **device}, "mode": "direct"}


def test_v2_with_nothing_but_its_version() -> None:
    assert load({"version": 2}) == {
        "version": 2,
        "id": "",
        "backend": None,
        "external_backends": [],
        "cache": None,
        "rafs": None,
        "overlay": None,
        "nydusd": TUNING,
    }


@pytest.mark.parametrize("kind", BACKENDS)
def test_v2_backend(kind: str) -> None:
    given, expected = BACKENDS[kind]
    assert load({"version": 2, "backend": {"type": kind, kind: given}})["backend"] == {
        "type": kind,
        **NOTHING,
        kind: expected,
    }


@pytest.mark.parametrize("kind", sorted(set(BACKENDS) - {"http-proxy"}))
def test_v1_backend(kind: str) -> None:
    given, expected = BACKENDS[kind]
    text: dict[str, object] = {"device": {"backend": {"type": kind, "config": given}}, "mode": "direct"}
    assert load(text)["backend"] == {"type": kind, **NOTHING, kind: expected}


def test_mirror() -> None:
    table = {"host": "h", "repo": "r", "mirrors": [{"host": "m"}]}
    config = load_config(json.dumps({"version": 2, "backend": {"type": "registry", "registry": table}}), "test")
    assert config.backend is not None
    assert config.backend.registry is not None
    (mirror,) = config.backend.registry.mirrors
    assert msgspec.to_builtins(mirror) == {
        "host": "m",
        "ping_url": "",
        "headers": {},
        "health_check_interval": 5,
        "failure_limit": 5,
        "health_check_pause_elapsed": 300,
    }
    assert config.warnings == ()


def test_v2_empty_tables() -> None:
    plain = load({"version": 2, "cache": {}, "rafs": {}, "nydusd": {}})
    assert plain["cache"] == CACHE
    assert plain["rafs"] == RAFS
    assert plain["nydusd"] == TUNING


def test_v2_cache_folders_and_prefetch_that_says_only_enable() -> None:
    enable = {"enable": True}
    cache = {"type": "blobcache", "filecache": {}, "fscache": {}, "prefetch": enable}
    plain = load({"version": 2, "cache": cache, "rafs": {"prefetch": enable}})
    assert plain["cache"] == {
        **CACHE,
        "type": "blobcache",
        "filecache": FILE_CACHE,
        "fscache": {"work_dir": "."},
        "prefetch": PREFETCH,
    }
    assert plain["rafs"] == {**RAFS, "prefetch": PREFETCH}


def test_v1_with_nothing_that_can_be_left_out() -> None:
    plain = load(v1())
    assert plain["version"] == 2
    assert plain["id"] == ""
    assert plain["external_backends"] == []
    assert plain["cache"] == CACHE
    assert plain["rafs"] == RAFS
    assert plain["overlay"] is None
    assert plain["nydusd"] == TUNING


def test_v1_prefetch_that_says_only_enable_reads_everything_and_fills_both_tables() -> None:
    plain = load({**v1(cache={"type": "blobcache", "config": {}}), "fs_prefetch": {"enable": True}})
    expected = {**PREFETCH, "prefetch_all": True}
    assert plain["rafs"] == {**RAFS, "prefetch": expected}
    assert plain["cache"] == {**CACHE, "type": "blobcache", "filecache": FILE_CACHE, "prefetch": expected}


def test_v1_values_go_to_their_v2_places() -> None:
    text = {
        "device": {
            "id": "/42",
            "backend": {"type": "localfs", "config": {"dir": "/srv/blobs", "alt_dirs": ["/srv/old"]}},
            "external_backends": [{"patch": {"a": "b"}, "type": "t", "config": {"c": "d"}}],
            "cache": {"type": "fscache", "validate": True, "config": {"work_dir": "/srv/cache"}},
        },
        "mode": "cached",
        "digest_validate": True,
        "enable_xattr": True,
        "iostats_files": True,
        "access_pattern": True,
        "latest_read_files": True,
        "amplify_io": 131072,
        "fs_prefetch": {
            "enable": True,
            "threads_count": 2,
            "merging_size": 262144,
            "bandwidth_rate": 10485760,
            "prefetch_all": False,
            "stream_prefetch": True,
        },
        "nydusd": {"fetch_workers": 3},
    }
    prefetch = {
        "enable": True,
        "threads": 2,
        "batch_size": 262144,
        "bandwidth_limit": 10485760,
        "prefetch_all": False,
        "stream_prefetch": True,
    }
    assert load(text) == {
        "version": 2,
        "id": "/42",
        "backend": {
            "type": "localfs",
            **NOTHING,
            "localfs": {"blob_file": "", "dir": "/srv/blobs", "alt_dirs": ["/srv/old"]},
        },
        "external_backends": [{"patch": {"a": "b"}, "type": "t", "config": {"c": "d"}}],
        "cache": {
            **CACHE,
            "type": "fscache",
            "validate": True,
            "fscache": {"work_dir": "/srv/cache"},
            "prefetch": prefetch,
        },
        "rafs": {
            "mode": "cached",
            "batch_size": 131072,
            "validate": True,
            "enable_xattr": True,
            "iostats_files": True,
            "access_pattern": True,
            "latest_read_files": True,
            "prefetch": prefetch,
        },
        "overlay": None,
        "nydusd": {**TUNING, "fetch_workers": 3},
    }


def test_localfs_dir() -> None:
    plain = json.loads(msgspec.json.encode(localfs_dir_config("/d")))
    assert plain["backend"] == {
        "type": "localfs",
        **NOTHING,
        "localfs": {"blob_file": "", "dir": "/d", "alt_dirs": []},
    }
    assert plain["cache"] == {**CACHE, "type": "blobcache", "filecache": {**FILE_CACHE, "work_dir": "/d"}}
    assert plain["rafs"] == RAFS


def test_a_configuration_survives_the_way_to_another_process() -> None:
    text = json.dumps({"version": 2, "backend": {"type": "http-proxy", "http-proxy": {"addr": "http://h"}}, "what": 1})
    config = load_config(text, "test")
    assert msgspec.json.decode(msgspec.json.encode(config), type=Config) == config


@pytest.mark.parametrize(
    ("kind", "workers", "expected"), [("localfs", 0, 1), ("registry", 0, 4), ("localfs", 7, 7), ("registry", 2, 2)]
)
def test_fetch_workers(kind: str, workers: int, expected: int) -> None:
    text = {"version": 2, "backend": {"type": kind, kind: BACKENDS[kind][0]}, "nydusd": {"fetch_workers": workers}}
    assert load_config(json.dumps(text), "test").fetch_worker_count == expected


def test_front_ends_are_one_for_each_two_cores_unless_told_and_never_more_than_threads() -> None:
    cores = len(os.sched_getaffinity(0))
    assert load_config('{"version":2}', "test").front_end_count(1024) == max(1, cores // 2)
    assert load_config('{"version":2}', "test").front_end_count(1) == 1
    assert load_config('{"version":2,"nydusd":{"front_ends":7}}', "test").front_end_count(1024) == 7
    assert load_config('{"version":2,"nydusd":{"front_ends":7}}', "test").front_end_count(3) == 3


def test_decompress_workers_are_as_many_as_cores_unless_told() -> None:
    assert Config().decompress_worker_count == len(os.sched_getaffinity(0))
    assert load_config('{"version":2,"nydusd":{"decompress_workers":3}}', "test").decompress_worker_count == 3
