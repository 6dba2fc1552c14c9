"""Counts what is in images: files, sizes, chunks, and what would be stored once. Runs in the process of the command."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nydusd.formats.model import RawChunk
from nydusd.image.load import tree_of
from nydusd.image.node import names
from nydusd.image.reader import load_metadata

_PAGE = 4096
_SIZE_CLASSES = 45
_CHUNK_BITS = range(12, 21)

Key = tuple[bytes, int]


@dataclass
class ImageInfo:
    """The figures of an image, or of several together, under the reference's keys. Sizes are bytes.

    `chunk_sizes` counts the chunks that all files would have with chunks of 4 KiB, 8 KiB … 1 MiB; `file_sizes` counts
    files by the bits of their size. `own_` are different chunks, `ref_` those that the base image has, `dedup_` the
    different chunks of all base images.
    """

    dirs: int = 0
    files: int = 0
    symlinks: int = 0
    chunks: int = 0
    file_size: int = 0
    comp_size: int = 0
    uncomp_size: int = 0
    padding_size: int = 0
    chunk_sizes: list[int] = field(default_factory=lambda: [0] * len(_CHUNK_BITS))
    file_sizes: list[int] = field(default_factory=lambda: [0] * _SIZE_CLASSES)
    dedup_chunks: int = 0
    dedup_comp_size: int = 0
    dedup_uncomp_size: int = 0
    own_chunks: int = 0
    own_comp_size: int = 0
    own_uncomp_size: int = 0
    ref_chunks: int = 0
    ref_comp_size: int = 0
    ref_uncomp_size: int = 0


class Statistics:
    """Figures of base images, and of a target image compared with them."""

    def __init__(self) -> None:
        self.base = ImageInfo()
        self.target: ImageInfo | None = None
        self._known: dict[Key, RawChunk] = {}

    def add_base(self, path: Path) -> None:
        """Count an image in. Raises `FormatError`, `ImageError`."""
        chunks = self._count(self.base, path)
        _sum(self.base, "own", chunks.values())
        for key, chunk in chunks.items():
            if key not in self._known:
                self._known[key] = chunk
                _sum(self.base, "dedup", [chunk])

    def add_target(self, path: Path) -> None:
        """Count the image that is to be compared."""
        self.target = ImageInfo()
        chunks = self._count(self.target, path)
        _sum(self.target, "ref", [chunk for key, chunk in chunks.items() if key in self._known])
        _sum(self.target, "own", [chunk for key, chunk in chunks.items() if key not in self._known])

    @staticmethod
    def _count(info: ImageInfo, path: Path) -> dict[Key, RawChunk]:
        _, bootstrap = load_metadata(path)
        different: dict[Key, RawChunk] = {}
        done: set[int] = set()
        for name in names(tree_of(bootstrap, str(path))):
            node = name.node
            info.dirs += node.is_folder
            info.symlinks += node.is_symlink
            if not node.is_file:
                continue
            info.files += 1
            if id(node) in done:
                continue
            done.add(id(node))
            padding = -node.size % _PAGE
            info.file_sizes[min(node.size.bit_length(), _SIZE_CLASSES - 1)] += 1
            info.file_size += node.size
            info.padding_size += padding
            info.uncomp_size += padding
            for place, bits in enumerate(_CHUNK_BITS):
                info.chunk_sizes[place] += -(-node.size >> bits)
            chunks = node.chunks
            info.chunks += len(chunks)
            for chunk in chunks:
                info.comp_size += chunk.csize
                info.uncomp_size += chunk.usize
                different.setdefault((chunk.digest, chunk.usize), chunk)
        return different

    def as_json(self) -> dict[str, object]:
        """The summary with the reference's keys."""
        return {
            "dedup_enabled": True,
            "target_enabled": self.target is not None,
            "base_image": asdict(self.base),
            "target_image": asdict(self.target or ImageInfo()),
        }

    def lines(self) -> list[str]:
        """The figures for a reader."""
        found = []
        for title, info in (("base image", self.base), ("target image", self.target)):
            if info is None:
                continue
            found.append(f"{title}:")
            for key, value in asdict(info).items():
                if isinstance(value, int):
                    found.append(f"  {key.replace('_', ' '):<20}{value}")
            counts = {bits: count for bits, count in enumerate(info.file_sizes) if count}
            found.append("  files by bits of size: " + ", ".join(f"{bits}: {count}" for bits, count in counts.items()))
            sizes = zip(_CHUNK_BITS, info.chunk_sizes, strict=True)
            found.append("  chunks by bits of chunk size: " + ", ".join(f"{bits}: {count}" for bits, count in sizes))
        return found


def _sum(info: ImageInfo, kind: str, chunks: Iterable[RawChunk]) -> None:
    for chunk in chunks:
        for suffix, value in (("chunks", 1), ("comp_size", chunk.csize), ("uncomp_size", chunk.usize)):
            name = f"{kind}_{suffix}"
            setattr(info, name, getattr(info, name) + value)
