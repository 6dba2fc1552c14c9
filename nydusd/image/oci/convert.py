"""Makes a nydus image of an OCI image: layer by layer, several at a time, then one bootstrap over all of them.

Runs in the process of the command; each layer is fetched and converted in a worker process of a pool, so that one comes
while another is converted. A converted layer is kept in the
cache folder under the layer's digest and the options, complete or not at all, and taken from there the next time. The
target is tagged last, when everything that its manifest names is there.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import mmap
import os
import shutil
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from nydusd.formats.model import BlobFeature, Compressor, Digester
from nydusd.image.create import Built, create
from nydusd.image.errors import CannotReferError, ImageError
from nydusd.image.merge import MergeOptions, merge
from nydusd.image.oci.history import new_history
from nydusd.image.oci.model import (
    INDEXES,
    MAX_JSON,
    NYDUS_BLOB,
    OCI_CONFIG,
    OCI_LAYER_GZIP,
    OCI_MANIFEST,
    Json,
    Store,
    descriptor,
    descriptors,
    digest_of,
    packed,
    parse,
)
from nydusd.image.options import BuildOptions, Source
from nydusd.image.output import os_failure, write_file
from nydusd.image.pool import Pool
from nydusd.image.progress import LayerProgress
from nydusd.image.reader import load_metadata
from nydusd.image.whiteout import Whiteouts
from nydusd.storage.backend import make_backend
from nydusd.storage.cache.load import load_ci, meta_file_bytes

_BLOB_MARK = "containerd.io/snapshot/nydus-blob"
_BOOTSTRAP_MARK = "containerd.io/snapshot/nydus-bootstrap"
_VERSION_MARK = "containerd.io/snapshot/nydus-fs-version"
_REF_MARK = "containerd.io/snapshot/nydus-ref"
_SOURCE_MARK = "containerd.io/snapshot/nydus-source-digest"
_LAYERS_AT_A_TIME = 4
_RECIPE = 2
"""Part of the names in the cache folder: another number where layers of earlier versions cannot be taken."""


@dataclass(frozen=True)
class ConvertOptions:
    """`reference` leaves the data in the layers, but for layers that cannot be referred to. `cache` keeps converted layers;
    None: a folder that goes away."""

    reference: bool = False
    version: int = 6
    compressor: Compressor = Compressor.ZSTD
    chunk_size: int = 1 << 20
    cache: Path | None = None
    platform: str = ""
    processes: int = 0


class LayerTask(NamedTuple):
    """A layer to be converted: its file, and the folder for what becomes of it."""

    digest: str
    source: str
    folder: str


class ConvertedLayer(NamedTuple):
    """`blob` is the file with the data (or, by reference, with the chunk information); None for a layer without files.
    `implied` are the folders that the layer has no member for."""

    bootstrap: Path
    blob: Path | None
    implied: frozenset[bytes]


def convert(source: Store, target: Store, options: ConvertOptions) -> str:
    """Convert an image; the digest of the new manifest. Raises `NydusError`."""
    if options.reference and options.version != 6:
        raise ImageError("--oci-ref needs RAFS v6")
    try:
        work = tempfile.TemporaryDirectory(prefix="nydus-convert-")
    except OSError as error:
        raise os_failure(Path(error.filename or "TMPDIR"), "no place for the layers", error) from error
    with work as name:
        return _Conversion(source, target, options, Path(name)).run()


def find_manifest(source: Store, platform: str = "") -> Json:
    """The manifest of an image: of an index, the one for a platform (OS/ARCH; empty: this machine's). Raises `ImageError`."""
    data, media_type = source.manifest()
    found = parse(data, "manifest")
    if media_type in INDEXES or "manifests" in found:
        wanted = platform or f"linux/{_machine()}"
        choices = descriptors(found.get("manifests"), "index")
        chosen = [one for one in choices if _platform(one) == wanted]
        if not chosen:
            have = ", ".join(sorted(_platform(one) for one in choices))
            raise ImageError(f"the image has no manifest for {wanted}, only for: {have[:1000]}")
        found = parse(source.manifest_of(chosen[0]), "manifest")
    return found


class _Conversion:
    def __init__(self, source: Store, target: Store, options: ConvertOptions, work: Path) -> None:
        self._source = source
        self._target = target
        self._options = options
        self._work = work
        self._cache = options.cache or work / "cache"
        self._part = f".layer-{os.getpid()}-"
        """What the names of folders begin with in which our workers make layers."""

    def run(self) -> str:
        manifest = find_manifest(self._source, self._options.platform)
        layers = descriptors(manifest.get("layers"), "manifest: layers")
        config_at = descriptor(manifest.get("config"), "manifest: config")
        if int(str(config_at["size"])) > MAX_JSON:
            raise ImageError(f"manifest: config: {config_at['size']} bytes; at most {MAX_JSON} are read")
        config_file = self._work / "config"
        self._source.fetch(config_at, str(config_file))
        config = parse(config_file.read_bytes(), "config")
        converted = self._convert_layers(layers)
        bootstrap = self._work / "image.boot"
        sources, implied = [layer.bootstrap for layer in converted], [layer.implied for layer in converted]
        merge(MergeOptions(sources=sources, target=bootstrap, implied=implied))
        _, parsed = load_metadata(bootstrap)
        used = {blob.meta_blob_id for blob in parsed.blobs}
        referred = {f"sha256:{blob.blob_id}" for blob in parsed.blobs if blob.features & BlobFeature.SEPARATE}
        # By reference, too, the old layers are not in the manifest: who pulls it would download and unpack them.
        entries: list[Json] = []
        diff_ids: list[str] = []
        kept: list[bool] = []
        self._copy_layers([layer for layer in layers if layer["digest"] in referred])
        for layer, made in zip(layers, converted, strict=True):
            kept.append(made.blob is not None and made.blob.name in used)
            if made.blob is not None and kept[-1]:
                used.discard(made.blob.name)
                digest = str(layer["digest"])
                entries.append(self._blob_entry(made.blob, digest, reference=digest in referred))
                diff_ids.append(str(entries[-1]["digest"]))
        entry, diff_id = self._bootstrap_entry(bootstrap, converted)
        entries.append(entry)
        diff_ids.append(diff_id)
        changed = config | {"rootfs": {"type": "layers", "diff_ids": diff_ids}}
        changed["history"] = new_history(config.get("history"), kept)
        return self._publish(manifest, changed, entries)

    def _convert_layers(self, layers: Sequence[Json]) -> list[ConvertedLayer]:
        """All layers, in order; those of the same digest once. What the cache has is not converted again."""
        wanted = {str(layer["digest"]): layer for layer in layers}
        folders = {digest: self._folder(digest) for digest in wanted}
        missing = sorted(
            (layer for digest, layer in wanted.items() if not folders[digest].is_dir()),
            key=lambda layer: -int(str(layer["size"])),  # who comes last should not keep all others waiting
        )
        if missing:
            tasks = [
                LayerTask(str(layer["digest"]), str(self._layer_file(layer)), str(folders[str(layer["digest"])]))
                for layer in missing
            ]
            count = min(len(tasks), self._options.processes or _LAYERS_AT_A_TIME, _LAYERS_AT_A_TIME)
            each = max(1, (self._options.processes or len(os.sched_getaffinity(0))) // count)

            def work(task: LayerTask, _: memoryview) -> None:
                self._source.fetch(wanted[task.digest], task.source)
                self._convert_layer(task, each)

            progress = LayerProgress({self._layer_file(layer): int(str(layer["size"])) for layer in missing})
            self._source.close()  # connections are no good in two processes
            try:
                with Pool(work, count, mmap.PAGESIZE) as pool:
                    for task, _ in pool.run_any(tasks, progress.show):
                        progress.done(Path(task.source))
            finally:
                for part in self._cache.glob(f"{self._part}*"):  # of workers that were killed
                    shutil.rmtree(part, ignore_errors=True)
            progress.end()
        return [_converted(folders[str(layer["digest"])]) for layer in layers]

    def _layer_file(self, layer: Json) -> Path:
        return self._work / str(layer["digest"]).removeprefix("sha256:")

    def _folder(self, digest: str) -> Path:
        options = self._options
        kind = "ref" if options.reference else options.compressor.name.lower()
        recipe = f"v{options.version}-{kind}-{options.chunk_size:x}-{_RECIPE}"
        return self._cache / f"{digest.removeprefix('sha256:')}.{recipe}"

    def _convert_layer(self, task: LayerTask, processes: int) -> None:
        """In a worker: make the layer's files in a folder beside, then give it its name."""
        folder = Path(task.folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=self._part, dir=folder.parent))
        try:
            (part / "blobs").mkdir()
            try:
                built = self._create(task, part, processes)
            except ImageError as error:
                raise ImageError(f"layer {task.digest}: {str(error).replace(task.source, 'layer')}") from error
            write_file(part / "implied", b"".join(path + b"\0" for path in sorted(built.implied)))
            if folder.is_dir():
                return  # another run was faster
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _create(self, task: LayerTask, part: Path, processes: int) -> Built:
        """The image of one layer. A layer that cannot be referred to is packed, even if the others are."""
        options = self._options
        build = BuildOptions(
            source=Path(task.source),
            kind=Source.TARGZ_REF if options.reference else Source.TARGZ_RAFS,
            version=options.version,
            bootstrap=part / "bootstrap",
            blob_dir=part / "blobs",
            compressor=options.compressor,
            chunk_size=options.chunk_size,
            whiteouts=Whiteouts.NONE,
            processes=processes,
            quiet=True,
        )
        try:
            return create(build)
        except CannotReferError:
            # Digests as of the layers that are referred to: an image has one algorithm.
            return create(replace(build, kind=Source.TARGZ_RAFS, digester=Digester.SHA256))

    def _copy_layers(self, layers: Sequence[Json]) -> None:
        """Layers that are referred to must be where the image is; daemons fetch them by their digests."""
        for layer in layers:
            digest = str(layer["digest"])
            if not self._target.has(digest):
                path = self._layer_file(layer)
                if not path.exists():
                    self._source.fetch(layer, str(path))
                self._target.put(str(path), digest, path.stat().st_size)

    def _blob_entry(self, blob: Path, source: str, *, reference: bool) -> Json:
        digest = _file_digest(blob)
        if not self._target.has(digest):
            self._target.put(str(blob), digest, blob.stat().st_size)
        marks = {_BLOB_MARK: "true", _SOURCE_MARK: source}
        if reference:
            marks[_REF_MARK] = source
        return {"mediaType": NYDUS_BLOB, "digest": digest, "size": blob.stat().st_size, "annotations": marks}

    def _bootstrap_entry(self, bootstrap: Path, converted: Sequence[ConvertedLayer]) -> tuple[Json, str]:
        """The layer with the metadata, and the digest of its tar."""
        files = {"image.boot": bootstrap.read_bytes()}
        files |= self._meta_files(bootstrap, converted)
        tar = _tar(files)
        data = gzip.compress(tar, 6, mtime=0)
        path = self._work / "bootstrap.tar.gz"
        write_file(path, data)
        self._target.put(str(path), digest_of(data), len(data))
        marks = {_BOOTSTRAP_MARK: "true", _VERSION_MARK: str(self._options.version)}
        entry: Json = {"mediaType": OCI_LAYER_GZIP, "digest": digest_of(data), "size": len(data), "annotations": marks}
        return entry, digest_of(tar)

    def _meta_files(self, bootstrap: Path, converted: Sequence[ConvertedLayer]) -> dict[str, bytes]:
        """The chunk information of each layer that is referred to, as a daemon's cache has it: it need not be fetched."""
        _, parsed = load_metadata(bootstrap)
        places = {layer.blob.name: layer.blob for layer in converted if layer.blob is not None}
        found = {}
        for blob in parsed.blobs:
            if not blob.features & BlobFeature.SEPARATE:
                continue
            backend = make_backend("localfs", {"blob_file": str(places[blob.meta_blob_id])})
            try:
                header, ci = load_ci(blob, backend.get_reader(blob.meta_blob_id).read)
            finally:
                backend.close()
            found[f"{blob.blob_id}.blob.meta"] = meta_file_bytes(header, ci)
        return found

    def _publish(self, manifest: Json, config: Json, entries: list[Json]) -> str:
        data = packed(config)
        path = self._work / "new-config"
        write_file(path, data)
        self._target.put(str(path), digest_of(data), len(data))
        made: Json = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": {"mediaType": OCI_CONFIG, "digest": digest_of(data), "size": len(data)},
            "layers": entries,
        }
        annotations = manifest.get("annotations")
        if isinstance(annotations, dict):
            made["annotations"] = annotations
        result = packed(made)
        self._target.tag(result, OCI_MANIFEST)
        return digest_of(result)


def _converted(folder: Path) -> ConvertedLayer:
    blobs = list((folder / "blobs").iterdir())
    implied = (folder / "implied").read_bytes().split(b"\0")[:-1]
    return ConvertedLayer(folder / "bootstrap", blobs[0] if blobs else None, frozenset(implied))


def _tar(files: Mapping[str, bytes]) -> bytes:
    """A tar with the folder `image` and files in it; the same bytes for the same files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        folder = tarfile.TarInfo("image")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(folder)
        for name, data in files.items():
            info = tarfile.TarInfo(f"image/{name}")
            info.size, info.mode = len(data), 0o444
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _platform(one: Mapping[str, object]) -> str:
    platform = one.get("platform")
    if not isinstance(platform, dict):
        return "unknown"
    variant = f"/{platform['variant']}" if platform.get("variant") and platform.get("architecture") == "arm" else ""
    return f"{platform.get('os')}/{platform.get('architecture')}{variant}"


def _machine() -> str:
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
