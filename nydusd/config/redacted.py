"""A configuration for other eyes: the API's answer, and the values that no log may show. Pure."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping

from nydusd.config.model import SECRET_NAME, URL_KEYS, Config, Table
from nydusd.redact import user_info


def redacted(config: Config) -> dict[str, object]:
    """The complete v2 form as JSON-ready data, null for absent tables, without keys, passwords, tokens and signed queries."""
    return config.shown()


def secret_values(config: Config) -> list[str]:
    """Every secret in a configuration, in each form it may be met in a text; for `logs.register_secret`."""
    return [value for value in _secrets(config, is_url=False) if value]


def _secrets(value: object, is_url: bool) -> Iterator[str]:
    if isinstance(value, Table):
        for name in value.__struct_fields__:
            item = getattr(value, name)
            if name not in value.SECRETS:
                yield from _secrets(item, name in URL_KEYS)
            elif item is not None:
                yield from (item, *_password(item if name == "auth" else ""))
    elif isinstance(value, tuple):
        for item in value:
            yield from _secrets(item, is_url)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from (item,) if SECRET_NAME.search(name) else _secrets(item, "://" in item)
    elif isinstance(value, str) and is_url:
        yield from _user_info(value)


def settings_secrets(values: Mapping[str, str]) -> list[str]:
    """The same of what is set at run time: `registry_auth`, and all else are URLs."""
    found: list[str] = []
    for name, value in values.items():
        found += [value, *_password(value)] if name == "registry_auth" else _user_info(value)
    return [value for value in found if value]


def _user_info(url: str) -> tuple[str, str]:
    """`user:password` and the password of an URL; empty where it has none."""
    pair = user_info(url)
    return pair, pair.partition(":")[2]


def _password(auth: str) -> list[str]:
    """`user:password` and the password of a base64 text, where it is one."""
    try:
        pair = base64.b64decode(auth, validate=True).decode()
    except ValueError:
        return []
    return [pair, pair.partition(":")[2]]
