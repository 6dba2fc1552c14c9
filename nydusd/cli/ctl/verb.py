"""What a verb of `nydusctl` is."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import NamedTuple

from nydusd.cli.ctl.connection import Api


def no_arguments(_: argparse.ArgumentParser) -> None:
    """For verbs without arguments."""


class Seconds:
    """An argparse type: a time of at least 0.1 s."""

    def __init__(self, most: int) -> None:
        self._most = most

    def __call__(self, text: str) -> float:
        try:
            seconds = float(text)
        except ValueError:
            seconds = 0.0
        if not 0.1 <= seconds <= self._most:
            raise argparse.ArgumentTypeError(f"must be seconds from 0.1 to {self._most}, but is {text[:32]!r}")
        return seconds


class Verb(NamedTuple):
    """`words` select it (`metrics`, `cache`). `run` yields texts to print and raises `NydusError`.

    One that needs no socket asks other daemons than the one that is named, if any is.
    """

    words: tuple[str, ...]
    help: str
    run: Callable[[Api, argparse.Namespace], Iterator[str]]
    add_arguments: Callable[[argparse.ArgumentParser], None] = no_arguments
    needs_socket: bool = True
