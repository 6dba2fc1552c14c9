"""Puts what an image needs first into a blob of its own, which daemons read ahead. Runs in the process of the command.

Input is a list of files, as `nydusctl trace` writes it: paths one a line, or JSON that may name parts of files. The old
blobs stay, and hold all the rest; the new bootstrap refers to both.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from nydusd.errors import ConfigError
from nydusd.formats.model import BlobFeature, Compressor, RawChunk
from nydusd.formats.superblock import flags_compressor
from nydusd.image.errors import ImageError, show
from nydusd.image.load import tree_of
from nydusd.image.node import Node, find, names
from nydusd.image.prefetch import matched, parse_list
from nydusd.image.reader import ImageReader
from nydusd.image.rewrite import NewBlob, blobs_of, replace_chunks, settings_like, used_blobs, write_bootstrap

log = logging.getLogger(__name__)

_VERSION = "v1"
_MAX_OFFSET = 1 << 63


class Wanted(NamedTuple):
    """A file, or all files of a folder; of files only what is in `ranges` (offset, length in bytes), None for all."""

    path: bytes
    ranges: tuple[tuple[int, int], ...] | None


@dataclass(frozen=True)
class Optimized:
    """What was made. `stored` is bytes of the new blob's data, `blobs` are all of the blob table."""

    blob: str
    stored: int
    chunks: int
    blobs: tuple[str, ...]
    version: int
    compressor: Compressor


def parse_wanted(data: bytes, where: str) -> list[Wanted]:
    """The list. Raises `ConfigError` naming the entry that is wrong; what is no absolute path is left out with a warning."""
    if not data.lstrip().startswith(b"{"):
        return [Wanted(path, None) for path in parse_list(data.splitlines())]
    try:
        root = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: no valid JSON: {error}") from error
    if root.get("version") != _VERSION:
        raise ConfigError(f"{where}: version must be {_VERSION!r}, but is {root.get('version')!r:.40}")
    files = root.get("files")
    if not isinstance(files, list):
        raise ConfigError(f"{where}: files must be a list")
    found = []
    for number, entry in enumerate(files):
        path = entry.get("path") if isinstance(entry, dict) else None
        if not isinstance(path, str):
            raise ConfigError(f"{where}: files[{number}].path must be a string")
        try:
            name = os.fsencode(path)
        except UnicodeEncodeError as error:
            raise ConfigError(f"{where}: files[{number}].path: {path[:200]!r} is no text") from error
        if not name.startswith(b"/"):
            log.warning("%s: files[%d]: %s is no absolute path: left out", where, number, show(name))
            continue
        found.append(Wanted(name, _ranges(entry.get("ranges"), f"{where}: files[{number}].ranges")))
    return found


def _ranges(value: object, where: str) -> tuple[tuple[int, int], ...] | None:
    if value is None:
        return None
    rule = f"{where} must be a list of [offset, length]"
    if not isinstance(value, list):
        raise ConfigError(rule)
    found = []
    for pair in value:
        if not isinstance(pair, list) or len(pair) != 2 or not all(type(number) is int for number in pair):
            raise ConfigError(rule)
        if not all(0 <= number < _MAX_OFFSET for number in pair):
            raise ConfigError(f"{where}: {pair} must be from 0 to 2^63")
        found.append((pair[0], pair[1]))
    return tuple(found)


def optimize(
    reader: ImageReader, where: str, wanted: Sequence[Wanted], target: Path, folder: Path, blob_dir: Path | None = None
) -> Optimized:
    """Write the new blob into `folder` under its id, and the new bootstrap to `target`. Raises `NydusError`.

    `blob_dir` is where blobs of the image are that hold their own bootstrap.
    """
    bootstrap = reader.bootstrap
    tree = tree_of(bootstrap, where)
    # What was made to be read ahead before is not any more: the new list counts.
    old = BlobFeature.IS_SEPARATED_WITH_PREFETCH_FILES
    blobs = [replace(blob, features=blob.features & ~old) for blob in blobs_of(reader, blob_dir)]
    chunks = list(_chunks(tree, wanted, bootstrap.chunk_size))
    if not chunks:
        raise ImageError("no file of the list has data in the image: there is nothing to optimize")
    sources = [blobs[index] for index in sorted({chunk.blob_index for chunk in chunks})]
    with NewBlob(reader, settings_like(bootstrap, sources, prefetch=True), folder, len(blobs)) as new:
        for chunk in chunks:
            new.move(chunk)
        info = new.finish(prefetched=True)
    blobs.append(info)
    replace_chunks(tree, new.moved)
    table = used_blobs(tree, blobs)
    whole = matched(tree, [want.path for want in wanted if want.ranges is None])
    write_bootstrap(target, tree, table, bootstrap, whole)
    ids = tuple(blob.blob_id for blob in table)
    compressor = flags_compressor(bootstrap.flags)
    return Optimized(info.blob_id, new.stored, info.chunk_count, ids, bootstrap.version, compressor)


def _chunks(tree: Node, wanted: Sequence[Wanted], chunk_size: int) -> Iterator[RawChunk]:
    """The chunks of the list, in its order."""
    for path, ranges in wanted:
        node = find(tree, path)
        if node is None:
            log.warning("prefetch list: %s is not in the image: left out", show(path))
            continue
        for name in names(node):
            for position, chunk in enumerate(name.node.chunks):
                begin = position * chunk_size
                end = begin + chunk.usize
                if ranges is None or any(at < end and begin < at + length for at, length in ranges):
                    yield chunk
