"""Whatever the text: a configuration or a `ConfigError`, nothing else."""

from __future__ import annotations

import contextlib
import json

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from nydusd.config import Config, load_config, redacted, secret_values
from nydusd.config.legacy import V1Backend, V1Cache, V1Config, V1Device, V1Prefetch
from nydusd.config.model import (
    S3,
    Backend,
    Cache,
    ExternalBackend,
    FileCache,
    FsCache,
    HttpProxy,
    LocalDisk,
    LocalFs,
    Mirror,
    Oss,
    Overlay,
    Prefetch,
    Proxy,
    Rafs,
    Registry,
    Tuning,
)
from nydusd.errors import ConfigError

TABLES = (
    *(Config, Backend, Cache, Rafs, Prefetch, FileCache, FsCache, Overlay, Tuning, ExternalBackend, Mirror, Proxy),
    *(LocalDisk, LocalFs, Oss, S3, Registry, HttpProxy, V1Config, V1Device, V1Backend, V1Cache, V1Prefetch),
)
KEYS = sorted({field.encode_name for table in TABLES for field in msgspec.structs.fields(table)})
WORDS = ("localfs", "registry", "s3", "http-proxy", "blobcache", "fscache", "direct", "/b", "http://h", "YTpi", "")

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(WORDS)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), inner),
    max_leaves=20,
)


def accept_or_refuse(text: str) -> None:
    with contextlib.suppress(ConfigError):
        config = load_config(text, "test")
        json.dumps(redacted(config))
        secret_values(config)
        repr(config)


@given(values)
def test_any_json(value: object) -> None:
    accept_or_refuse(json.dumps(value))


@given(st.dictionaries(st.sampled_from(KEYS), values))
def test_any_v2_keys(table: dict[str, object]) -> None:
    accept_or_refuse(json.dumps({**table, "version": 2}))


@given(
    st.sampled_from(("localfs", "registry", "oss", "s3", "localdisk")), st.dictionaries(st.sampled_from(KEYS), values)
)
def test_any_backend_table(kind: str, table: dict[str, object]) -> None:
    accept_or_refuse(json.dumps({"version": 2, "backend": {"type": kind, kind: table}}))
    accept_or_refuse(
        json.dumps({"device": {"backend": {"type": kind, "config": table}, "cache": table}, "mode": "direct"})
    )


@given(st.text(max_size=200))
def test_any_text(text: str) -> None:
    accept_or_refuse(text)


@given(
    st.lists(
        st.sampled_from([*KEYS, "=", ".", "[", "]", "{", "}", '"', "'", "\n", "1", ",", "-", "#", ":"]), max_size=60
    )
)
def test_anything_like_toml(parts: list[str]) -> None:
    accept_or_refuse("version = 2\n" + "".join(parts))
