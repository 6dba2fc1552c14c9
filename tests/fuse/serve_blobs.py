"""The same as `serve.py`, but what is shown are the blobs of that image: one file, `sample`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from nydusd.formats.model import BlobInfo, Cipher, Compressor, Digester
from nydusd.frontends.blobfs.device import RangeDevice
from nydusd.frontends.blobfs.folder import BlobFolder
from nydusd.frontends.fuse.main import main
from nydusd.frontends.fuse.mount import Mount
from tests.fuse.tree import CHUNK, sample


def open_blobs(spec: Mapping[str, Any], row: int, index: int = 0) -> Mount:
    size = len(sample().blob)
    none = Compressor.NONE
    blob = BlobInfo(
        0, "sample", 0, CHUNK, -(-size // CHUNK), none, Digester.SHA256, Cipher.NONE, size, size,
        none, 0, 0, 0, 0, b"", b"", 0, 0, 0, b"", b"", "sample",
    )  # fmt: skip
    device = RangeDevice.from_spec(spec["blobs"], row)
    assert isinstance(device, RangeDevice)
    return Mount(str(spec["id"]), BlobFolder("sample", [blob], device), device, index=index)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], lambda _: open_blobs))
