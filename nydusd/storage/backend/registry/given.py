"""Credentials of a registry that are given while the daemon runs (by its API), in memory only.

The supervisor puts them into the store that all fetch workers share; each worker takes them over with its next request.
A worker that is killed and started again finds them there; they end with the daemon.
"""

from __future__ import annotations

import time

from nydusd.config.model import Registry
from nydusd.config.parse import BadKey
from nydusd.config.rules import check_auth
from nydusd.errors import ConfigError
from nydusd.storage.backend.http.store import Entry, SharedStore


def give_credentials(store: SharedStore, table: Registry, auth: str) -> None:
    """Use other credentials for this repository from the next request on: base64 of `user:password`, empty for docker's.

    What was refused with the old ones is asked for again. A configured `registry_token` is not used any more.
    Raises `ConfigError`, without the value, if it is not of that form.
    """
    try:
        check_auth("registry_auth", auth)
    except BadKey as error:
        raise ConfigError(f"{error.path}: {error.problem}") from None
    store.put(_key(table), {"auth": auth.strip(), "at": time.monotonic()})
    store.drop_all("no-token:")
    for scheme in ("http", "https"):
        store.drop_all(f"no:{scheme}://{table.host}/v2/{table.repo}/")


def given_credentials(store: SharedStore, table: Registry) -> Entry | None:
    """What was given last: `auth`, and `at` (`time.monotonic()`), by which a change is noticed. None: nothing yet."""
    return store.get(_key(table))


def _key(table: Registry) -> str:
    return f"auth:{table.host}/{table.repo}"
