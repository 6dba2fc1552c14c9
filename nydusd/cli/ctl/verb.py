"""What a verb of `nydusctl` is."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import NamedTuple

from nydusd.cli.ctl.connection import Api


def no_arguments(_: argparse.ArgumentParser) -> None:
    """For verbs without arguments."""


class Verb(NamedTuple):
    """`words` select it (`metrics`, `cache`). `run` yields texts to print and raises `NydusError`.

    One that needs no socket asks other daemons than the one that is named, if any is.
    """

    words: tuple[str, ...]
    help: str
    run: Callable[[Api, argparse.Namespace], Iterator[str]]
    add_arguments: Callable[[argparse.ArgumentParser], None] = no_arguments
    needs_socket: bool = True
