"""What a daemon that serves fscache leaves when it ends or is killed while images are mounted, for its guard and the next one.

Two files beside the run-time folder, replaced at once, readable for their owner only: `NAME.fscache.json` says who holds the
device and which files there are, `NAME.fscache.images.json` how the images are fetched (it may hold secrets; the guard does
not read it). Written by the supervisor at each change, so a SIGKILL of it loses nothing. One that is killed when it has started
a guard in the place of one that was killed, and not named it yet, leaves that to the guard.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from nydusd.errors import CacheError, ScarceError, is_scarce
from nydusd.ipc.borrow import borrow
from nydusd.ipc.messages import Json
from nydusd.storage.state.lock import is_there, start_time

_SYSFS = "/sys/fs/erofs"


class Held(msgspec.Struct):
    """`holder`: pid and start time of the guard; `device`: its descriptor; `sizes`: bytes of each file, by "DOMAIN/KEY".

    `mounts`: what the kernel calls the images' file systems.
    """

    holder: tuple[int, int]
    device: int
    sizes: dict[str, int]
    mounts: list[str]

    def is_alive(self) -> bool:
        """Whether the guard that is named lives, or that cannot be told now."""
        pid, start = self.holder
        return start != 0 and start_time(pid) in (start, -1)

    def is_used(self) -> bool:
        """Whether one of the images is mounted, in whichever mount namespace."""
        return any(os.path.isdir(f"{_SYSFS}/{name}") for name in self.mounts)


class Taken(NamedTuple):
    """`device`: a descriptor of it, ours. `guard`: who holds it still (pid, start time). `images`: None if none are noted."""

    device: int
    guard: tuple[int, int] | None
    images: list[Json] | None


class Files(NamedTuple):
    """The paths."""

    held: Path
    told: Path

    @classmethod
    def beside(cls, folder: str) -> Files:
        path = Path(folder)
        return cls(path.with_suffix(".fscache.json"), path.with_suffix(".fscache.images.json"))

    def write(self, held: Held, images: Sequence[Mapping[str, object]]) -> None:
        """Raises CacheError; also when it could not be told when the guard was started, by which who takes over knows it."""
        _check_start(self.held, held)
        _write(self.told, {"images": list(images)})
        _write(self.held, msgspec.to_builtins(held))

    def name(self, held: Held) -> None:
        """A guard writes itself down, whose supervisor could not. Raises CacheError, as `write`."""
        _check_start(self.held, held)
        _write(self.held, msgspec.to_builtins(held), ".guard.tmp")  # a successor may be writing, too

    def read(self) -> Held | None:
        """None if there is nothing that can be used. Raises ScarceError when that cannot be told now."""
        try:
            return msgspec.json.decode(self.held.read_bytes(), type=Held)
        except OSError as e:
            if is_scarce(e):
                raise ScarceError(f"{self.held}: {e.strerror}", e.errno) from e
            return None
        except msgspec.MsgspecError:
            return None

    def take(self, stored: int | None) -> Taken | None:
        """What is there to go on with; None if nobody holds the device. Raises CacheError.

        Also where it cannot be told whether the guard lives: two who answer the kernel would each have a part of what it says.
        `stored`: the device as systemd, or who keeps our session, has kept it, for when no guard lives; it is ours.
        """
        held = self.read()
        if held is None or not is_there(*held.holder):
            return None if stored is None else Taken(stored, None, self.images())
        try:
            pid, start = held.holder
            device = borrow(pid, held.device, lambda: start_time(pid) == start)
        except OSError as e:
            if stored is not None:
                return Taken(stored, held.holder, self.images())
            kind = ScarceError if is_scarce(e) else CacheError
            raise kind(f"{self.held}: pid {held.holder[0]} does not give its device: {e.strerror}") from e
        if stored is not None:
            os.close(stored)
        return Taken(device, held.holder, self.images())

    def images(self) -> list[Json] | None:
        """Those that are noted, None if nothing is. What cannot be read costs the images, not the device.

        Raises ScarceError when it cannot be read now.
        """
        try:
            return list(json.loads(self.told.read_bytes())["images"])
        except OSError as e:
            if is_scarce(e):
                raise ScarceError(f"{self.told}: {e.strerror}", e.errno) from e
        except (ValueError, KeyError, TypeError):
            pass
        return None

    def remove(self) -> None:
        for path in self:
            path.unlink(missing_ok=True)


def _check_start(path: Path, held: Held) -> None:
    if held.holder[1] < 0:
        raise ScarceError(f"{path}: the start time of pid {held.holder[0]} cannot be read now")


def _write(path: Path, content: Any, suffix: str = ".tmp") -> None:
    temporary = path.with_name(path.name + suffix)
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with open(fd, "w") as file:
            json.dump(content, file)
        os.replace(temporary, path)
    except OSError as e:
        raise CacheError(f"{path}: {e.strerror}", e.errno) from e
