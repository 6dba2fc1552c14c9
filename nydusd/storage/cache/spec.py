"""BlobSpec: all that a worker must know of a blob, as plain data that crosses a process border as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nydusd.formats.model import BlobInfo, Cipher, Compressor, Digester

_ENUMS = {"compressor": Compressor, "digester": Digester, "cipher": Cipher, "ci_compressor": Compressor}
LOCAL = ("localfs", "localdisk")
"""Backends that decompress workers read by themselves."""
NO_COOKIE = (0, 0)
_BYTES = ("toc_digest", "meta_digest", "cipher_key", "cipher_iv")


@dataclass(frozen=True, slots=True)
class BlobSpec:
    """A blob in a cache: where its bytes come from, where they go, and the name of its segment.

    `work_dir` is None for the dummy cache; `meta_dir` holds `<id>.blob.meta` then. `bootstrap` is the metadata file whose
    chunk table holds the digests; `path_id` the blob id in its name, `extracted` whether it was taken out of that blob.
    `cookie`: the data file is one of the kernel's cache (fscache), which the process of this pid has open under this number;
    `NO_COOKIE` while the kernel does not want it. `more`: other images of the domain, which list chunks that `bootstrap` does
    not: their `bootstrap`, `path_id`, `extracted`, and the blob's index in them.
    """

    handle: int
    generation: int
    info: BlobInfo
    segment: str
    work_dir: str | None
    meta_dir: str
    bootstrap: str
    path_id: str | None
    extracted: bool
    backend: str
    backend_config: dict[str, Any]
    always_verify: bool
    cookie: tuple[int, int] | None = None
    more: tuple[tuple[str, str | None, bool, int], ...] = ()

    def _path(self, suffix: str) -> Path:
        return Path(self.work_dir if self.work_dir is not None else self.meta_dir) / (self.info.blob_id + suffix)

    @property
    def data_path(self) -> Path | None:
        """The cache file: the virtual uncompressed blob. None if there is none, or it is the kernel's."""
        return None if self.work_dir is None or self.cookie is not None else self._path(".blob.data")

    @property
    def map_path(self) -> Path:
        return self._path(".blob.data.chunk_map")

    @property
    def meta_path(self) -> Path:
        """The chunk information, as the reference stores it."""
        return self._path(".blob.meta")

    @property
    def remote(self) -> bool:
        """Whether reading from the backend waits for a network: then fetch workers do it, and they alone."""
        return self.backend not in LOCAL

    @property
    def server(self) -> str:
        """Tells servers apart without giving secrets away; empty for a local backend."""
        if not self.remote:
            return ""
        found = (self.backend_config.get(key) for key in ("host", "endpoint", "addr"))
        return f"{self.backend} {next(filter(None, found), '')}"

    def to_json(self, secrets: bool = True) -> dict[str, Any]:
        """As plain data. Without `secrets`, for who does not talk to a remote backend, the settings of one are left out."""
        out = asdict(self) | {"info": info_to_json(self.info)}
        if self.remote and not secrets:
            out["backend_config"] = {}
        return out

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> BlobSpec:
        raw = {"more": (), **raw}  # a supervisor of an earlier release says nothing of it
        known = {f.name: raw[f.name] for f in fields(cls)}
        known["info"] = info_from_json(raw["info"])
        known["more"] = tuple((str(b), None if p is None else str(p), bool(e), int(i)) for b, p, e, i in raw["more"])
        known["cookie"] = None if raw["cookie"] is None else (int(raw["cookie"][0]), int(raw["cookie"][1]))
        return cls(**known)


def info_to_json(info: BlobInfo) -> dict[str, Any]:
    """An entry of the blob table as plain data."""
    out = asdict(info)
    for name in _BYTES:
        out[name] = out[name].hex()
    return out


def info_from_json(raw: dict[str, Any]) -> BlobInfo:
    """What `info_to_json` gave."""
    info = dict(raw)
    for name in _BYTES:
        info[name] = bytes.fromhex(info[name])
    for name, kind in _ENUMS.items():
        info[name] = kind(info[name])
    return BlobInfo(**info)
