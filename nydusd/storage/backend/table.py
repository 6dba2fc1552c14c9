"""From the plain form in which a configuration table reaches a worker back to the typed one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import msgspec

from nydusd.config.model import Table
from nydusd.errors import ConfigError

T = TypeVar("T", bound=Table)


def read_table(kind: str, config: Mapping[str, object], table: type[T]) -> T:
    """The table of a backend from its plain form. Raises `ConfigError`, without a value in its text."""
    try:
        return msgspec.convert(dict(config), table)
    except msgspec.ValidationError as error:
        raise ConfigError(f"backend {kind}: {error}") from error
