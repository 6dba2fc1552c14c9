"""Which image answers for a node id: all mounts of the session, as one front end knows them.

Runs in a front-end process. The supervisor writes the table of mounts to a file, then a number into shared memory; a front
end compares that number with the table's that it has, before every request. So from the moment at which a mount or an umount
is answered on the API no request is served by an older table, and nobody had to be waited for. An image is opened when
something is first asked of it, and one that cannot be opened fails those requests alone.

What holds after SIGKILL: the table and the number are the supervisor's; a successor reads them at its start.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nydusd.errors import CacheError, FormatError, NydusError, ScarceError, UnmountedError, cache_error, is_scarce
from nydusd.storage.api.known_chunk import KnownChunk

from .mount import PSEUDO_INDEX, Mount
from .ops import Handler, Operations
from .pseudo import ROOT, Place, PseudoFs, tree_of

log = logging.getLogger(__name__)

Json = dict[str, Any]


_KNOWN = 16_384
"""Chunks of all images that a front end remembers, some 200 bytes each."""

Known = dict[tuple[int, int], KnownChunk | None]


class Remembered:
    """What the views of a front end know of chunks, bounded for all together: a node may have hundreds of images."""

    def __init__(self) -> None:
        self._all: list[Known] = []
        self._count = 0

    def note(self, known: Known, place: tuple[int, int], chunk: KnownChunk | None) -> None:
        """One more, of the image that `known` is of. If there are too many, all others are forgotten."""
        if self._count >= _KNOWN:
            for each in self._all:
                each.clear()
            self._all.clear()
            self._count = 0
        if not known:
            self._all.append(known)
        self._count += place not in known
        known[place] = chunk

    def forget(self, known: Known) -> None:
        """All of an image: what it had open is closed."""
        if known:
            self._all = [each for each in self._all if each is not known]
            self._count -= len(known)
            known.clear()


class View:
    """What answers requests: the handlers by opcode, and the image, None for the pseudo file system."""

    __slots__ = ("_remembered", "chunk_shift", "handlers", "known", "mount", "operations")

    def __init__(
        self,
        mount: Mount | None,
        handlers: list[Handler],
        operations: Operations | None = None,
        remembered: Remembered | None = None,
    ) -> None:
        self.mount = mount
        self.handlers = handlers
        self.operations = operations
        self.chunk_shift = 0 if mount is None else mount.bootstrap.chunk_size.bit_length() - 1
        self._remembered = remembered or Remembered()
        self.known: Known = {}
        """Chunks of which a part was read, by node id and place in the file; None where these bytes are not one chunk."""

    def learn(self, node: int, offset: int) -> None:
        """A part of a chunk was just read from the cache file, at `offset` of a file of this image."""
        assert self.mount is not None
        place = node, offset >> self.chunk_shift
        if place in self.known and self.known[place] is None:
            return
        ino = self.mount.ino_of(node)
        vec = self.mount.bootstrap.extents(ino, place[1] << self.chunk_shift, 1 << self.chunk_shift)
        # In a file with holes, or where tarfs has other chunks, these bytes may be more than one, or a part of one.
        is_one = len(vec) == 1 and not vec[0].offset
        self._remembered.note(self.known, place, self.mount.device.known(ino, vec[0]) if is_one else None)

    def forget(self) -> None:
        """What is known of chunks is of no use any more."""
        self._remembered.forget(self.known)


class Namespace(dict[int, View]):
    """Views by the high bits of a node id; 0 is also that of the root. A view is made when it is first asked for.

    `shared[0]` is the shared number, to be compared with `generation`, `shared[1]` tells supervisors apart.
    `open_mount(spec, index)` opens an image.
    """

    def __init__(self, folder: str, shared: memoryview, flags: int, open_mount: Callable[[Json, int], Mount]) -> None:
        super().__init__()
        self._folder = Path(folder)
        self.shared = shared
        self._flags = flags
        self._open_mount = open_mount
        self._pseudo = PseudoFs(flags, self.root_entry)
        self._pseudo_view = View(None, self._pseudo.table())
        self._images: dict[int, Place] = {}
        self._remembered = Remembered()
        self.generation = 0
        self.failure: CacheError | None = None
        """Why the table could not be read when it was tried last: what is known here is of an older one."""

    def __missing__(self, index: int) -> View:
        """Raises UnmountedError for an image that is not mounted (any more), and what opening one raises.

        That is ScarceError if it cannot be opened now, and can be when a file descriptor is free.
        """
        if index == PSEUDO_INDEX:
            view = self._pseudo_view
        elif index in self._images:
            try:
                view = self._open(index)
            except ScarceError:
                if not self.let_go():
                    raise
                view = self._open(index)
        elif index == 0:
            root = self._pseudo.places.get(ROOT)
            view = self._pseudo_view if root is None or root.index is None else self[root.index]
        else:
            raise self.failure or UnmountedError(f"image {index} is not mounted any more")
        self[index] = view
        return view

    @property
    def is_current(self) -> bool:
        """Whether no newer table was published than the one that is known here."""
        return self.shared[0] == self.generation

    @property
    def term(self) -> int:
        """How many supervisors have published this table: it changes when another one takes over."""
        return self.shared[1]

    def knows(self, index: int) -> bool:
        """Whether an image is mounted under this index."""
        return index in self._images

    def reload(self) -> list[Mount]:
        """Read the table anew. Gives the mounts that are gone, or were replaced; the caller closes them.

        Raises CacheError when it cannot be read: all is as before, and it must be tried again.
        """
        generation = self.shared[0]  # before the table is read: one that is newer is read twice, never not at all
        try:
            places = self._places()
        except CacheError as e:
            self.failure = CacheError(str(e))
            raise self.failure from e
        self.generation, self.failure = generation, None
        images = _images_of(places)
        before, self._images = self._images, images
        self._pseudo.places = places
        gone = []
        for index, place in before.items():
            now = images.get(index)
            if now is None or now.revision != place.revision:
                view = self.pop(index, None)
                if view is not None and view.mount is not None:
                    view.forget()
                    gone.append(view.mount)
        if 0 not in before or 0 not in images:
            self.pop(0, None)  # what stands for the root may have changed; an image of this index was dealt with above
        for index, view in self.items():
            if view.operations is not None and view.mount is not None:
                self._cover(images[index], view.operations, view.mount)
        return gone

    def _places(self) -> dict[int, Place]:
        """The table as it is written now. Raises CacheError when it cannot be read."""
        try:
            return tree_of(json.loads((self._folder / "table.json").read_bytes())["places"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise cache_error(f"the table of mounts in {self._folder} cannot be read", e) from e

    def trim(self) -> None:
        """Let go of what was looked at of the metadata of all images."""
        for view in self.values():
            if view.mount is not None:
                view.mount.trim()

    def let_go(self, but: Mount | None = None) -> bool:
        """Close what images, all or all but one, have open of their blobs: each is opened again when it is read.

        Whether anything was open, so that there is room for something else now.
        """
        closed = []
        for view in self.values():
            if view.mount is not None and view.mount is not but:
                view.forget()
                closed.append(view.mount.device.close())
        return any(closed)

    def root_entry(self, index: int) -> tuple[int, ...]:
        """The fields of ENTRY_OUT for the root of an image, to be looked up anew at each use."""
        operations = self[index].operations
        assert operations is not None
        return operations.root_entry()

    def _open(self, index: int) -> View:
        place = self._images[index]
        while (spec := self._spec(place)) is None:
            # Unmounted, or mounted anew, since the number was looked at: the table says so before the file is removed.
            now = _images_of(self._places()).get(index)
            if now is None:
                raise UnmountedError(f"image {index} is not mounted any more")
            if now.revision == place.revision:
                raise FormatError(str(self._folder), "mount", f"cannot be read: image {index} is not described")
            self._images[index] = place = now
        mount = self._open_mount(spec, index)
        operations = Operations(mount, self._flags, self.root_entry)
        self._cover(place, operations, mount)
        return View(mount, operations.table(), operations, self._remembered)

    def _spec(self, place: Place) -> Json | None:
        """What the supervisor says of an image; None if it says nothing of it. Raises FormatError, ScarceError."""
        path = self._folder / f"{place.index}.{place.revision}.json"
        try:
            spec: Json = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as e:
            if is_scarce(e):
                raise cache_error(str(path), e) from e
            raise FormatError(str(path), "mount", f"cannot be read: {e}") from e
        return spec

    def _cover(self, place: Place, operations: Operations, mount: Mount) -> None:
        """Note which folders of an image other mounts stand upon."""
        operations.covers.clear()
        try:
            _find_covers(place, mount, operations.covers)
        except NydusError as e:
            log.error("mount %s: %s", mount.id, e)


def _images_of(places: dict[int, Place]) -> dict[int, Place]:
    """The mount points, by index of the image."""
    return {place.index: place for place in places.values() if place.index is not None}


def _find_covers(place: Place, mount: Mount, covers: dict[tuple[int, bytes], int]) -> None:
    todo = [(place, mount.bootstrap.root_ino)]
    while todo:
        above, ino = todo.pop()
        for name, child in above.children.items():
            if child.index is not None:
                covers[ino, name] = child.index
                continue
            below = mount.bootstrap.lookup(ino, name)
            if below is not None:
                todo.append((child, below))
