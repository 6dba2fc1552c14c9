"""The table of mounts: which image is mounted where in the file system, as the supervisor publishes it to its front ends.

Runs in the supervisor. In its folder: `table.json` (the places: mount points and the folders that lead to them) and two files
a mount: `INDEX.REVISION.json`, which a front end reads when it first needs the image, and `INDEX.REVISION.record` (mode 0600),
from which the next supervisor knows it again. A change is written to files, and then made known by one store to a number in
shared memory, which front ends compare before each request.

After SIGKILL between the two, front ends go on with the table before, which is whole, until the next supervisor publishes
the one that is written: what `table.json` names is there, and files that it does not name are removed by `take_over`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from nydusd import points
from nydusd.errors import CacheError, MountError
from nydusd.ipc.messages import Json
from nydusd.ipc.shared_number import make_number, map_number
from nydusd.supervisor.checked import read_checked, write_checked

log = logging.getLogger(__name__)

INDEX_MAX = (1 << 28) - 2
"""Indexes that the front ends' node ids have room for; the next is that of the folders between mounts."""
_NAME_MAX = 255
_PATH_MAX = 4096
_ROOT = 1


class PlaceError(MountError):
    """A mount point is not a path, is taken, is in use, or is not there."""


def parse_place(text: str) -> tuple[str, tuple[bytes, ...]]:
    """A mount point inside the file system as its one spelling, and its names. Raises PlaceError."""
    try:
        raw = os.fsencode(text)
    except UnicodeEncodeError:
        raise PlaceError(f"mount point {text[:64]!r} must be valid Unicode text") from None
    names = tuple(name for name in raw.split(b"/") if name not in (b"", b"."))
    if not raw.startswith(b"/"):
        raise PlaceError(f"mount point {text[:64]!r} must begin with '/'")
    if b"\0" in raw or b".." in names or len(raw) > _PATH_MAX or any(len(name) > _NAME_MAX for name in names):
        raise PlaceError(
            f"mount point {text[:64]!r} must be a path without '..', of names of at most {_NAME_MAX} bytes"
        )
    return "/" + os.fsdecode(b"/".join(names)), names


def known_place(text: str) -> str:
    """The spelling by which an image is known that somebody asks for; any other text as it is."""
    try:
        return parse_place(text)[0]
    except PlaceError:
        return text


class _Place:
    """A folder in the tree of mount points. `index` is that of the image mounted on it, or None."""

    def __init__(self, number: int, parent: _Place | None, name: bytes) -> None:
        self.number = number
        self.parent = parent
        self.name = name
        self.changed = time.time_ns()
        self.index: int | None = None
        self.revision = 0
        self.children: dict[bytes, _Place] = {}

    def below(self) -> Iterator[_Place]:
        """This place and all below it, parents first."""
        todo = [self]
        while todo:
            place = todo.pop()
            yield place
            todo += place.children.values()


class MountTable:
    """`folder` is made; `name` is that of the shared number."""

    def __init__(self, folder: Path, name: str) -> None:
        self._begin(folder, name)
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as e:
            raise CacheError(f"{folder}: {e.strerror}", e.errno) from e
        self._shared = make_number(name)
        self.publish()

    def _begin(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self._root = _Place(_ROOT, None, b"")
        self._next = 1
        self._next_number = _ROOT + 1
        self._first = True

    @classmethod
    def take_over(cls, folder: Path, name: str) -> Self:
        """The table of a supervisor that was killed, not published anew yet. Raises CacheError when it is not whole."""
        table = cls.__new__(cls)
        table._begin(folder, name)
        raw = read_checked(folder / "table.json")
        try:
            table._next, table._next_number, table._first = (
                int(raw["next"][0]),
                int(raw["next"][1]),
                bool(raw["next"][2]),
            )
            places: dict[int, _Place] = {}
            for number, parent, name_hex, changed, index, revision in raw["places"]:
                above = None if number == _ROOT else places[parent]
                place = places[number] = _Place(number, above, bytes.fromhex(name_hex))
                place.changed, place.index, place.revision = changed, index, revision
                if above is not None:
                    above.children[place.name] = place
            table._root = places[_ROOT]
        except (ValueError, LookupError, TypeError) as e:
            raise CacheError(f"{folder}/table.json: not a table of mounts: {e!r}") from e
        table._shared = map_number(name, to_write=True)
        return table

    def mounted(self) -> list[tuple[int, str]]:
        """Of each mounted image its index and its mount point."""
        return [(place.index, _path(place)) for place in self._root.below() if place.index is not None]

    def record(self, names: Sequence[bytes]) -> Json:
        """What `add` or `replace` was given last for the image that is mounted here. Raises CacheError."""
        place = self._mounted(names)
        return read_checked(self._folder / f"{place.index}.{place.revision}.record")

    def forget(self, names: Sequence[bytes]) -> None:
        """Unmount an image, whatever is mounted inside it. That is known once it is published."""
        self._clear(self._mounted(names))

    def lose(self, names: Sequence[bytes]) -> None:
        """The same, known at once. Raises CacheError when that cannot be written: then it is known with the next change."""
        place = self._mounted(names)
        old = f"{place.index}.{place.revision}"
        self._clear(place)
        self.publish()
        self._remove(old)

    def next_term(self, noted: int) -> int:
        """That of the supervisor that takes this table over. `noted`: what is written down of the last one's.

        It may not have been able to write, or that may be damaged: by shared memory, too, it is known who has published the
        table. What front ends have of one supervisor, arenas and handles, must not be called like anything of the next one.
        """
        return max(noted, self._shared[1]) + 1

    def begin_term(self, term: int) -> None:
        """Publish a table that was taken over, and that another supervisor does so; remove files that it does not name.

        One that cannot be written, as the run-time folder is full, is published as it is there. Whoever was to be left out
        of it (`forget`) stays in it, with nothing to read it from, until it can be written. The term is in shared memory alone.
        """
        named = {"table"} | {f"{p.index}.{p.revision}" for p in self._root.below() if p.index is not None}
        for path in self._folder.iterdir():
            if path.stem not in named:
                path.unlink(missing_ok=True)
        points.reach("mounts: unnamed files removed")
        self._shared[1] = term
        try:
            self._write()
        except CacheError as e:
            log.warning("%s; front ends go on with the table that is there", e)
        self._announce()

    def spec(self) -> Json:
        """What a front end must know to read the table."""
        return {"folder": str(self._folder), "shared": self._name}

    def under(self, names: Sequence[bytes]) -> tuple[int, int] | None:
        """(index, number of names above it) of the mounted image that has this path inside it, None if none has."""
        found = None
        place: _Place | None = self._root
        for depth, name in enumerate(names):
            if place is None:
                break
            if place.index is not None:
                found = (place.index, depth)
            place = place.children.get(name)
        return found

    def check_free(self, names: Sequence[bytes]) -> None:
        """Raises PlaceError when an image is mounted here, or below here, where this one would hide it."""
        place = self._find(names)
        if place is None:
            return
        if place.index is not None:
            raise PlaceError("object or filesystem already exists")
        hidden = next((_path(below) for below in place.below() if below.index is not None), None)
        if hidden is not None:
            raise PlaceError(f"it would hide what is mounted at {hidden}")

    def add(self, names: Sequence[bytes], spec: Json, record: Json | None = None) -> int:
        """Mount an image; gives its index. Raises what `check_free` raises, and CacheError when nothing can be written.

        `spec` is for front ends, `record` for the next supervisor.
        """
        self.check_free(names)
        index = 0 if not names and self._first else self._next_index()
        self._describe(index, 0, spec, record)
        self._first = False
        place = self._root
        for name in names:
            if name not in place.children:
                place.children[name] = _Place(self._next_number, place, name)
                self._next_number += 1
                place.changed = time.time_ns()
            place = place.children[name]
        place.index, place.revision = index, 0
        place.changed = time.time_ns()
        try:
            self.publish()
        except CacheError:
            self._clear(place)
            self._remove(f"{index}.0")
            raise
        return index

    def replace(self, names: Sequence[bytes], spec: Json, record: Json | None = None, *, same: bool) -> int:
        """Describe the image that is mounted here anew; gives its index, which is the old one if the metadata is the `same`."""
        place = self._mounted(names)
        before = place.index, place.revision
        if same:
            place.revision += 1
        else:
            place.index, place.revision = self._next_index(), 0
        try:
            assert place.index is not None
            self._describe(place.index, place.revision, spec, record)
            self.publish()
        except CacheError:
            self._remove(f"{place.index}.{place.revision}")
            place.index, place.revision = before
            raise
        self._remove("{}.{}".format(*before))
        return place.index

    def check_unused(self, names: Sequence[bytes]) -> None:
        """Raises PlaceError when no image is mounted here, or when others are mounted inside it."""
        place = self._mounted(names)
        inside = next((_path(below) for below in place.below() if below is not place and below.index is not None), None)
        if inside is not None:
            raise PlaceError(f"it is in use: {inside} is mounted in it")

    def remove(self, names: Sequence[bytes]) -> None:
        """Unmount an image, and remove the folders that led to it alone.

        Raises what `check_unused` raises, and CacheError when nothing can be written.
        """
        self.check_unused(names)
        place = self._mounted(names)
        before = place, place.index, place.children
        old = f"{place.index}.{place.revision}"
        place.children = {}
        removed = self._clear(place)
        try:
            self.publish()
        except CacheError:
            for gone in removed:
                assert gone.parent is not None
                gone.parent.children[gone.name] = gone
            place, place.index, place.children = before
            raise
        self._remove(old)

    @staticmethod
    def _clear(place: _Place) -> list[_Place]:
        """No image is mounted here any more; gives the folders that led to it alone, which are taken out of the tree."""
        place.index = None
        place.changed = time.time_ns()
        removed = []
        while place.parent is not None and place.index is None and not place.children:
            removed.append(place)
            del place.parent.children[place.name]
            place = place.parent
            place.changed = time.time_ns()
        return removed

    def close(self) -> None:
        """Give the shared number back; its name goes with the run-time folder."""
        self._shared.release()

    def _next_index(self) -> int:
        index = self._next
        if index > INDEX_MAX:
            raise PlaceError(f"{INDEX_MAX} images were mounted by this daemon: start another one")
        self._next += 1
        return index

    def _find(self, names: Sequence[bytes]) -> _Place | None:
        place: _Place | None = self._root
        for name in names:
            place = None if place is None else place.children.get(name)
        return place

    def _mounted(self, names: Sequence[bytes]) -> _Place:
        place = self._find(names)
        if place is None or place.index is None:
            raise PlaceError("object or filesystem doesn't exist")
        return place

    def publish(self) -> None:
        """Make the table known to all front ends. Raises CacheError when it cannot be written: then nothing is changed."""
        self._write()
        self._announce()

    def _write(self) -> None:
        rows = [
            [p.number, p.parent.number if p.parent else p.number, p.name.hex(), p.changed, p.index, p.revision]
            for p in self._root.below()
        ]
        counts = [self._next, self._next_number, self._first]
        write_checked(self._folder / "table.json", {"places": rows, "next": counts})
        points.reach("mounts: table written")

    def _announce(self) -> None:
        """Front ends read the table that is written, and see whose it is."""
        self._shared[0] += 1
        points.reach("mounts: table published")

    def _describe(self, index: int, revision: int, spec: Json, record: Json | None) -> None:
        """Raises CacheError, and then there is nothing: records have credentials, and each try would leave another one."""
        target = self._folder / f"{index}.{revision}.json"
        if record is not None:
            write_checked(target.with_suffix(".record"), record)
        temporary = target.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(spec, separators=(",", ":")))
            points.reach("mounts: description written")
            os.replace(temporary, target)
        except OSError as e:
            with contextlib.suppress(OSError):
                temporary.unlink()
            self._remove(f"{index}.{revision}")
            raise CacheError(f"{target}: {e.strerror}", e.errno) from e

    def _remove(self, stem: str) -> None:
        """What cannot be removed is removed by the next supervisor, for which the table does not name it."""
        for suffix in ("json", "record"):
            path = self._folder / f"{stem}.{suffix}"
            try:
                path.unlink(missing_ok=True)
            except OSError as e:
                log.warning("%s stays until the next takeover: %s", path, e.strerror)
            points.reach("mounts: description removed")


def _path(place: _Place) -> str:
    names = []
    at: _Place | None = place
    while at is not None and at.parent is not None:
        names.append(os.fsdecode(at.name))
        at = at.parent
    return "/" + "/".join(reversed(names))
