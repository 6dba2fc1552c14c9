"""Places that have all blobs of the packed images, one for each kind of backend."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

from tests.support import oracle
from tests.support import oss_server as oss
from tests.support.gpt_disk import Part, blob_part, loop_device, old_blob_part, write_disk
from tests.support.object_server import names_are_local, object_server
from tests.support.oss_server import oss_server
from tests.support.s3_server import S3Server

IMAGES = [image.name for image in oracle.images() if ":" not in image.name]
PREFIX = "matrix/"


@functools.cache
def stored() -> dict[str, bytes]:
    """All blobs of the small images by id."""
    return {path.name: path.read_bytes() for name in IMAGES for path in oracle.image(name).blobs.iterdir()}


@contextlib.contextmanager
def place(what: str, folder: Path, s3: S3Server | None = None) -> Iterator[tuple[str, dict[str, object]]]:
    """A running place: the backend's name and its configuration. `what` is that name and perhaps a variant of it."""
    kind, _, variant = what.partition(" ")
    with contextlib.ExitStack() as stack:
        if kind == "s3":
            assert s3 is not None
            s3.put({f"{PREFIX}{blob_id}": data for blob_id, data in stored().items()})
            yield kind, s3.config(object_prefix=PREFIX)
        elif kind == "oss":
            stack.enter_context(names_are_local(oss.DOMAIN))
            running = stack.enter_context(oss_server({f"{PREFIX}{key}": data for key, data in stored().items()}))
            yield kind, running.config(object_prefix=PREFIX)
        elif kind == "http-proxy":
            objects = {f"/blobs/{blob_id}": data for blob_id, data in stored().items()}
            socket_path = folder / "socket" if variant == "unix" else None
            near = stack.enter_context(object_server(objects, socket_path=socket_path))
            yield kind, {"addr": near.address if socket_path else f"http://{near.address}", "path": "blobs"}
        else:
            parts = [Part("EFI System Partition", b"not a blob")]
            for number, (blob_id, data) in enumerate(stored().items()):
                parts.append(blob_part(blob_id, data) if number % 2 else old_blob_part(blob_id, data, number))
            sector = 512 if variant == "image" else int(variant)
            path = write_disk(folder / "disk", parts, sector)
            device = str(path) if variant == "image" else stack.enter_context(loop_device(path, sector))
            yield kind, {"device_path": device}
