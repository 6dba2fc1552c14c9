"""Where images that the kernel mounts are shown: the folders below the base, made where they lack and removed afterwards.

Used by the supervisor. After SIGKILL a folder that was made is known: it is noted before it is made.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable

from nydusd.frontends.erofs import mount_api

_FOLDER_MODE = 0o755


def path_of(base: str, place: str) -> str:
    """The path of a mount that the API calls `place`."""
    return base if place == "/" else base.rstrip("/") + place


def is_inside(place: str, other: str) -> bool:
    """Whether one place is below the other."""
    return place != other and place.startswith(other.rstrip("/") + "/")


def open_folder(base: str, place: str, note: Callable[[str], None]) -> int:
    """The folder to mount on, made if it is not there, and never outside of the base: no symbolic link is followed.

    `note(folder)` is called before one is made. Raises MountError, OSError.
    """
    root = os.open(base, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        path = ""
        for name in place.split("/")[1:] if place != "/" else ():
            above, path = path, f"{path}/{name}".lstrip("/")
            try:
                os.close(mount_api.open_below(root, path))
            except FileNotFoundError:
                note(f"{base.rstrip('/')}/{path}")
                parent = mount_api.open_below(root, above or ".")
                try:
                    os.mkdir(name, _FOLDER_MODE, dir_fd=parent)
                finally:
                    os.close(parent)
        return mount_api.open_below(root, path or ".")
    finally:
        os.close(root)


def remove_unused(folders: Iterable[str], used: Iterable[str]) -> tuple[str, ...]:
    """Remove those of the folders that hold no mount; gives the others. What an operator has put something into stays, too."""
    left = []
    for folder in sorted(folders, key=len, reverse=True):
        if any(place == folder or is_inside(place, folder) for place in used):
            left.append(folder)
            continue
        with contextlib.suppress(OSError):
            os.rmdir(folder)
    return tuple(left)
