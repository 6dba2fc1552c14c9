"""Running `nydus-image` in tests, and what a reader sees in what it made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from nydusd.image.reader import ImageReader
from nydusd.storage.backend import make_backend
from tests.support.manifest import Row
from tests.support.tree import manifest_rows

HERE = Path(__file__).resolve().parents[2]


def run_image(*args: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run the command and give what it says."""
    command = [sys.executable, "-m", "nydusd.cli.nydus_image", *map(str, args)]
    return subprocess.run(command, input=stdin, capture_output=True, cwd=HERE, timeout=120, check=False)


def image(*args: str | Path, stdin: bytes = b"") -> str:
    """Run the command, which must succeed; its output."""
    done = run_image(*args, stdin=stdin)
    assert done.returncode == 0, f"nydus-image {' '.join(map(str, args))}: {done.returncode}\n{done.stderr.decode()}"
    assert not done.stderr, done.stderr.decode()
    return done.stdout.decode()


def refused(*args: str | Path, stdin: bytes = b"") -> str:
    """Run the command, which must fail without a traceback; what it says."""
    done = run_image(*args, stdin=stdin)
    text = done.stderr.decode()
    assert done.returncode in (1, 2), f"{done.returncode}: {text}"
    assert "Traceback" not in text, text
    return text


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
