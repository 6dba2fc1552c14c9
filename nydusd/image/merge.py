"""Merges layers into one image: their trees put over one another, their blobs in one table. Runs in the command's process.

Only metadata is read and written; no blob is touched. A tar may have a file without its folder; the folder of the layers
below then keeps its attributes. Metadata does not say which folders these were. Whoever made the layers knows; else all
with the attributes that builders give them count as such.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nydusd.formats.model import BlobFeature, BlobInfo, Bootstrap, Compressor
from nydusd.formats.superblock import SuperFlag, flags_compressor
from nydusd.image.blob import renumbered
from nydusd.image.errors import ImageError, InconsistentLayersError
from nydusd.image.load import standalone, tree_of
from nydusd.image.node import Node, folders
from nydusd.image.overlay import overlay
from nydusd.image.prefetch import matched
from nydusd.image.reader import load_metadata
from nydusd.image.rewrite import renumber, with_chunks, write_bootstrap
from nydusd.image.whiteout import Whiteouts


@dataclass
class MergeOptions:
    """`sources` from the lowest layer up. The lists say of each layer's own blob what the layer itself could not know yet;
    each has an entry a layer, or none at all. `implied` says of each layer which folders its tar had no member for; without
    it that is guessed."""

    sources: Sequence[Path]
    target: Path
    parent: Path | None = None
    chunk_dict: Path | None = None
    blob_dir: Path | None = None
    blob_digests: Sequence[str] = ()
    original_blob_ids: Sequence[str] = ()
    blob_sizes: Sequence[int] = ()
    toc_digests: Sequence[str] = ()
    toc_sizes: Sequence[int] = ()
    implied: Sequence[Collection[bytes]] = ()
    prefetch_list: Sequence[bytes] = field(default_factory=tuple)


@dataclass(frozen=True)
class Merged:
    """What became of the layers."""

    blobs: tuple[str, ...]
    version: int
    compressor: Compressor


def merge(options: MergeOptions) -> Merged:
    """Write the merged bootstrap. Raises `NydusError`; `InconsistentLayersError` for layers that cannot be one image."""
    merger = _Merger(options)
    if options.parent is not None:
        merger.add_parent(options.parent)
    for position, source in enumerate(options.sources):
        merger.add_layer(position, source)
    return merger.write()


class _Merger:
    def __init__(self, options: MergeOptions) -> None:
        if not options.sources:
            raise ImageError("no layers to merge")
        lists: tuple[tuple[str, Sequence[object]], ...] = (
            ("--blob-digests", options.blob_digests),
            ("--original-blob-ids", options.original_blob_ids),
            ("--blob-sizes", options.blob_sizes),
            ("--blob-toc-digests", options.toc_digests),
            ("--blob-toc-sizes", options.toc_sizes),
        )
        for name, values in lists:
            if values and len(values) != len(options.sources):
                raise ImageError(f"{name}: {len(values)} entries for {len(options.sources)} layers")
        self._options = options
        self._tree: Node | None = None
        self._first: Bootstrap | None = None
        self._last: Bootstrap | None = None
        self._blobs: list[BlobInfo] = []
        self._places: dict[str, int] = {}
        self._dictionary: set[str] = set()
        if options.chunk_dict is not None:
            _, dictionary = load_metadata(options.chunk_dict)
            self._dictionary = {blob.blob_id for blob in dictionary.blobs}
            self._first = dictionary

    def add_parent(self, path: Path) -> None:
        _, parent = load_metadata(path)
        self._check(path, parent)
        self._put_over(path, parent, [standalone(blob, self._options.blob_dir) for blob in parent.blobs], None)

    def add_layer(self, position: int, path: Path) -> None:
        _, layer = load_metadata(path)
        self._check(path, layer)
        blobs = []
        own = 0
        for blob in layer.blobs:
            info = standalone(blob, self._options.blob_dir)
            if blob.blob_id not in self._dictionary:
                own += 1
                info = self._completed(position, blob, info)
            blobs.append(info)
        if own > 1:
            raise ImageError(f"{path}: {own} blobs of its own; a layer has one, the others are of --chunk-dict")
        self._put_over(path, layer, blobs, self._options.implied[position] if self._options.implied else None)

    def _completed(self, position: int, blob: BlobInfo, info: BlobInfo) -> BlobInfo:
        """What the command line says of a layer's own blob."""
        options = self._options
        separate = bool(blob.features & BlobFeature.SEPARATE)
        if options.original_blob_ids:
            info = replace(info, blob_id=options.original_blob_ids[position])
        if options.blob_digests:
            digest = options.blob_digests[position]
            info = replace(info, meta_digest=_hex(digest)) if separate else replace(info, blob_id=digest)
        if options.blob_sizes:
            size = options.blob_sizes[position]
            info = replace(info, meta_size=size) if separate else replace(info, compressed_size=size)
        if options.toc_digests:
            info = replace(info, toc_digest=_hex(options.toc_digests[position]))
        if options.toc_sizes:
            info = replace(info, toc_size=options.toc_sizes[position])
        return info

    def _check(self, path: Path, layer: Bootstrap) -> None:
        if self._first is None:
            self._first = layer
        first = self._first
        explicit = SuperFlag.EXPLICIT_UID_GID
        pairs = (
            ("chunk size", first.chunk_size, layer.chunk_size),
            ("version", first.version, layer.version),
            ("owners", bool(first.flags & explicit), bool(layer.flags & explicit)),
            ("tarfs mode", bool(first.flags & SuperFlag.TARFS), bool(layer.flags & SuperFlag.TARFS)),
        )
        for what, wanted, found in pairs:
            if wanted != found:
                raise InconsistentLayersError(f"{path}: {what} {found}, but the layers before it have {wanted}")
        digest = SuperFlag.DIGESTER_BLAKE3 | SuperFlag.DIGESTER_SHA256
        if layer.version == 5 and (first.flags ^ layer.flags) & digest:
            raise InconsistentLayersError(f"{path}: another digest algorithm, which RAFS v5 cannot mix")

    def _put_over(
        self, path: Path, layer: Bootstrap, blobs: Sequence[BlobInfo], implied: Collection[bytes] | None
    ) -> None:
        places = []
        for info in blobs:
            place = self._places.get(info.blob_id)
            if place is None:
                place = self._places[info.blob_id] = len(self._blobs)
                self._blobs.append(info)
            places.append(place)
        tree = tree_of(layer, str(path))
        renumber(tree, places)
        for folder in folders(tree):
            folder.node.implied = _looks_implied(folder.node) if implied is None else folder.node.path in implied
        self._last = layer
        # The marks of the lowest layer have nothing to act on, but they are no files either.
        lower = self._tree or Node(b"", None, tree.mode)
        self._tree = overlay(lower, tree, Whiteouts.OCI)

    def write(self) -> Merged:
        assert self._tree is not None and self._last is not None
        options, layer, tree = self._options, self._last, self._tree
        used: dict[int, int] = {}
        for node in with_chunks(tree):
            for chunk in node.chunks:
                used.setdefault(chunk.blob_index, len(used))
        # Blobs whose files all were removed by upper layers are not needed to read the image.
        renumber(tree, [used.get(place, -1) for place in range(len(self._blobs))])
        blobs = [renumbered(self._blobs[place], index) for place, index in used.items()]
        write_bootstrap(options.target, tree, blobs, layer, matched(tree, options.prefetch_list))
        compressor = flags_compressor(layer.flags)
        return Merged(tuple(blob.blob_id for blob in blobs), layer.version, compressor)


def _looks_implied(folder: Node) -> bool:
    """Whether a folder has what builders, the reference's as well, give to one that no member of the tar describes."""
    owner = folder.uid, folder.gid
    return folder.mode & 0o7777 == 0o755 and not any((*owner, folder.mtime, folder.mtime_ns, folder.xattrs))


def _hex(text: str) -> bytes:
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != 32:
        raise ImageError(f"{text[:80]!r} is no sha256 digest of 64 hexadecimal digits")
    return digest
