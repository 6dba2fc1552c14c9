"""What a killed `nydusd erofs` has left at a mount point, as those see it that would mount there in another way.

Runs in a process that becomes a supervisor, before it takes the run-time folder, for then the records are gone without which
nobody can take over what is mounted. Nothing is changed here: after SIGKILL all is as it was.
"""

from __future__ import annotations

from pathlib import Path

from nydusd.errors import MountError

FANOTIFY, TARFS, BLOBFS = ".erofs.json", ".tarfs.json", ".blobs"
"""What the ways keep beside the run-time folder while something is mounted: its suffix."""


def seen(run_dir: str) -> str | None:
    """A place at which an EROFS of the killed daemon is mounted still: that of the first image, or of one in the API's."""
    note = Path(run_dir).with_suffix(FANOTIFY)
    if not note.exists():
        return None
    from nydusd.frontends.erofs import left

    return left.seen(note)


def refuse(run_dir: str, mountpoint: str, own: str = "") -> None:
    """Raises MountError where another way has left its mount: one above it would hide, not end it. `own`: our suffix."""
    folder = Path(run_dir)
    if not any(folder.with_suffix(suffix).exists() for suffix in (FANOTIFY, TARFS, BLOBFS) if suffix != own):
        return
    from nydusd.frontends.erofs.session import top_is_erofs

    place = None if own == FANOTIFY else seen(run_dir)
    if place is None and not (own and folder.with_suffix(own).exists()) and top_is_erofs(mountpoint):
        place = mountpoint
    if place is not None:
        raise MountError(
            f"{place}: a `nydusd erofs` that was killed has left its mount here: start that again, or unmount it"
        )
