"""Mounting an image with the kernel's EROFS, straight from files: the metadata file, and the plain cache file as its device.

mount(8) would put a loop device in between, so this calls mount(2) itself. Kernel 6.12 or later; root.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

MS_RDONLY = 1
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def erofs_mount(bootstrap: Path, devices: Sequence[Path], mountpoint: Path) -> Iterator[None]:
    """Mounted inside the `with`; OSError if the kernel refuses."""
    options = ",".join(f"device={device}" for device in devices)
    arguments = [os.fsencode(bootstrap), os.fsencode(mountpoint), b"erofs", MS_RDONLY, os.fsencode(options)]
    if _libc.mount(*arguments) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"mounting {bootstrap} as EROFS with {options}: {os.strerror(error)}")
    try:
        yield
    finally:
        if _libc.umount2(os.fsencode(mountpoint), 0) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"unmounting {mountpoint}: {os.strerror(error)}")
