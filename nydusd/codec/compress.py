"""Decompression with a known output length. Run by workers (and by whoever opens an inlined bootstrap).

Each library is imported when its algorithm is first met, then its decoder is kept: a worker that only sees zstd never
loads lz4 or isal. No function gives, or makes a library allocate, more than the length that the caller names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

from nydusd.codec.errors import CodecError
from nydusd.formats.model import Compressor

Buffer = bytes | bytearray | memoryview
Decoder = Callable[[Buffer, int], Buffer]

MAX_CHUNK_SIZE = 1 << 24
"""Largest chunk, batch or context output, in bytes (16 MiB): a fact of the format."""

_LZ4_MAX_RATIO = 255
_ZSTD_WINDOW_LIMIT = 1 << 25
"""Frames without a content size make the library allocate their window: 32 MiB is four times what level 19 uses."""

_decoders: dict[Compressor, Decoder] = {}


def decompress(compressor: Compressor, data: Buffer, usize: int) -> Buffer:
    """The plain bytes of one stored unit: exactly `usize` of them (a view on `data` for `NONE`).

    Raises `CodecError` if the stream is damaged or holds more or fewer bytes. For gzip one member is read and bytes
    after it are ignored.
    """
    return decoder_for(compressor)(data, usize)


def decoder_for(compressor: Compressor) -> Decoder:
    """The function behind `decompress` for one algorithm, to be kept by hot loops."""
    decoder = _decoders.get(compressor)
    if decoder is None:
        decoder = _decoders[compressor] = _LOADERS[compressor]()
    return decoder


def gunzip_prefix(data: Buffer, usize: int) -> bytes:
    """The first `usize` bytes of the first gzip member in `data`, which may be longer and may be cut behind them.

    Chunks of legacy stargz layers are read so: only where their member starts is known. Raises `CodecError`.
    """
    plain, _ = _gunzip(data, usize)
    if len(plain) != usize:
        raise CodecError(f"gzip: the member holds {len(plain)} bytes; {usize} are needed")
    return plain


def _check_length(algorithm: str, plain: Buffer, usize: int) -> None:
    if len(plain) != usize:
        raise CodecError(f"{algorithm}: decompressed to {len(plain)} bytes instead of {usize}")


def _load_none() -> Decoder:
    def none(data: Buffer, usize: int) -> Buffer:
        _check_length("none", data, usize)
        return data

    return none


def _load_lz4() -> Decoder:
    from lz4 import block  # type: ignore[import-untyped]

    def lz4_block(data: Buffer, usize: int) -> Buffer:
        if usize > len(data) * _LZ4_MAX_RATIO:
            raise CodecError(f"lz4_block: {len(data)} bytes cannot hold {usize} (the format ends at a factor of 255)")
        try:
            plain: bytes = block.decompress(data, uncompressed_size=usize)
        except (block.LZ4BlockError, ValueError, OverflowError, MemoryError) as error:
            raise CodecError(f"lz4_block: {error}") from error
        _check_length("lz4_block", plain, usize)
        return plain

    return lz4_block


@functools.cache
def _igzip() -> ModuleType:
    from isal import igzip_lib

    return igzip_lib


def _gunzip(data: Buffer, limit: int) -> tuple[bytes, bool]:
    """At most `limit` bytes of the first member, and whether the member ended (with its checksum right)."""
    library = _igzip()
    try:
        inflater = library.IgzipDecompressor(flag=library.DECOMP_GZIP)
        return inflater.decompress(data, max_length=limit), inflater.eof
    except (library.IsalError, ValueError, OverflowError, MemoryError) as error:
        raise CodecError(f"gzip: {error}") from error


def _load_gzip() -> Decoder:
    def gzip(data: Buffer, usize: int) -> Buffer:
        plain, ended = _gunzip(data, usize + 1)
        _check_length("gzip", plain, usize)
        if not ended:
            raise CodecError(f"gzip: the member is cut after {usize} bytes of output, before its checksum")
        return plain

    return gzip


def _load_zstd() -> Decoder:
    from zstandard import ZstdDecompressor, ZstdError, frame_content_size

    decompressor = ZstdDecompressor(max_window_size=_ZSTD_WINDOW_LIMIT)

    def zstd(data: Buffer, usize: int) -> Buffer:
        try:
            # The library allocates what the frame header claims, whatever limit it is given: look first.
            claimed = frame_content_size(data)
            if claimed not in (-1, usize):
                raise CodecError(f"zstd: the frame claims {claimed} bytes instead of {usize}")
            plain = decompressor.decompress(data, max_output_size=usize)
        except (ZstdError, ValueError, OverflowError, MemoryError) as error:
            raise CodecError(f"zstd: {error}") from error
        _check_length("zstd", plain, usize)
        return plain

    return zstd


_LOADERS: dict[Compressor, Callable[[], Decoder]] = {
    Compressor.NONE: _load_none,
    Compressor.LZ4_BLOCK: _load_lz4,
    Compressor.GZIP: _load_gzip,
    Compressor.ZSTD: _load_zstd,
}
