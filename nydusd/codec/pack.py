"""Compression of one unit (a chunk, a batch, chunk information), as images store it. Run by the image builder.

The rule of the format: what does not become smaller is stored as it is. Libraries are imported when first used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from nydusd.formats.model import Compressor

Packer = Callable[[bytes], tuple[bytes, bool]]
"""The stored form, and whether it is a compressed one."""

_ZSTD_LEVEL = 3
"""The library's default, and what the reference's builder uses."""


def pack(compressor: Compressor, data: bytes) -> tuple[bytes, bool]:
    """The stored form of `data`, and whether it is compressed."""
    return packer_for(compressor)(data)


@functools.cache
def packer_for(compressor: Compressor) -> Packer:
    """The function behind `pack` for one algorithm, to be kept by hot loops. KeyError for gzip: nothing is packed so."""
    return new_packer(compressor)


def new_packer(compressor: Compressor) -> Packer:
    """The same with a state of its own: for a thread, which must not use another's."""
    return {Compressor.NONE: _load_none, Compressor.LZ4_BLOCK: _load_lz4, Compressor.ZSTD: _load_zstd}[compressor]()


def _load_none() -> Packer:
    return lambda data: (data, False)


def _load_lz4() -> Packer:
    from lz4 import block  # type: ignore[import-untyped]

    def lz4_block(data: bytes) -> tuple[bytes, bool]:
        packed: bytes = block.compress(data, store_size=False) if data else b""
        return (packed, True) if len(packed) < len(data) else (data, False)

    return lz4_block


def _load_zstd() -> Packer:
    from zstandard import ZstdCompressor

    compressor = ZstdCompressor(level=_ZSTD_LEVEL)

    def zstd(data: bytes) -> tuple[bytes, bool]:
        packed = compressor.compress(data) if data else b""
        return (packed, True) if len(packed) < len(data) else (data, False)

    return zstd
