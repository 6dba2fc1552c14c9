"""Running `nydus-image` in tests, and what a reader sees in what it made."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path

import pytest

from nydusd.cli.nydus_image import build_parser
from nydusd.errors import NydusError
from nydusd.image.reader import ImageReader
from nydusd.storage.backend import make_backend
from tests.support.manifest import Row
from tests.support.tree import manifest_rows

HERE = Path(__file__).resolve().parents[2]


def run_image(*args: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run the command as a process and give what it says."""
    command = [sys.executable, "-m", "nydusd.cli.nydus_image", *map(str, args)]
    return subprocess.run(command, input=stdin, capture_output=True, cwd=HERE, timeout=120, check=False)


def image(*args: str | Path, stdin: bytes = b"") -> str:
    """Do in this process what the command does with these arguments (an interpreter's start takes longer than most of
    them); its output."""
    output, before = io.StringIO(), sys.stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin))
    try:
        with contextlib.redirect_stdout(output):
            options = build_parser().parse_args([str(arg) for arg in args])
            options.run(options)
    finally:
        sys.stdin = before
    return output.getvalue()


def refused(*args: str | Path, stdin: bytes = b"") -> str:
    """The same for a command that must fail; what it says."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises((NydusError, SystemExit)) as raised:
        image(*args, stdin=stdin)
    return said.getvalue() if isinstance(raised.value, SystemExit) else str(raised.value)


def create(tree: Path, out: Path, *args: str, stdin: bytes = b"") -> Path:
    """Make an image of a folder in the folder `out`: `bootstrap` and `blobs/`. The bootstrap's path, or the blob's."""
    blobs = out / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    inline = "--blob-inline-meta" in args
    where: list[str | Path] = [] if inline else ["-B", out / "bootstrap"]
    image("create", *where, "-D", blobs, *args, tree, stdin=stdin)
    if inline:
        (blob,) = blobs.iterdir()
        return blob
    return out / "bootstrap"


def rows(bootstrap: Path, blobs: Path | None = None) -> dict[str, Row]:
    """The manifest of an image, read with the product's own parsers and decoders."""
    folder = blobs or (bootstrap.parent if bootstrap.parent.name == "blobs" else bootstrap.parent / "blobs")
    backend = make_backend("localfs", {"dir": str(folder)})
    try:
        reader = ImageReader(bootstrap, backend)
        found = manifest_rows(reader.bootstrap, lambda ino: b"".join(reader.content(ino)))
        return {str(row["path"]): row for row in found}
    finally:
        backend.close()
