"""Compacts an image's blobs: small ones become one, sparsely used ones are written anew, unused ones leave the blob table.

Runs in the process of the command. Layers that an image only refers to, and blobs of a chunk dictionary, stay as they are:
others use them, too. No old blob is changed or removed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nydusd.formats.chunk_info import CHUNK_INFO
from nydusd.formats.model import BlobFeature, BlobInfo, Bootstrap, Compressor, RawChunk
from nydusd.formats.superblock import flags_compressor
from nydusd.image.known import KnownChunks
from nydusd.image.load import tree_of
from nydusd.image.node import Node
from nydusd.image.progress import Progress
from nydusd.image.reader import ImageReader
from nydusd.image.rewrite import (
    NewBlob,
    Place,
    blobs_of,
    replace_chunks,
    settings_like,
    used_blobs,
    with_chunks,
    write_bootstrap,
)
from nydusd.storage.cache.chunk_table import is_legacy_stargz

log = logging.getLogger(__name__)

_FOREIGN = BlobFeature.SEPARATE | BlobFeature.ZRAN | BlobFeature.EXTERNAL


@dataclass
class CompactOptions:
    """`target` gets the bootstrap, `folder` the new blobs. A blob of which less than `min_used_ratio` percent is used is
    written anew; blobs below `compact_blob_size` bytes are put together, up to `max_compact_size`. Nothing is done for images
    of fewer than `layers_to_compact` blobs."""

    target: Path
    folder: Path
    min_used_ratio: int = 0
    compact_blob_size: int = 10 << 20
    max_compact_size: int = 100 << 20
    layers_to_compact: int = 0
    dictionary: Bootstrap | None = None
    quiet: bool = False


@dataclass(frozen=True)
class Compacted:
    """What became of the image. `new`: ids of blobs that were written, `gone`: of those that it does not need any more."""

    blobs: tuple[str, ...]
    new: tuple[str, ...]
    gone: tuple[str, ...]
    version: int
    compressor: Compressor


@dataclass
class _Blob:
    """A blob of the old table: which of its chunks are used, and about how many stored bytes these are."""

    info: BlobInfo
    chunks: dict[int, RawChunk]
    used: int = 0
    percent: int = 100

    @property
    def is_ours(self) -> bool:
        return not self.info.features & _FOREIGN and not is_legacy_stargz(self.info)


def compact(reader: ImageReader, where: str, options: CompactOptions) -> Compacted | None:
    """Write new blobs and the bootstrap; None if the image has too few blobs for that. Raises `NydusError`."""
    bootstrap = reader.bootstrap
    if len(bootstrap.blobs) < options.layers_to_compact:
        return None
    tree = tree_of(bootstrap, where)
    table = blobs_of(reader, options.folder)
    dictionary: set[str] = set()
    if options.dictionary is not None:
        dictionary = {blob.blob_id for blob in options.dictionary.blobs}
        table = _use_dictionary(tree, table, options.dictionary, options.folder)
    before = len(bootstrap.blobs)
    blobs = _usage(tree, table)
    may = [blob for blob in blobs if blob.chunks and blob.is_ours and blob.info.blob_id not in dictionary]
    groups = _groups(may, options)
    total = sum(chunk.usize for group in groups for blob in group for chunk in blob.chunks.values())
    progress = Progress(total, quiet=options.quiet)
    new: list[str] = []
    moved: dict[Place, RawChunk] = {}
    for group in groups:
        info, places = _write(reader, group, len(table), options.folder, progress)
        table.append(info)
        new.append(info.blob_id)
        moved |= places
    progress.end()
    replace_chunks(tree, moved)
    table = used_blobs(tree, table)
    write_bootstrap(options.target, tree, table, bootstrap)
    ids = tuple(info.blob_id for info in table)
    gone = tuple(blob.info.blob_id for blob in blobs[:before] if blob.info.blob_id not in ids)
    return Compacted(ids, tuple(new), gone, bootstrap.version, flags_compressor(bootstrap.flags))


def _use_dictionary(tree: Node, table: list[BlobInfo], dictionary: Bootstrap, folder: Path) -> list[BlobInfo]:
    """Have files use the dictionary's chunks where it has the same; the blob table with its blobs."""
    known = KnownChunks(table)
    for digester in {blob.digester for blob in table}:
        known.add_dictionary(dictionary, digester, folder)
    for node in with_chunks(tree):
        node.packed = b"".join(
            known.find(chunk.digest, chunk.usize) or CHUNK_INFO.pack(*chunk) for chunk in node.chunks
        )
    return [info for info in known.blobs if info is not None]


def _usage(tree: Node, table: Sequence[BlobInfo]) -> list[_Blob]:
    blobs = [_Blob(info, {}) for info in table]
    for node in with_chunks(tree):
        for chunk in node.chunks:
            blobs[chunk.blob_index].chunks.setdefault(chunk.index, chunk)
    for blob in blobs:
        info = blob.info
        if info.features & BlobFeature.BATCH:
            # Chunks of a batch have no stored size of their own: go by the plain ones.
            plain = sum(chunk.usize for chunk in blob.chunks.values())
            blob.percent = plain * 100 // max(info.uncompressed_size, 1)
            blob.used = info.compressed_data_size * min(blob.percent, 100) // 100
        else:
            blob.used = sum(chunk.csize for chunk in blob.chunks.values())
            blob.percent = blob.used * 100 // max(info.compressed_data_size, 1)
    return blobs


def _groups(blobs: Sequence[_Blob], options: CompactOptions) -> list[list[_Blob]]:
    """Which blobs become one new blob each, in the order of the old table."""
    sparse = {id(blob) for blob in blobs if blob.percent < options.min_used_ratio}

    def size(blob: _Blob) -> int:
        return blob.used if id(blob) in sparse else blob.info.compressed_data_size

    small = [blob for blob in blobs if size(blob) < options.compact_blob_size]
    groups: list[list[_Blob]] = []
    filled = 0
    for blob in sorted(small, key=lambda blob: (size(blob), blob.info.index)):
        if not groups or filled + blob.used > options.max_compact_size:
            groups.append([])
            filled = 0
        groups[-1].append(blob)
        filled += blob.used
    chosen = [group for group in groups if len(group) > 1 or id(group[0]) in sparse]
    chosen += [[blob] for blob in blobs if id(blob) in sparse and blob not in small]
    ordered = [sorted(group, key=lambda blob: blob.info.index) for group in chosen]
    return sorted(ordered, key=lambda group: group[0].info.index)


def _write(
    reader: ImageReader, group: Sequence[_Blob], index: int, folder: Path, progress: Progress
) -> tuple[BlobInfo, dict[Place, RawChunk]]:
    settings = settings_like(reader.bootstrap, [blob.info for blob in group])
    with NewBlob(reader, settings, folder, index) as new:
        for chunk in _in_order(group):
            new.move(chunk)
            progress.add(chunk.usize)
        info = new.finish()
    return info, new.moved


def _in_order(group: Sequence[_Blob]) -> Iterator[RawChunk]:
    """As they were: blob after blob, and in each from its begin."""
    for blob in group:
        for _, chunk in sorted(blob.chunks.items()):
            yield chunk
