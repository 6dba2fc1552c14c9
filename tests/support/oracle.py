"""The truth about the images in the fixtures: where they are, and the plain contents of their files.

The contents are never had through our own decoders: the blob of the `v6-tarfs` image is the tar that the other images
of its set were made from, Python's tarfile reads it, and every file is checked against the manifest's sha256.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from tests.support import manifest
from tests.support.larger import larger_fixtures

SMALL = Path(__file__).resolve().parents[1] / "data" / "small"

FROM_TAR = frozenset({"v6-tar-rafs", "v6-targz-ref", "v6-tarfs"})
"""Images made from a tar: whole-second times, no sockets."""

OF_THEIR_OWN = ("v5-aligned", "v6-batch", "v6-targz-ref", "v6-tarfs")
"""Images whose chunks lie otherwise in their blob, or are found there otherwise, than those of all others."""


class Image(NamedTuple):
    """One packed image of a set. `bootstrap` of an image with inlined metadata is the blob itself."""

    name: str
    bootstrap: Path
    blobs: Path
    manifest: Path
    tar: Path


def images() -> list[Image]:
    """The images in tests/data and, if this machine has them, the larger ones."""
    found = list(_set("", SMALL / "images", SMALL / "manifest.jsonl", SMALL / "manifest-tar.jsonl"))
    assert len(found) == 15, f"15 images belong into {SMALL}, there are {len(found)}"
    top = larger_fixtures()
    if top is not None:
        found += _set("large:", top / "images", top / "edge.manifest.jsonl", top / "edge-tar.manifest.jsonl")
    return found


def fewer_images() -> list[Image]:
    """Of the larger ones those of `OF_THEIR_OWN`, for what need not read each of them; all if $NYDUSD_TEST_IMAGES is `all`."""
    every = os.environ.get("NYDUSD_TEST_IMAGES") == "all"
    return [image for image in images() if every or ":" not in image.name or image.name.endswith(OF_THEIR_OWN)]


def image(name: str) -> Image:
    """The image of this name; KeyError if there is none."""
    return {image.name: image for image in images()}[name]


def _set(prefix: str, folder: Path, of_folder: Path, of_tar: Path) -> Iterator[Image]:
    (tar,) = (folder / "v6-tarfs" / "blobs").iterdir()
    for entry in sorted(folder.iterdir()):
        blobs = entry / "blobs"
        bootstrap = entry / "bootstrap"
        if not bootstrap.exists():
            (bootstrap,) = blobs.iterdir()
        yield Image(prefix + entry.name, bootstrap, blobs, of_tar if entry.name in FROM_TAR else of_folder, tar)


@functools.cache
def truth(name: str) -> Mapping[bytes, bytes]:
    """Plain contents by path of all regular files of an image, each checked against the manifest's sha256."""
    chosen = image(name)
    contents = _tar_contents(chosen.tar)
    checked: dict[bytes, bytes] = {}
    for row in manifest.load(chosen.manifest).values():
        if "sha256" in row:
            path = manifest.unescape(str(row["path"]))
            assert hashlib.sha256(contents[path]).hexdigest() == row["sha256"], f"the oracle is wrong about {path!r}"
            checked[path] = contents[path]
    assert checked, f"no regular files in {chosen.manifest}"
    return MappingProxyType(checked)


@functools.cache
def _tar_contents(path: Path) -> dict[bytes, bytes]:
    contents: dict[bytes, bytes] = {}
    with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isreg() or member.islnk() else None
            if file is not None:
                contents[os.path.normpath(os.fsencode(member.name))] = file.read()
    return contents
