"""What the constructors of backends have in common: the plain form of a table back to the typed one, and the store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import msgspec

from nydusd.config.model import Table
from nydusd.errors import ConfigError
from nydusd.storage.backend.http.store import SharedStore

T = TypeVar("T", bound=Table)
B = TypeVar("B")


def read_table(kind: str, config: Mapping[str, object], table: type[T]) -> T:
    """The table of a backend from its plain form. Raises `ConfigError`, without a value in its text."""
    try:
        return msgspec.convert(dict(config), table)
    except msgspec.ValidationError as error:
        raise ConfigError(f"backend {kind}: {error}") from error


def with_store(make: Callable[[SharedStore], B], shared_fd: int) -> B:
    """What `make` gives for the store in the memfd `shared_fd`, which is closed again if there is an error."""
    store = SharedStore(shared_fd)
    try:
        return make(store)
    except BaseException:
        store.close()
        raise
