"""Options of `nydus-image` that say where the metadata and the blobs of an existing image are."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from msgspec import to_builtins

from nydusd.config import load_config_file
from nydusd.errors import ConfigError
from nydusd.image.reader import ImageReader
from nydusd.storage.backend import SUPPORTED, make_backend
from nydusd.storage.backend.base import BlobBackend, BlobReader


def add_bootstrap(parser: argparse.ArgumentParser) -> None:
    """The metadata, as an argument or (as older callers do) an option."""
    parser.add_argument("BOOTSTRAP", nargs="?", type=Path, help="the metadata, or a blob with the metadata inside")
    parser.add_argument("-B", "--bootstrap", type=Path, metavar="PATH", help="the same")


def bootstrap_path(args: argparse.Namespace) -> Path:
    """Raises `ConfigError` unless exactly one is given."""
    given = [path for path in (args.BOOTSTRAP, args.bootstrap) if path is not None]
    if len(given) != 1:
        raise ConfigError("name the metadata once: BOOTSTRAP or --bootstrap PATH")
    path: Path = given[0]
    return path


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-D", "--blob-dir", type=Path, metavar="DIR", help="folder with the blobs")
    parser.add_argument("-C", "--config", metavar="PATH", help="a daemon's configuration, whose backend has the blobs")


def add_backend(parser: argparse.ArgumentParser) -> None:
    """All ways to name blobs."""
    add_config(parser)
    parser.add_argument("-b", "--blob", type=Path, metavar="PATH", help="the one blob of the image")
    add_remote(parser)


def add_remote(parser: argparse.ArgumentParser) -> None:
    """A backend by its type and configuration."""
    kinds = ", ".join(kind for kind in SUPPORTED if kind != "localfs")
    parser.add_argument("--backend-type", metavar="TYPE", help=f"type of a backend: {kinds}")
    parser.add_argument("--backend-config", metavar="JSON", help="its configuration")
    parser.add_argument("--backend-config-file", type=Path, metavar="PATH", help="file with its configuration")


def open_backend(args: argparse.Namespace) -> BlobBackend | None:
    """The backend that the options name, None for none. Raises `ConfigError` for more than one, or a wrong one."""
    ways = [name for name in ("blob_dir", "blob", "config", "backend_type") if getattr(args, name, None) is not None]
    if len(ways) > 1:
        raise ConfigError(f"--{ways[0].replace('_', '-')} cannot be used with --{ways[1].replace('_', '-')}")
    if not ways:
        return None
    if ways[0] == "blob_dir":
        return make_backend("localfs", {"dir": str(args.blob_dir)})
    if ways[0] == "blob":
        return make_backend("localfs", {"blob_file": str(args.blob)})
    if ways[0] == "config":
        backend = load_config_file(args.config).backend
        if backend is None:
            raise ConfigError(f"{args.config}: it names no backend")
        return make_backend(backend.type, to_builtins(backend.chosen()))
    return make_backend(args.backend_type, _json_config(args))


class FolderFirst(BlobBackend):
    """Blobs of a folder; those that are not in it come from another backend, if there is one."""

    def __init__(self, folder: Path, other: BlobBackend | None) -> None:
        super().__init__()
        self._folder = folder
        self._local = make_backend("localfs", {"dir": str(folder)})
        self._other = other

    def _new_reader(self, blob_id: str) -> BlobReader:
        here = self._other is None or (self._folder / blob_id).is_file()
        backend = self._local if here or self._other is None else self._other
        return backend.get_reader(blob_id)


def _json_config(args: argparse.Namespace) -> dict[str, object]:
    text = args.backend_config
    if args.backend_config_file is not None:
        try:
            text = args.backend_config_file.read_bytes()
        except OSError as error:
            raise ConfigError(f"--backend-config-file: {args.backend_config_file}: {error.strerror}") from error
    if text is None:
        raise ConfigError("--backend-type needs --backend-config or --backend-config-file")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError("--backend-config: no valid JSON") from error
    if not isinstance(config, dict):
        raise ConfigError("--backend-config: must be a JSON object")
    return config


def open_reader(args: argparse.Namespace) -> ImageReader:
    """The image that the options name."""
    return ImageReader(bootstrap_path(args), open_backend(args))
