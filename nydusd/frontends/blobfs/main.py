"""`python -m nydusd.frontends.blobfs --spec-fd N`: a FUSE front end that shows the blobs of its image, not the image.

Like `nydusd.frontends.fuse` in everything else: spec, successor, journal. What holds after SIGKILL is the same, too. One
more thing is in its spec: `notes` (optional), the path of the pipe in which small reads are noted (`notes.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from nydusd.formats import open_bootstrap
from nydusd.frontends.fuse.main import Opener, map_bootstrap
from nydusd.frontends.fuse.mount import Mount
from nydusd.frontends.fuse.stats import Stats

from .device import RangeDevice
from .folder import BlobFolder
from .notes import Notes, NotingDevice


def prepare(spec: Mapping[str, Any]) -> Opener:
    """What opens the mounts of the front end with this spec."""
    return partial(open_blobs, notes=Notes(str(spec["notes"])) if spec.get("notes") else None)


def open_blobs(spec: Mapping[str, Any], row: int, index: int = 0, notes: Notes | None = None) -> Mount:
    """The mount that a spec describes. Raises FormatError for a bad bootstrap, or CacheError."""
    path = str(spec["bootstrap"])
    view = map_bootstrap(path, spec.get("bootstrap_size"))
    blobs = list(open_bootstrap(view, path, spec["path_id"], extracted=bool(spec["extracted"])).blobs)
    device = (
        RangeDevice.from_spec(spec["blobs"], row) if notes is None else NotingDevice.noting(spec["blobs"], row, notes)
    )
    assert isinstance(device, RangeDevice)
    return Mount(str(spec["id"]), BlobFolder(path, blobs, device), device, False, index, Stats.from_spec(spec, row))
