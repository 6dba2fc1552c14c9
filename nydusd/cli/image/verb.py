"""What a verb of `nydus-image` is, and the types of arguments that several of them take."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from nydusd.formats.model import Compressor
from nydusd.image.output import write_file
from nydusd.version import build_info


class Verb(NamedTuple):
    """`name` selects it. `run` does it and raises `NydusError`."""

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def size(text: str) -> int:
    """An argparse type: bytes, decimal or hexadecimal with 0x."""
    digits = text[2:] if text[:2] in ("0x", "0X") else text
    if not digits.isascii() or not digits.isalnum() or len(digits) > 20:
        raise argparse.ArgumentTypeError(f"must be a number of bytes, decimal or with 0x, but is {text[:32]!r}")
    try:
        return int(digits, 16 if digits is not text else 10)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a number of bytes, decimal or with 0x, but is {text[:32]!r}"
        ) from None


def processes(text: str) -> int:
    """An argparse type: a number of processes; 0 is as many as there are CPUs."""
    if not text.isascii() or not text.isdecimal() or len(text) > 4:
        raise argparse.ArgumentTypeError(f"must be a number of processes, 0 to 9999, but is {text[:32]!r}")
    return int(text)


def add_output_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-J", "--output-json", type=Path, metavar="PATH", help="write a summary as JSON to this file")


def write_summary(
    path: Path | None, *, bootstrap: Path | None, blobs: Sequence[str], version: int, compressor: Compressor
) -> None:
    """The file of `--output-json`, with the keys that converters read."""
    if path is None:
        return
    facts = build_info()
    summary = {
        "version": f"{facts['package_ver']}-{facts['git_commit']}",
        "bootstrap": str(bootstrap or ""),
        "blobs": list(blobs),
        "external_bootstrap": "",
        "external_blobs": [],
        "trace": {},
        "fs_version": str(version),
        "compressor": compressor.name.lower(),
    }
    write_file(path, json.dumps(summary, indent=2).encode())
