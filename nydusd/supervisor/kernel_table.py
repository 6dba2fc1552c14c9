"""The table of what the kernel has mounted, as the supervisor changes it: each change is there for the next one at once.

Used by the supervisor. What holds after SIGKILL: the table before a change or after it (`frontends/erofs/table.py`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nydusd.errors import MountError
from nydusd.frontends.erofs import table
from nydusd.frontends.erofs.table import Mounted
from nydusd.storage.state.names import inode_of
from nydusd.supervisor.kernel_places import remove_unused


class KernelTable:
    """`memory` is the table's fd. Raises FormatError when that holds none."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._table = table.read(memory)

    @property
    def mounts(self) -> tuple[Mounted, ...]:
        return self._table.mounts

    def mounted(self, index: int) -> Mounted:
        return next(mounted for mounted in self.mounts if mounted.index == index)

    def next_index(self) -> int:
        """A number for a further mount, one that none has had: an event that somebody waits for may be noted for that."""
        return max([self._table.next, *(mounted.index + 1 for mounted in self.mounts)])

    def add(self, mounted: Mounted) -> None:
        """Raises FormatError when there is no room for it."""
        self._table = replace(self._table, next=max(self._table.next, mounted.index + 1))
        self._write(*self.mounts, mounted)

    def note(self, mounted: Mounted) -> None:
        """Replace what is said of a mount."""
        self._write(*(mounted if each.index == mounted.index else each for each in self.mounts))

    def forget(self, index: int) -> None:
        self._write(*(each for each in self.mounts if each.index != index))

    def note_folder(self, folder: str) -> None:
        """It is made for a mount: noted first, since one that nobody knows of would stay for ever."""
        self._table = replace(self._table, folders=(*self._table.folders, folder))
        self._write(*self.mounts)

    def remove_folders(self) -> None:
        """Those that were made and nobody needs any more."""
        used = [mounted.mountpoint for mounted in self.mounts if not mounted.gone]
        left = remove_unused(self._table.folders, used)
        if len(left) != len(self._table.folders):
            self._table = replace(self._table, folders=left)
            self._write(*self.mounts)

    def end(self) -> bool:
        """The daemon stops: whether nobody uses any of it. Else that is noted for those who stay."""
        if not self._table.alive():
            return True
        self._table = replace(self._table, ended=True)
        self._write(*self.mounts)
        return False

    def spare(self) -> None:
        """The daemon ends, and what is mounted is read on: its segments stay until the guard removes them."""
        self._table = replace(self._table, segments=tuple((name, inode_of(name)) for name in sorted(self.segments())))
        self._write(*self.mounts)

    @property
    def spared(self) -> set[str]:
        """The names of those segments."""
        return {name for name, _ in self._table.segments}

    def files(self) -> set[str]:
        """The paths of all cache files that the kernel reads, also for what was unmounted and is used still."""
        return {file.data for mounted in self.mounts for file in mounted.files}

    def blobs_in(self, folder: str) -> set[str]:
        """The ids of those of a cache folder."""
        files = (file for mounted in self.mounts for file in mounted.files)
        return {file.blob_id for file in files if Path(file.data).parent == Path(folder)}

    def segments(self) -> set[str]:
        """The names of shared memory that says what is in these files."""
        return {file.segment for mounted in self.mounts for file in mounted.files}

    def check_unused(self, mounted: Mounted) -> None:
        """Raises MountError when another is mounted in it, which would vanish with it."""
        inside = f"{mounted.mountpoint.rstrip('/')}/"
        for each in self.mounts:
            if not each.gone and each.index != mounted.index and each.mountpoint.startswith(inside):
                raise MountError(f"it is in use: {each.place} is mounted in it")

    def _write(self, *mounts: Mounted) -> None:
        fresh = replace(self._table, mounts=mounts)
        table.write(self._memory, fresh)
        self._table = fresh
