"""The job `split_image`: the copy of a v6 image's metadata that the kernel mounts, see `formats/write/rafs_v6_split.py`. And
`list_image`, for those of which there is no copy: which blobs have no chunk that the image's chunk table lacks.

Both run in a fetch worker: they parse what others wrote, and take ten microseconds a file. The copy goes into a file without
a name, which is sent to the supervisor when all of it is on its disk: after SIGKILL in the middle nothing stays.
"""

from __future__ import annotations

import os
import socket

from nydusd.errors import CacheError
from nydusd.formats import open_bootstrap
from nydusd.formats.rafs_v6 import RafsV6
from nydusd.formats.write.rafs_v6_split import are_listed, split_devices
from nydusd.ipc.borrow import borrow
from nydusd.ipc.messages import Json
from nydusd.storage.api.image import ImageFacts
from workers.blobs import OpenBlobs, map_bootstrap


def split_image(_blobs: OpenBlobs, job: Json) -> Json:
    """Job: image (plain data), folder, line (pid and number of a socket), least, most. Answer: `cuts`, None if it is not to be
    split, and `listed`. Where there are cuts, the copy, a file in the folder's file system, was sent on the line before.
    """
    facts = ImageFacts.from_json(job["image"])
    view = map_bootstrap(facts.bootstrap)
    image = open_bootstrap(view, facts.bootstrap, facts.path_id, extracted=facts.extracted)
    found = (
        split_devices(view, image, facts.bootstrap, job["least"], job["most"]) if isinstance(image, RafsV6) else None
    )
    if found is None:
        return {"cuts": None}
    try:
        fd = os.open(job["folder"], os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as out:
            out.write(found.metadata)
            out.flush()
            os.fdatasync(fd)  # nobody would hear that its disk has not taken it, and the kernel would read zeros
            pid, number = map(int, job["line"])
            # The supervisor that has given us the job.
            with socket.socket(fileno=borrow(pid, number, lambda: os.getppid() == pid)) as line:
                socket.send_fds(line, [b"\0"], [fd])
    except OSError as e:
        raise CacheError(f"a copy of {facts.bootstrap} for the kernel: {e.strerror}", e.errno) from e
    return {"cuts": found.cuts, "listed": found.listed}


def list_image(_blobs: OpenBlobs, job: Json) -> Json:
    """Job: image (plain data). Answer: `listed`, of each blob."""
    facts = ImageFacts.from_json(job["image"])
    view = map_bootstrap(facts.bootstrap)
    image = open_bootstrap(view, facts.bootstrap, facts.path_id, extracted=facts.extracted)
    listed = are_listed(view, image, facts.bootstrap) if isinstance(image, RafsV6) else [False] * len(image.blobs)
    return {"listed": listed}
