"""An OCI layout: a folder with `index.json` and `blobs/sha256/`. Runs in the process of the command."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from nydusd.image.errors import ImageError
from nydusd.image.oci.model import MAX_JSON, OCI_INDEX, OCI_MANIFEST, descriptors, digest_of, packed, parse
from nydusd.image.output import os_failure, save, write_file

_REF = "org.opencontainers.image.ref.name"
_COPY = 1 << 20


class Layout:
    """An image in a layout, by its name there; without a name it must be the only one."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name

    def _blob(self, digest: str) -> Path:
        return self._folder / "blobs" / "sha256" / digest.removeprefix("sha256:")

    def _read(self, path: Path) -> bytes:
        try:
            with _opened(path) as file:
                data = file.read(MAX_JSON + 1)
        except OSError as error:
            raise ImageError(f"{path}: cannot be read: {error.strerror or error}") from error
        if len(data) > MAX_JSON:
            raise ImageError(f"{path}: more than {MAX_JSON} bytes, which is no manifest and no index")
        return data

    def _index(self) -> list[dict[str, object]]:
        path = self._folder / "index.json"
        return descriptors(parse(self._read(path), str(path)).get("manifests"), str(path))

    def manifest(self) -> tuple[bytes, str]:
        found = [one for one in self._index() if not self._name or _name(one) == self._name]
        if len(found) != 1:
            wanted = f"named {self._name!r}" if self._name else "(give its name as FOLDER:NAME)"
            raise ImageError(f"{self._folder}: {len(found)} images {wanted}; exactly one is expected")
        return self.manifest_of(found[0]), str(found[0].get("mediaType", OCI_MANIFEST))

    def manifest_of(self, descriptor: Mapping[str, object]) -> bytes:
        data = self._read(self._blob(str(descriptor["digest"])))
        if digest_of(data) != descriptor["digest"]:
            raise ImageError(f"{self._folder}: blob {descriptor['digest']} has another digest: it is damaged")
        return data

    def fetch(self, descriptor: Mapping[str, object], path: str) -> None:
        source = self._blob(str(descriptor["digest"]))
        if f"sha256:{save(Path(path), _pieces(source))}" != descriptor["digest"]:
            raise ImageError(f"{source}: it has another digest than its name: it is damaged")

    def has(self, digest: str) -> bool:
        return self._blob(digest).is_file()

    def put(self, path: str, digest: str, size: int) -> None:
        target = self._blob(digest)
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, part)
            part.replace(target)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise os_failure(target, "cannot be written", error) from error

    def tag(self, manifest: bytes, media_type: str) -> None:
        digest = digest_of(manifest)
        self._blob(digest).parent.mkdir(parents=True, exist_ok=True)
        write_file(self._blob(digest), manifest)
        entry: dict[str, object] = {"mediaType": media_type, "digest": digest, "size": len(manifest)}
        if self._name:
            entry["annotations"] = {_REF: self._name}
        known = self._index() if (self._folder / "index.json").exists() else []
        kept = [one for one in known if _name(one) != self._name]
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [*kept, entry]}
        write_file(self._folder / "oci-layout", json.dumps({"imageLayoutVersion": "1.0.0"}).encode())
        write_file(self._folder / "index.json", packed(index))

    def close(self) -> None:
        """Nothing is kept open."""


def _pieces(path: Path) -> Iterator[bytes]:
    try:
        with _opened(path) as file:
            while piece := file.read(_COPY):
                yield piece
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror or error}") from error


def _opened(path: Path) -> BinaryIO:
    """A file of a layout, which anybody may have packed. Raises `OSError` for a pipe or device: it may give bytes for ever."""
    # O_NONBLOCK: opening a named pipe would wait for its writer.
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("no regular file")
    return file


def _name(descriptor: Mapping[str, object]) -> str:
    annotations = descriptor.get("annotations")
    return str(annotations.get(_REF, "")) if isinstance(annotations, dict) else ""
