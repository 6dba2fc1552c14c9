"""A blob entry: what `PUT /api/v2/blobs` and the configuration file of `nydusd singleton` say of one image. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from nydusd.config.load import load_config
from nydusd.config.model import Config
from nydusd.errors import ConfigError

BOOTSTRAP: Final = "bootstrap"
_MAX_ID: Final = 1024


@dataclass(frozen=True, slots=True)
class BlobEntry:
    """An image to be served to the kernel: `metadata` is the path of its bootstrap."""

    id: str
    domain_id: str
    config: Config
    metadata: str
    text: str = ""
    """What it was read from, as JSON."""


def parse_blob_entry(raw: Mapping[str, object], where: str) -> BlobEntry:
    """The entry that an object describes. Raises ConfigError that begins with `where` and names the key."""
    kind = _text(raw, "type", where)
    name = _text(raw, "id", where)
    domain = _text(raw, "domain_id", where) if raw.get("domain_id") is not None else ""
    if kind != BOOTSTRAP:
        raise ConfigError(f"{where}: type: must be {BOOTSTRAP!r}, but is {kind[:32]!r}")
    for key, value in (("id", name), ("domain_id", domain)):
        if "/" in value or "\0" in value or len(value) > _MAX_ID or value in (".", ".."):
            raise ConfigError(f"{where}: {key}: must be a name without '/', but is {value[:64]!r}")
    if not name:
        raise ConfigError(f"{where}: id: must not be empty")
    given = raw.get("config_v2") or raw.get("config")
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: one of `config_v2` and `config` must be an object")
    metadata = given.get("metadata_path")
    if not isinstance(metadata, str) or not metadata:
        raise ConfigError(f"{where}: metadata_path: must be the path of the image's bootstrap")
    tables = _v2(given) if raw.get("config_v2") else _v1(given)
    config = load_config(json.dumps(tables), where)
    cache = config.cache
    if cache is None or cache.type not in ("fscache", "filecache", "blobcache"):
        raise ConfigError(f"{where}: the type of its cache must be 'fscache' or 'filecache'")
    return BlobEntry(name, domain, config, metadata, json.dumps(raw))


def parse_singleton_config(text: bytes, where: str) -> list[BlobEntry]:
    """The entries of a singleton's configuration file, a JSON object. Raises ConfigError."""
    try:
        data = msgspec.json.decode(text)
    except (msgspec.MsgspecError, ValueError, RecursionError) as e:
        raise ConfigError(f"{where}: the configuration is not valid JSON: {e}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: the configuration must be an object")
    blobs = data.get("blobs", [])
    if not isinstance(blobs, list) or not all(isinstance(blob, dict) for blob in blobs):
        raise ConfigError(f"{where}: blobs: must be a list of objects")
    return [parse_blob_entry(blob, f"{where}: blobs[{i}]") for i, blob in enumerate(blobs)]


def _text(raw: Mapping[str, object], key: str, where: str) -> str:
    value = raw.get(key)
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {key}: must be a text")
    return value


def _v2(given: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in given.items() if key != "metadata_path"}


def _v1(given: Mapping[str, object]) -> dict[str, object]:
    """The tables of a v1 text. Its cache may be `fscache`, which v1 texts write with the same keys as `blobcache`."""
    kind = given.get("cache_type")
    prefetch = given.get("prefetch_config")
    return {
        "device": {
            "id": given.get("id", ""),
            "backend": {"type": given.get("backend_type"), "config": given.get("backend_config")},
            "cache": {"type": kind, "config": given.get("cache_config")},
        },
        "mode": "direct",
        **({} if prefetch is None else {"fs_prefetch": prefetch}),
    }
