"""What a mount or a remount asks for. Part of the supervisor; nothing here outlives a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nydusd.errors import NydusError
from nydusd.supervisor.mount_table import parse_place

if TYPE_CHECKING:
    from nydusd.cli.options import FuseOptions
    from nydusd.config import Config

Done = Callable[[NydusError | None], None]
"""Told how an operation ended: None for well."""


class WorkFailedError(NydusError):
    """A worker could not do what a mount needs; the message is the worker's."""


class Request:
    """What a mount or a remount asks for. `files` is the prefetch list, None for the image's own.

    `text` is what the configuration was read from; None for that of the command line.
    """

    def __init__(
        self, place: str, source: str, config: Config, files: Sequence[bytes] | None, text: str | None = None
    ) -> None:
        self.text = text
        self.place, self.names = parse_place(place)
        self.source = source
        self.config = config
        self.files = files


def first_request(options: FuseOptions, config: Config) -> Request | None:
    """The image of the command line. Raises ConfigError for a prefetch list that cannot be read."""
    if options.bootstrap is None:
        return None
    files = None
    if options.prefetch_files is not None:
        from nydusd.cli.prefetch_list import read_prefetch_list

        files = read_prefetch_list(options.prefetch_files)
    return Request(options.virtual_mountpoint, options.bootstrap, config, files)
