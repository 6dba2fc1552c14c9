"""Makes a chunk dictionary of several images: an image of metadata alone, with the chunks that are worth sharing.

Runs in the process of the command. What `create --chunk-dict` then finds in it is not stored once more but referred to. The
dictionary is a valid image itself: a folder for each blob, a file for each chunk. No blob is read or written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nydusd.errors import ConfigError
from nydusd.formats.chunk_info import CHUNK_INFO
from nydusd.formats.model import BlobInfo, Bootstrap, Compressor, RawChunk
from nydusd.formats.superblock import S_IFDIR, S_IFREG, flags_compressor, flags_digester
from nydusd.image.known import check_fits
from nydusd.image.load import standalone
from nydusd.image.node import Node
from nydusd.image.reader import load_metadata
from nydusd.image.rewrite import used_blobs, write_bootstrap


@dataclass(frozen=True)
class Dictionary:
    """What was made. `blobs` are the ids of the blobs that its chunks are in."""

    chunks: int
    blobs: tuple[str, ...]
    version: int
    compressor: Compressor


@dataclass
class _Blob:
    """A blob and those of its chunks that any image has, by digest."""

    info: BlobInfo
    chunks: dict[bytes, RawChunk]


def generate(sources: Sequence[Path], target: Path, blob_dir: Path | None = None) -> Dictionary:
    """Write the dictionary of the images' metadata to `target`.

    A chunk is worth sharing if at least two of the images have it; of a single image each is. Whoever refers to a blob
    needs it, so all chunks of that blob are taken. `blob_dir` is where blobs are that hold their own metadata. Raises
    `ConfigError` for images that cannot share chunks, and `NydusError` for one that is broken.
    """
    first, blobs, users = _load(sources, blob_dir)
    wanted = {digest for digest, count in users.items() if count > 1 or len(sources) == 1}
    root = Node(b"", None, S_IFDIR | 0o755)
    count = 0
    table: list[BlobInfo] = []
    found: set[bytes] = set()
    for blob in blobs.values():
        new = blob.chunks.keys() - found
        if new.isdisjoint(wanted):
            continue
        _add(root, blob, len(table), new)
        table.append(replace(blob.info, index=len(table)))
        found |= new
        count += len(new)
    if not count:
        raise ConfigError("no chunk is in two of the images: there is nothing to share")
    table = used_blobs(root, table)
    write_bootstrap(target, root, table, first)
    return Dictionary(count, tuple(info.blob_id for info in table), first.version, flags_compressor(first.flags))


def _load(sources: Sequence[Path], blob_dir: Path | None) -> tuple[Bootstrap, dict[str, _Blob], dict[bytes, int]]:
    """The first image, all blobs by id in the order of the images, and how many images have each chunk."""
    first: Bootstrap | None = None
    blobs: dict[str, _Blob] = {}
    users: dict[bytes, int] = {}
    for source in sources:
        _, image = load_metadata(source)
        if first is None:
            first = image
        check_fits(str(source), image, first.version, first.chunk_size)
        if flags_digester(image.flags) != flags_digester(first.flags):
            raise ConfigError(f"{source}: another digest algorithm than that of {sources[0]}")
        own = set()
        for info in image.blobs:
            blobs.setdefault(info.blob_id, _Blob(standalone(info, blob_dir), {}))
        for chunk in image.raw_chunks():
            blobs[image.blobs[chunk.blob_index].blob_id].chunks.setdefault(chunk.digest, chunk)
            own.add(chunk.digest)
        for digest in own:
            users[digest] = users.get(digest, 0) + 1
    assert first is not None
    return first, blobs, users


def _add(root: Node, blob: _Blob, index: int, digests: set[bytes]) -> None:
    """A folder with a file for each of these chunks."""
    name = blob.info.blob_id.encode("ascii")
    folder = root.children[name] = Node(name, root, S_IFDIR | 0o755)
    for digest in sorted(digests):
        name = digest.hex().encode("ascii")
        file = folder.children[name] = Node(name, folder, S_IFREG | 0o444)
        chunk = blob.chunks[digest]
        file.size = chunk.usize
        file.packed = CHUNK_INFO.pack(*chunk._replace(blob_index=index, file_offset=0))
