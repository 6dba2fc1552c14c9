"""From a configuration text or file to a checked `Config`.

Runs in the process that was given the text (the command line, later the mount API). A text is JSON or TOML of the v2 form
(it has the key `version`) or JSON of the v1 form (it has the key `device`). Existing clients try v2 first, so a JSON text
with both keys is v2 unless a v2 key has the wrong type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, cast

import msgspec

from nydusd.config.file import read_named_file
from nydusd.config.legacy import read_v1, v1_path
from nydusd.config.model import Backend, Cache, Config, FileCache, LocalFs, Rafs, Registry, Remote
from nydusd.config.node import bare_config, node_defaults
from nydusd.config.parse import BadKey, TableReader, kind_of
from nydusd.config.rules import check, check_auth, warnings
from nydusd.errors import ConfigError

MAX_TEXT: Final = 1 << 20
"""Longest configuration text in bytes."""
_MAX_DOTS_A_LINE: Final = 256
"""tomllib needs time quadratic in the parts of a dotted key: one 1 MiB key would take hours."""


def load_config(text: str, where: str) -> Config:
    """Recognise, convert and check a text. `where` names its origin in messages.

    What it does not say in the table `nydusd` is as the node's defaults say (`node.py`). Raises `ConfigError` for anything
    that is not a valid configuration, with the path of the key at fault.
    """
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ConfigError(f"{where}: the configuration is not valid Unicode text") from None
    if size > MAX_TEXT:
        raise ConfigError(f"{where}: the configuration has {size} bytes, the limit is {MAX_TEXT}")
    data = _parse_json(text, where) if text.lstrip().startswith("{") else _parse_toml(text, where)
    given = data.get("nydusd", {})
    if isinstance(given, dict) and (defaults := node_defaults()):
        data["nydusd"] = defaults | given
    try:
        return _convert(data)
    except BadKey as error:
        raise ConfigError(
            f"{where}: {error.path}: {error.problem}" if error.path else f"{where}: {error.problem}"
        ) from None


def load_config_file(path: str) -> Config:
    """Load a configuration file of at most 1 MiB. Raises `ConfigError`, also for a file that cannot be read."""
    data = read_named_file(path, MAX_TEXT, path)
    try:
        return load_config(data.decode(), path)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: the configuration is not UTF-8 at byte {error.start}") from None


def localfs_dir_config(path: str) -> Config:
    """The configuration that `--localfs-dir PATH` stands for: blobs and cache in one folder, no prefetch, no validation."""
    if not path:
        raise ConfigError("--localfs-dir: must not be empty")
    return Config(
        backend=Backend(type="localfs", localfs=LocalFs(dir=path)),
        cache=Cache(type="blobcache", filecache=FileCache(work_dir=path)),
        rafs=Rafs(),
        nydusd=bare_config().nydusd,
    )


def with_registry_auth(config: Config, auth: str, where: str) -> Config:
    """The same configuration with other registry credentials (base64 of `user:password`), unchanged without a registry.

    Raises `ConfigError`; `where` names the origin of `auth` in its message.
    """
    if config.backend is None or config.backend.registry is None:
        return config
    try:
        check_auth(where, auth)
    except BadKey as error:
        raise ConfigError(f"{error.path}: {error.problem}") from None
    registry = msgspec.structs.replace(config.backend.registry, auth=auth.strip() or None)
    return msgspec.structs.replace(config, backend=msgspec.structs.replace(config.backend, registry=registry))


def with_settings(config: Config, values: Mapping[str, str]) -> Config:
    """The same configuration with other `registry_auth`, `proxy_url`, `dragonfly_scheduler_endpoint`, where it has such.

    Raises `ConfigError` that begins with the name of the wrong one.
    """
    if "registry_auth" in values:
        config = with_registry_auth(config, values["registry_auth"], "registry_auth")
    names = {"proxy_url": "url", "dragonfly_scheduler_endpoint": "dragonfly_scheduler_endpoint"}
    changes = {names[key]: value for key, value in values.items() if key in names}
    backend = config.backend
    table = None if backend is None else backend.chosen()
    if not changes or backend is None or not isinstance(table, Remote):
        return config
    remote = msgspec.structs.replace(table, proxy=msgspec.structs.replace(table.proxy, **changes))
    changed = msgspec.structs.replace(
        config, backend=msgspec.structs.replace(backend, **{backend.type.replace("-", "_"): remote})
    )
    try:
        check(changed)
    except BadKey as error:
        raise ConfigError(f"{error.path}: {error.problem}") from None
    return changed


def settings_of(config: Config) -> dict[str, str]:
    """What a configuration itself says of those that can be set at run time."""
    backend = config.backend
    table = None if backend is None else backend.chosen()
    if not isinstance(table, Remote):
        return {}
    proxy = table.proxy
    found = {"proxy_url": proxy.url, "dragonfly_scheduler_endpoint": proxy.dragonfly_scheduler_endpoint}
    if isinstance(table, Registry):
        found["registry_auth"] = table.auth or ""
    return {key: value for key, value in found.items() if value}


def _parse_json(text: str, where: str) -> dict[str, object]:
    try:
        data: object = msgspec.json.decode(text)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: the configuration is not valid JSON: {_cause(error)}") from None
    return _object(data, where)


def _parse_toml(text: str, where: str) -> dict[str, object]:
    import tomllib  # half of the import time of this package, and most texts are JSON

    for number, line in enumerate(text.split("\n"), 1):
        if line.count(".") > _MAX_DOTS_A_LINE:
            raise ConfigError(f"{where}: line {number} has more than {_MAX_DOTS_A_LINE} dots")
    try:
        return _object(tomllib.loads(text), where)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: the configuration is neither JSON nor valid TOML: {_cause(error)}") from None


def _object(data: object, where: str) -> dict[str, object]:
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: the configuration must be a table, but is {kind_of(data)}")
    return cast(dict[str, object], data)


def _cause(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]


def _convert(data: dict[str, object]) -> Config:
    if "version" not in data and "device" not in data:
        raise BadKey("", "neither `version` (v2) nor `device` (v1) is there, so this is not a configuration")
    if "version" in data:
        reader = TableReader()
        try:
            config = reader.table(Config, data, "")
        except BadKey:
            if "device" not in data:
                raise
        else:
            check(config)
            return _finish(config, reader)
    reader = TableReader()
    config = read_v1(reader, data)
    try:
        check(config)
    except BadKey as error:
        raise BadKey(v1_path(error.path), error.problem) from None
    return _finish(config, reader)


def _finish(config: Config, reader: TableReader) -> Config:
    """What follows from the keys of a valid configuration."""
    backend = config.backend
    if backend is not None and backend.registry is not None and backend.registry.auth is not None:
        registry = msgspec.structs.replace(backend.registry, auth=backend.registry.auth.strip() or None)
        backend = msgspec.structs.replace(backend, registry=registry)
    return msgspec.structs.replace(
        config,
        backend=backend,
        unknown_keys=tuple(reader.unknown),
        warnings=tuple(warnings(config)),
    )
