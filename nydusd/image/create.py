"""Makes an image: a tree becomes a blob and a bootstrap. Runs in the process of the command, with a pool of workers.

Nothing has its final name before all is written: blob first, then bootstrap, so that a bootstrap that is there names
a blob that is there.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from nydusd.errors import ConfigError
from nydusd.formats.blob_id import check_blob_id
from nydusd.formats.chunk_info import CHUNK_INFO
from nydusd.formats.model import BlobInfo, Digester
from nydusd.formats.superblock import SuperFlag
from nydusd.formats.write.rafs_v6 import compressor_flag, digester_flag
from nydusd.image.blob import INLINED_ID, BlobSettings, BlobWriter, fresh_key
from nydusd.image.bootstrap_v5 import BootstrapV5
from nydusd.image.bootstrap_v6 import BootstrapV6
from nydusd.image.chunking import Chunker, Piece, pieces_of, slot_size, tasks_of, unpack_results
from nydusd.image.errors import SourceError
from nydusd.image.folder import scan
from nydusd.image.known import KnownChunks, check_fits, open_dictionary
from nydusd.image.load import standalone, tree_of
from nydusd.image.node import Node, folders, growing_trees
from nydusd.image.options import BuildOptions, Source
from nydusd.image.output import Output, folder_of, write_file
from nydusd.image.overlay import overlay
from nydusd.image.pool import Pool
from nydusd.image.prefetch import PrefetchPolicy, matched, storage_order
from nydusd.image.progress import Progress
from nydusd.image.reader import load_metadata
from nydusd.image.reference import Layer, ReferenceWriter, TarfsWriter, tar_position
from nydusd.image.tar.spool import TarFile
from nydusd.image.tar.tree import read_tree
from nydusd.image.whiteout import Whiteouts
from nydusd.storage.cache.load import meta_file_bytes

_DEV_NULL = Path("/dev/null")
_MAX_FILE_CHUNKS = 1 << 24


@dataclass(frozen=True)
class Built:
    """What was made. `bootstrap` is None when it is inside the blob; `blobs` are all of the blob table, in its order.

    `implied` are the folders that are in the image only because something is in them: the tar has no member for them."""

    bootstrap: Path | None
    blob: Path | None
    blobs: tuple[str, ...]
    names: int
    data_bytes: int
    implied: frozenset[bytes]


def create(options: BuildOptions) -> Built:
    """Make the image. Raises `NydusError`: nothing is left then but what other runs made."""
    options.check()
    with growing_trees():
        return _create(options)


def _create(options: BuildOptions) -> Built:
    owners = not options.repeatable
    if not options.kind.is_tar:
        # Marks of removed files act on the parent's files; without a parent they mean nothing.
        spec = Whiteouts.NONE if options.parent else options.whiteouts
        return build(options, scan(os.fsencode(options.source), owners=owners, whiteouts=spec))
    if options.kind.is_reference:
        with Layer(options.source, _spool_folder(options), tarfs=options.kind is Source.TAR_TARFS) as layer:
            tree = read_tree(layer.fd, layer.size, str(options.source), owners=owners, stargz=options.kind.is_stargz)
            return _Build(options, tree, layer.fd, layer).run()
    with TarFile(options.source, _spool_folder(options)) as tar:
        tree = read_tree(tar.fd, tar.size, str(options.source), owners=owners, stargz=options.kind.is_stargz)
        return build(options, tree, tar.fd)


def build(options: BuildOptions, tree: Node, tar: int = -1) -> Built:
    """Make the image of a tree that was read before; `tar` is the descriptor that its segments are in.

    Its nodes get their chunks, so a tree is good for one image.
    """
    return _Build(options, tree, tar).run()


def _spool_folder(options: BuildOptions) -> Path:
    folder = options.blob_dir or options.cache_dir
    if folder is None:
        assert options.blob is not None
        folder = options.blob.parent
    return folder_of(folder)


class _Build:
    """One image in the making."""

    def __init__(self, options: BuildOptions, tree: Node, tar: int, layer: Layer | None = None) -> None:
        self._options = options
        self._tar = tar
        self._layer = layer
        self._known = KnownChunks()
        self._implied = frozenset(folder.node.path for folder in folders(tree) if folder.node.implied)
        self._tree = self._over_parent(options.parent, tree) if options.parent is not None else tree
        if options.chunk_dict is not None:
            dictionary = open_dictionary(options.chunk_dict, options.version, options.chunk_size)
            self._known.add_dictionary(dictionary, options.digester, options.blob_dir)
        key, iv = fresh_key() if options.encrypt else (b"", b"")
        self._settings = BlobSettings(
            version=options.version,
            compressor=options.compressor if layer is None else layer.compressor,
            digester=options.digester if layer is None else Digester.SHA256,
            chunk_size=options.chunk_size,
            batch_size=options.batch_size,
            aligned=options.version == 6 or options.aligned_chunk,
            inline=options.inline,
            toc=options.toc,
            separate=layer is not None,
            zran=layer is not None and layer.is_gzip,
            cipher_key=key,
            cipher_iv=iv,
        )

    def _over_parent(self, parent: Path, tree: Node) -> Node:
        """The tree put over that of the parent image, whose chunks are then known."""
        options = self._options
        _, lower = load_metadata(parent)
        check_fits("--parent-bootstrap", lower, options.version, options.chunk_size)
        if bool(lower.flags & SuperFlag.EXPLICIT_UID_GID) == options.repeatable:
            raise ConfigError("--parent-bootstrap: one image has owners and the other has none (--repeatable)")
        if options.version == 5 and any(blob.digester != options.digester for blob in lower.blobs):
            raise ConfigError("--parent-bootstrap: another digest algorithm, which RAFS v5 cannot mix")
        self._known = KnownChunks([standalone(info, options.blob_dir) for info in lower.blobs])
        for chunk in lower.raw_chunks():
            if lower.blobs[chunk.blob_index].digester == options.digester:
                self._known.add(chunk.digest, CHUNK_INFO.pack(*chunk))
        return overlay(tree_of(lower, str(parent)), tree, options.whiteouts)

    def run(self) -> Built:
        options = self._options
        with ExitStack() as stack:
            out = stack.enter_context(self._output())
            plain = stack.enter_context(Output(folder_of(options.cache_dir))) if options.cache_dir else None
            writer = self._writer(out, plain)
            stack.callback(writer.close)
            size = self._store(writer)
            self._known.forget()
            ci = writer.finish_data()
            if options.inline:
                bootstrap = self._bootstrap(writer, writer.table_id or INLINED_ID)
                writer.add_bootstrap(bootstrap.pack())
            writer.add_toc()
            blob_id = options.blob_id or out.digest().hex()
            if not options.inline:
                bootstrap = self._bootstrap(writer, writer.table_id or blob_id)
            has_blob = (bool(writer.count) or options.inline) and writer.is_file
            blob = self._publish(out, blob_id, has_blob)
            if plain is not None and options.cache_dir is not None and has_blob:
                self._publish_cache(plain, options.cache_dir / blob_id, writer, ci)
        place = None
        if not options.inline:
            place = self._write_bootstrap(bootstrap.pack())
        ids = [info.blob_id for info in self._blob_table(writer, writer.table_id or blob_id)]
        if has_blob and not writer.count:
            ids.append(blob_id)
        return Built(place, blob, tuple(ids), bootstrap.names, size, self._implied)

    def _writer(self, out: Output, plain: Output | None) -> BlobWriter:
        if self._layer is None:
            return BlobWriter(out, self._settings, self._known.reserve, plain, self._options.process_count())
        writer = TarfsWriter if self._options.kind is Source.TAR_TARFS else ReferenceWriter
        return writer(out, self._settings, self._known.reserve, self._layer, self._options.blob_id)

    def _output(self) -> Output:
        options = self._options
        if options.kind is Source.TAR_TARFS:
            return Output(_DEV_NULL.parent, _DEV_NULL)
        if options.blob is not None:
            return Output(folder_of(options.blob.parent), options.blob)
        if options.blob_dir is not None:
            return Output(folder_of(options.blob_dir))
        return Output(_DEV_NULL.parent, _DEV_NULL)  # hashed and counted, as the id is still that of the blob

    def _publish(self, out: Output, blob_id: str, has_blob: bool) -> Path | None:
        """Give the blob its name. One without content becomes no file in a folder, but an empty one where it was named."""
        options = self._options
        check_blob_id("command line", "--blob-id", os.fsencode(blob_id))
        path = options.blob
        if path is None and has_blob and options.blob_dir is not None:
            path = options.blob_dir / blob_id
        if path is not None:
            out.publish(path)
        return path

    def _publish_cache(self, plain: Output, stem: Path, writer: BlobWriter, ci: bytes) -> None:
        plain.extend(writer.plain_size)
        plain.publish(Path(f"{stem}.blob.data"))
        if ci:
            write_file(Path(f"{stem}.blob.meta"), meta_file_bytes(writer.header, ci))

    def _write_bootstrap(self, data: bytearray) -> Path:
        path = self._options.bootstrap
        if path is None:
            assert self._options.blob_dir is not None
            path = self._options.blob_dir / hashlib.sha256(data).hexdigest()
        folder_of(path.parent)
        write_file(path, data)
        return path

    def _blob_table(self, writer: BlobWriter, blob_id: str) -> list[BlobInfo]:
        return [info or writer.info(blob_id) for info in self._known.blobs]

    def _bootstrap(self, writer: BlobWriter, blob_id: str) -> BootstrapV5 | BootstrapV6:
        options = self._options
        blobs = self._blob_table(writer, blob_id)
        flags = compressor_flag(self._settings.compressor) | digester_flag(self._settings.digester)
        if not options.repeatable:
            flags |= SuperFlag.EXPLICIT_UID_GID
        listed = options.prefetch_list if options.prefetch is PrefetchPolicy.FS else []
        nodes = matched(self._tree, listed)
        size = options.chunk_size
        if options.version == 5:
            return BootstrapV5(
                self._tree, blobs, flags=flags, chunk_size=size, digester=options.digester, prefetch=nodes
            )
        encrypted = any(blob.cipher for blob in blobs)
        flags |= SuperFlag.AES_128_XTS if encrypted else SuperFlag.NOT_ENCRYPTED
        tarfs = options.kind is Source.TAR_TARFS
        return BootstrapV6(self._tree, blobs, flags=flags, chunk_size=size, prefetch=nodes, tarfs=tarfs)

    def _store(self, writer: BlobWriter) -> int:
        """Pack all files into the blob, and give each node its chunks. Bytes of all files."""
        options = self._options
        listed = [] if options.prefetch is PrefetchPolicy.NONE else options.prefetch_list
        order, first = storage_order(self._tree, listed)
        if self._layer is not None:
            order.sort(key=tar_position)
            first = 0
        total = sum(node.size for node in order)
        _check_counts(order, options.chunk_size)
        known, settings = self._known, self._settings
        if isinstance(writer, TarfsWriter):
            writer.add_all(order)
            return total
        chunker = Chunker(
            settings.compressor,
            settings.digester,
            settings.cipher(),
            os.fsencode(options.source),
            self._tar,
            known.digests(),
            summary_only=self._layer is not None,
        )
        progress = Progress(total, quiet=options.quiet)
        processes = max(1, min(options.process_count(), total // options.chunk_size + 1))
        with Pool(chunker, processes, slot_size(options.chunk_size)) as pool:
            feed = _Feed(order, options.chunk_size, options.batch_size // 2)
            for task, results, data in pool.run(tasks_of(feed)):
                at = done = 0
                for piece, packed in zip(task.pieces, unpack_results(results), strict=True):
                    digest, end = packed.digest, at + packed.stored
                    record = known.find(digest, piece.size)
                    if record is None:
                        with data[at:end] as content:
                            record = writer.add(piece, packed, content)
                        known.add(digest, record)
                    at = end
                    if feed.settle(record) < first:
                        writer.prefetch_size = writer.stored
                    done += piece.size
                progress.add(done)
        progress.end()
        return total


def _check_counts(order: Sequence[Node], chunk_size: int) -> None:
    """No file has more chunks than a blob, nor have all sparse files of a tar, which cost the tar nothing."""
    sparse = 0
    for node in order:
        chunks = -(-node.size // chunk_size)
        if chunks > _MAX_FILE_CHUNKS:
            raise SourceError(node.path, f"{node.size} bytes are more than {_MAX_FILE_CHUNKS} chunks: take larger ones")
        if node.segments is not None and len(node.segments) != 1:
            sparse += chunks
            if sparse > _MAX_FILE_CHUNKS:
                raise SourceError(
                    node.path, f"the sparse files up to it have more than {_MAX_FILE_CHUNKS} chunks: take larger ones"
                )


class _Feed:
    """The pieces of all files in order; remembers whose they are, so that `settle` can hand each its chunk."""

    def __init__(self, order: Sequence[Node], chunk_size: int, small: int) -> None:
        """`order` has no empty files."""
        self._order = order
        self._chunk_size = chunk_size
        self._small = small
        self._position = 0
        self._records: list[bytes] = []

    def __iter__(self) -> Iterator[Piece]:
        folder, prefix = None, b""
        for node in self._order:
            if node.parent is not folder:
                folder, path = node.parent, node.path
                prefix = path[: len(path) - len(node.name)]
            yield from pieces_of(node, self._chunk_size, self._small, prefix + node.name)

    def settle(self, record: bytes) -> int:
        """Give the first file that misses a chunk this one; the position of the file."""
        position = self._position
        node = self._order[position]
        records = self._records
        records.append(record)
        if len(records) * self._chunk_size >= node.size:
            node.packed = b"".join(records)
            records.clear()
            self._position += 1
        return position
