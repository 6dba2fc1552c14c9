"""Which image a verb of `nydusctl` is about: the only one, or the one named by --mountpoint. Runs in the `nydusctl` process."""

from __future__ import annotations

import argparse

from nydusd.cli.ctl.connection import Api, Json, RequestFailed
from nydusd.cli.ctl.text import list_at, printable
from nydusd.errors import NydusError

_LOAD = "/api/v1/nydusd/load"


def add_mountpoint(parser: argparse.ArgumentParser) -> None:
    """The option by which an image is named."""
    parser.add_argument(
        "-m", "--mountpoint", metavar="PATH", help="the image at this place (needed if there are several)"
    )


def metrics_of(api: Api, path: str, mountpoint: str | None) -> Json:
    """What is counted at `path` of the image at `mountpoint`, None for the only one.

    Raises RequestFailed; if there is another image than the one meant, NydusError with the places of all.
    """
    try:
        return api.get(path, None if mountpoint is None else {"id": mountpoint})
    except RequestFailed as error:
        if "NoCounter" not in str(error):
            raise
        try:
            places = [printable(str(place)) for place in list_at(api.get(_LOAD), "images")]
        except RequestFailed:  # not one of ours
            raise error from None
        if not places:
            raise
        raise NydusError(f"--mountpoint: name one of {', '.join(places)}") from error
