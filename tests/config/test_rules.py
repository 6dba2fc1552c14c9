"""Each rule broken once: the message names the key's path, what is wrong and what is allowed."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from nydusd.config import load_config, load_config_file, localfs_dir_config, with_registry_auth
from nydusd.errors import ConfigError

REGISTRY = {"host": "h", "repo": "r"}
BUCKET = {"endpoint": "e", "region": "r", "bucket_name": "b"}


def backend(kind: str, **table: object) -> dict[str, object]:
    return {"version": 2, "backend": {"type": kind, kind: table}}


def cache(kind: str, **tables: object) -> dict[str, object]:
    return {"version": 2, "cache": {"type": kind, **tables}}


def v1(**more: object) -> dict[str, object]:
    return {"device": {"backend": {"type": "localfs", "config": {"dir": "/b"}}}, "mode": "direct", **more}


def v1_device(**device: object) -> dict[str, object]:
    return {"device": {"backend": {"type": "localfs", "config": {"dir": "/b"}}, **device}, "mode": "direct"}


THREADS = "must be from 1 to 1024 when enabled, but is"
BATCH = "must be at most 268435456 bytes, but is 268435457"
TOO_MUCH = 0x10000001

BROKEN: list[tuple[dict[str, object], str]] = [
    ({"id": "x"}, "neither `version` (v2) nor `device` (v1) is there, so this is not a configuration"),
    ({"version": 3}, "version: must be 2, but is 3"),
    ({"version": "2"}, "version: must be a whole number from 0 to 4294967295, but is text"),
    ({"version": 2, "id": None}, "id: must be text, but is null"),
    ({"version": 2, "backend": {}}, "backend.type: is missing, it must be text"),
    ({"version": 2, "backend": []}, "backend: must be a table, but is a list"),
    (
        {"version": 2, "backend": {"type": "ftp"}},
        "backend.type: must be one of localdisk, localfs, oss, s3, registry, http-proxy, but is 'ftp'",
    ),
    (
        {"version": 2, "backend": {"type": "s3", "oss": BUCKET}},
        "backend.s3: is missing, it must be a table because backend.type is s3",
    ),
    (backend("localdisk"), "backend.localdisk.device_path: must not be empty"),
    (
        backend("localdisk", disable_gpt=1),
        "backend.localdisk.disable_gpt: must be true or false, but is a whole number",
    ),
    (backend("localfs"), "backend.localfs.dir: must not be empty, unless blob_file is set"),
    (backend("localfs", dir=7), "backend.localfs.dir: must be text, but is a whole number"),
    (backend("localfs", dir="/b", alt_dirs="/c"), "backend.localfs.alt_dirs: must be a list of texts, but is text"),
    (
        backend("localfs", dir="/b", alt_dirs=["/c", 1]),
        "backend.localfs.alt_dirs[1]: must be text, but is a whole number",
    ),
    (backend("oss", bucket_name="b"), "backend.oss.endpoint: is missing, it must be text"),
    (backend("oss", endpoint="e"), "backend.oss.bucket_name: is missing, it must be text"),
    (backend("oss", endpoint="", bucket_name="b"), "backend.oss.endpoint: must not be empty"),
    (backend("oss", endpoint="e", bucket_name=""), "backend.oss.bucket_name: must not be empty"),
    (backend("s3", region="r", bucket_name="b"), "backend.s3.endpoint: is missing, it must be text"),
    (backend("s3", endpoint="", bucket_name="b"), "backend.s3.region: is missing, it must be text"),
    (backend("s3", **{**BUCKET, "region": ""}), "backend.s3.region: must not be empty"),
    (backend("s3", **{**BUCKET, "bucket_name": ""}), "backend.s3.bucket_name: must not be empty"),
    (backend("registry", repo="r"), "backend.registry.host: is missing, it must be text"),
    (backend("registry", host="", repo="r"), "backend.registry.host: must not be empty"),
    (backend("registry", host="h", repo=""), "backend.registry.repo: must not be empty"),
    (backend("registry", **REGISTRY, auth=5), "backend.registry.auth: must be text, but is a whole number"),
    (
        backend("registry", **REGISTRY, auth="n0t-base64!"),
        "backend.registry.auth: must be base64 of user:password, but is not base64 of UTF-8 text",
    ),
    (
        backend("registry", **REGISTRY, auth="YWJj"),
        "backend.registry.auth: must be base64 of user:password, but the decoded text has no colon",
    ),
    (
        backend("registry", **REGISTRY, timeout=-1),
        "backend.registry.timeout: must be a whole number from 0 to 4294967295, but is -1",
    ),
    (
        backend("registry", **REGISTRY, connect_timeout=1.5),
        "backend.registry.connect_timeout: must be a whole number from 0 to 4294967295, but is a fraction",
    ),
    (
        backend("registry", **REGISTRY, retry_limit=256),
        "backend.registry.retry_limit: must be a whole number from 0 to 255, but is 256",
    ),
    (
        backend("registry", **REGISTRY, skip_verify="no"),
        "backend.registry.skip_verify: must be true or false, but is text",
    ),
    (
        backend("registry", **REGISTRY, proxy={"url": "ftp://p"}),
        "backend.registry.proxy.url: must be an http:// or https:// URL, or empty",
    ),
    (
        backend("registry", **REGISTRY, proxy={"url": "/var/run/proxy.sock"}),
        "backend.registry.proxy.url: must be an http:// or https:// URL, or empty",
    ),
    (
        backend("registry", **REGISTRY, proxy={"ping_url": "p/ing"}),
        "backend.registry.proxy.ping_url: must be an http:// or https:// URL, or empty",
    ),
    (
        backend("registry", **REGISTRY, proxy={"check_interval": True}),
        "backend.registry.proxy.check_interval: must be a whole number from 0 to 9223372036854775807, but is a boolean",
    ),
    (
        backend("registry", **REGISTRY, mirrors={}),
        "backend.registry.mirrors: must be a list of tables, but is a table",
    ),
    (backend("registry", **REGISTRY, mirrors=[{}]), "backend.registry.mirrors[0].host: is missing, it must be text"),
    (backend("registry", **REGISTRY, mirrors=[{"host": ""}]), "backend.registry.mirrors[0].host: must not be empty"),
    (
        backend("registry", **REGISTRY, mirrors=[{"host": "h", "ping_url": "x"}]),
        "backend.registry.mirrors[0].ping_url: must be an http:// or https:// URL, or empty",
    ),
    (
        backend("registry", **REGISTRY, mirrors=[{"host": "h", "headers": {"a": 1}}]),
        "backend.registry.mirrors[0].headers.a: must be text, but is a whole number",
    ),
    (backend("http-proxy"), "backend.http-proxy.addr: is missing, it must be text"),
    (
        backend("http-proxy", addr="proxy:80"),
        "backend.http-proxy.addr: must be an http:// or https:// URL, or the absolute path of a unix socket",
    ),
    (
        backend("http-proxy", addr="/nowhere.sock"),
        "backend.http-proxy.addr: must be the path of an existing unix socket: No such file or directory",
    ),
    (
        backend("http-proxy", addr="/dev/null"),
        "backend.http-proxy.addr: must be the path of an existing unix socket, but is another kind of file",
    ),
    (
        backend("http-proxy", addr="/a\0b"),
        "backend.http-proxy.addr: must be the path of an existing unix socket: not a path",
    ),
    (
        {"version": 2, "external_backends": [{"type": "t", "config": {}}]},
        "external_backends[0].patch: is missing, it must be a table of text values",
    ),
    (
        {"version": 2, "external_backends": [{"type": "t", "patch": {}, "config": {"a": None}}]},
        "external_backends[0].config.a: must be text, but is null",
    ),
    (
        cache("ramcache"),
        "cache.type: must be one of blobcache, filecache, fscache, dummycache, empty, but is 'ramcache'",
    ),
    (cache("blobcache"), "cache.filecache: is missing, it must be a table because cache.type is blobcache"),
    (cache("filecache"), "cache.filecache: is missing, it must be a table because cache.type is filecache"),
    (cache("fscache"), "cache.fscache: is missing, it must be a table because cache.type is fscache"),
    (cache("filecache", filecache={"work_dir": ""}), "cache.filecache.work_dir: must not be empty"),
    (cache("fscache", fscache={"work_dir": ""}), "cache.fscache.work_dir: must not be empty"),
    (
        cache("filecache", filecache={"encryption_key": "s3cr3t"}),
        "cache.filecache.encryption_key: must be 64 hexadecimal digits",
    ),
    (
        cache("filecache", filecache={"enable_encryption": True, "encryption_key": "a" * 64}),
        "cache.filecache.enable_encryption: is not supported yet, it must be false",
    ),
    (cache("", prefetch={}), "cache.prefetch.enable: is missing, it must be true or false"),
    (cache("", prefetch={"enable": True, "threads": 0}), f"cache.prefetch.threads: {THREADS} 0"),
    (cache("", prefetch={"enable": True, "threads": 1025}), f"cache.prefetch.threads: {THREADS} 1025"),
    (cache("", prefetch={"enable": True, "batch_size": TOO_MUCH}), f"cache.prefetch.batch_size: {BATCH}"),
    (
        cache("", prefetch={"enable": True, "bandwidth_limit": 1 << 32}),
        "cache.prefetch.bandwidth_limit: must be a whole number from 0 to 4294967295, but is 4294967296",
    ),
    (
        cache("", prefetch={"enable": True, "threads": 10**40}),
        "cache.prefetch.threads: must be a whole number from 0 to 9223372036854775807, but is far outside",
    ),
    ({"version": 2, "rafs": {"mode": "fast"}}, "rafs.mode: must be direct or cached, but is 'fast'"),
    ({"version": 2, "rafs": {"batch_size": TOO_MUCH}}, f"rafs.batch_size: {BATCH}"),
    ({"version": 2, "rafs": {"prefetch": None}}, "rafs.prefetch: must be a table, but is null"),
    ({"version": 2, "rafs": {"prefetch": {"enable": True, "threads": 0}}}, f"rafs.prefetch.threads: {THREADS} 0"),
    ({"version": 2, "overlay": {"work_dir": "w"}}, "overlay.upper_dir: is missing, it must be text"),
    ({"version": 2, "overlay": {"upper_dir": "", "work_dir": "w"}}, "overlay.upper_dir: must not be empty"),
    ({"version": 2, "overlay": {"upper_dir": "u", "work_dir": ""}}, "overlay.work_dir: must not be empty"),
    (
        {"version": 2, "nydusd": {"fetch_workers": 1025}},
        "nydusd.fetch_workers: must be a whole number from 0 to 1024, but is 1025",
    ),
    (
        {"version": 2, "nydusd": {"decompress_workers": -1}},
        "nydusd.decompress_workers: must be a whole number from 0 to 1024, but is -1",
    ),
    (
        {"version": 2, "nydusd": {"read_deadline": 0}},
        "nydusd.read_deadline: must be a number from 0.1 to 86400, but is 0",
    ),
    (
        {"version": 2, "nydusd": {"checkpoint_interval": "5s"}},
        "nydusd.checkpoint_interval: must be a number from 0.1 to 86400, but is text",
    ),
    (
        {"version": 2, "nydusd": {"arena_size": 4096}},
        "nydusd.arena_size: must be a whole number from 1048576 to 68719476736, but is 4096",
    ),
    # v1, with the names of v1 in every message
    ({"device": {}}, "device.backend: is missing, it must be a table"),
    ({"device": {"backend": {"type": "localfs"}}}, "device.backend.config: is missing, it must be a table"),
    ({"device": {"backend": {"type": "localfs", "config": {"dir": "/b"}}}}, "mode: is missing, it must be text"),
    (
        {"device": {"backend": {"type": "http-proxy", "config": {}}}, "mode": "direct"},
        "device.backend.type: must be one of localdisk, localfs, oss, s3, registry, but is 'http-proxy'",
    ),
    (
        {"device": {"backend": {"type": "localfs", "config": {}}}, "mode": "direct"},
        "device.backend.config.dir: must not be empty, unless blob_file is set",
    ),
    (
        {"device": {"backend": {"type": "localfs", "config": {"dir": []}}}, "mode": "direct"},
        "device.backend.config.dir: must be text, but is a list",
    ),
    (
        v1_device(cache={"type": "x"}),
        "device.cache.type: must be one of blobcache, filecache, fscache, dummycache, empty, but is 'x'",
    ),
    (
        v1_device(cache={"type": "blobcache"}),
        "device.cache.config: must be a table for cache type blobcache, but is null",
    ),
    (
        v1_device(cache={"type": "blobcache", "config": {"work_dir": ""}}),
        "device.cache.config.work_dir: must not be empty",
    ),
    (
        v1_device(cache={"type": "blobcache", "config": {"enable_encryption": True}}),
        "device.cache.config.enable_encryption: is not supported yet, it must be false",
    ),
    ({**v1(), "mode": "slow"}, "mode: must be direct or cached, but is 'slow'"),
    (v1(amplify_io=TOO_MUCH), f"amplify_io: {BATCH}"),
    (v1(fs_prefetch={"enable": True, "threads_count": 0}), f"fs_prefetch.threads_count: {THREADS} 0"),
    (v1(fs_prefetch={"enable": True, "merging_size": TOO_MUCH}), f"fs_prefetch.merging_size: {BATCH}"),
    (
        v1(fs_prefetch={"bandwidth_rate": "1M"}),
        "fs_prefetch.bandwidth_rate: must be a whole number from 0 to 4294967295, but is text",
    ),
]


@pytest.mark.parametrize(("data", "message"), BROKEN, ids=[message.split(":")[0] for _, message in BROKEN])
def test_broken_rule_is_named(data: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(json.dumps(data), "c.json")
    assert str(error.value) == f"c.json: {message}"


def test_prefetch_limits_hold_only_when_enabled() -> None:
    load_config(json.dumps(cache("", prefetch={"enable": False, "threads": 0, "batch_size": TOO_MUCH})), "test")


@pytest.mark.parametrize("kind", ["", "dummycache"])
def test_cache_without_folder(kind: str) -> None:
    config = load_config(json.dumps(cache(kind)), "test")
    assert config.cache is not None
    assert config.cache.work_dir is None


def test_unix_socket_as_http_proxy(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        config = load_config(json.dumps(backend("http-proxy", addr=path)), "test")
    assert config.backend is not None
    assert config.backend.type == "http-proxy"


def test_blank_registry_auth_means_none() -> None:
    config = load_config(json.dumps(backend("registry", **REGISTRY, auth=" \n")), "test")
    assert config.backend is not None
    assert config.backend.registry is not None
    assert config.backend.registry.auth is None


def test_unknown_keys_are_ignored_and_collected_with_their_paths() -> None:
    text = {
        "version": 2,
        "verbose": True,
        "backend": {"type": "localfs", "localfs": {"dir": "/b", "readahead": False, "we ird\n": 1}},
        "unknown_keys": ["x"],
        "rafs": {"prefetch": {"enable": False, "warmup": {"deep": {"er": 1}}}},
    }
    config = load_config(json.dumps(text), "test")
    assert config.unknown_keys == (
        "backend.localfs.readahead",
        "backend.localfs.'we ird\\n'",
        "rafs.prefetch.warmup",
        "verbose",
        "unknown_keys",
    )


IGNORED: dict[str, dict[str, object]] = {
    "overlay: ": {"overlay": {"upper_dir": "/u", "work_dir": "/w"}},
    "external_backends: ": {"external_backends": [{"type": "t", "patch": {}, "config": {}}]},
    "rafs.prefetch.stream_prefetch: ": {"rafs": {"prefetch": {"enable": True, "stream_prefetch": True}}},
}


@pytest.mark.parametrize("name", IGNORED)
def test_what_is_known_and_ignored_is_a_warning_and_where_it_is_not_asked_for_none(name: str) -> None:
    (warning,) = load_config(json.dumps({"version": 2} | IGNORED[name]), "test").warnings
    assert warning.startswith(f"{name}ignored")
    assert load_config('{"version": 2, "rafs": {"prefetch": {"enable": true}}}', "test").warnings == ()


def test_unknown_keys_of_the_snapshotter_in_v1() -> None:
    text = v1_device(cache={"type": "blobcache", "config": {"x": 1}})
    text["id_mapping"] = [0, 1, 2]
    assert load_config(json.dumps(text), "test").unknown_keys == ("id_mapping", "device.cache.config.x")


def test_unknown_keys_collected_are_bounded() -> None:
    text = json.dumps({"version": 2, **{f"k{number}": 1 for number in range(50_000)}})
    assert len(load_config(text, "test").unknown_keys) == 100


def test_compressed_cache_is_accepted_with_a_warning() -> None:
    config = load_config(json.dumps(cache("", compressed=True)), "test")
    assert config.warnings == ("cache.compressed: ignored, the cache keeps uncompressed data",)


def test_file_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_text('version = 2\nid = "é"')
    assert load_config_file(str(path)).id == "é"


def test_file_of_exactly_the_limit_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_text('{"version":2}'.ljust(1 << 20))
    assert load_config_file(str(path)).version == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b" " * ((1 << 20) + 1), "has more than 1048576 bytes"),
        (b"version = 2\xff", "the configuration is not UTF-8 at byte 11"),
    ],
)
def test_wrong_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "c"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_config_file(str(path))
    assert str(error.value) == f"{path}: {message}"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nowhere", "/nowhere: cannot be read: No such file or directory"),
        ("/dev/zero", "/dev/zero: must be a regular file"),
        ("/tmp", "/tmp: must be a regular file"),
        ("/a\0b", "/a\0b: cannot be read: not a path"),
    ],
)
def test_unreadable_file(path: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config_file(path)
    assert str(error.value) == message


def test_empty_localfs_dir() -> None:
    with pytest.raises(ConfigError, match="--localfs-dir: must not be empty"):
        localfs_dir_config("")


def test_wrong_auth_from_elsewhere_names_where() -> None:
    config = load_config(json.dumps(backend("registry", **REGISTRY)), "test")
    with pytest.raises(ConfigError) as error:
        with_registry_auth(config, "c2VjcmV0", "IMAGE_PULL_AUTH")
    assert str(error.value) == "IMAGE_PULL_AUTH: must be base64 of user:password, but the decoded text has no colon"


def test_auth_from_elsewhere_replaces_the_one_in_the_text() -> None:
    config = load_config(json.dumps(backend("registry", **REGISTRY, auth="YTpi")), "test")
    changed = with_registry_auth(config, " Yzpk\n", "test")
    assert changed.backend is not None
    assert changed.backend.registry is not None
    assert changed.backend.registry.auth == "Yzpk"


def test_auth_from_elsewhere_is_nothing_to_a_local_folder() -> None:
    config = localfs_dir_config("/d")
    assert with_registry_auth(config, "not even base64", "test") is config


@pytest.mark.parametrize("address", ["", "127.0.0.1:9300", "0.0.0.0:1", "[::1]:65535"])
def test_metrics_address(address: str) -> None:
    assert (
        load_config(json.dumps({"version": 2, "nydusd": {"metrics_listen": address}}), "c").nydusd.metrics_listen
        == address
    )


@pytest.mark.parametrize(
    "address", ["9300", ":9300", "localhost:9300", "127.0.0.1", "127.0.0.1:0", "1.2.3.4:65536", "::1:x"]
)
def test_metrics_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"nydusd\.metrics_listen: must be IP:PORT"):
        load_config(json.dumps({"version": 2, "nydusd": {"metrics_listen": address}}), "c")
