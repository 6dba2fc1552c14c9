"""What holds for all daemons of a node: a file with the table `nydusd`, which is under what a configuration says.

nydus-snapshotter fills a template that knows no key of ours, and starts a shared daemon without a configuration: there this
file is the only place for a quota, a deadline or the number of workers. It need not be there.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Final

from nydusd.config.file import read_named_file
from nydusd.config.model import Config, Tuning
from nydusd.config.parse import BadKey, TableReader
from nydusd.config.rules import check
from nydusd.errors import ConfigError

PATH: Final = "/etc/nydusd.toml"
VARIABLE: Final = "NYDUSD_DEFAULTS"
"""Names another file."""
_SIZE_MAX: Final = 1 << 16


def node_defaults() -> dict[str, object]:
    """The keys of the node's file as it was when this process first asked: what is running stays as it was started.

    Raises ConfigError for a wrong file: a typing error must not cost the quota.
    """
    return _read(os.environ.get(VARIABLE, PATH), os.getpid())


@cache
def _read(path: str, _pid: int) -> dict[str, object]:
    """`_pid`: a copy of this process looks by itself."""
    if not os.path.lexists(path):
        return {}
    import tomllib  # takes longer than all else here, and most nodes have no such file

    text = read_named_file(path, _SIZE_MAX, path)
    try:
        data = tomllib.loads(text.decode())
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{path}: not valid TOML: {str(e)[:200]}") from None
    table = data.pop("nydusd", {})
    reader = TableReader()
    try:
        check(Config(nydusd=reader.table(Tuning, table, "nydusd")))
    except BadKey as e:
        raise ConfigError(f"{path}: {e.path}: {e.problem}") from None
    for unknown in [*data, *reader.unknown]:
        raise ConfigError(
            f"{path}: {unknown}: unknown; it may have the table nydusd, with the keys that a configuration has there"
        )
    return dict(table)


def bare_config() -> Config:
    """What a daemon without a configuration starts with. Raises ConfigError."""
    return Config(nydusd=TableReader().table(Tuning, node_defaults(), "nydusd"))
