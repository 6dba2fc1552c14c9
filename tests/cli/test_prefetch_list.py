"""The list named by --prefetch-files."""

from __future__ import annotations

from pathlib import Path

import pytest

from nydusd.cli.prefetch_list import read_prefetch_list
from nydusd.errors import ConfigError


def test_lines_are_trimmed_and_blank_ones_skipped(tmp_path: Path) -> None:
    path = tmp_path / "l"
    path.write_bytes(b"/bin/sh\n\n  /etc  \r\n\t\n/n\xff \xc3\xa9\n/last")
    assert read_prefetch_list(str(path)) == [b"/bin/sh", b"/etc", b"/n\xff \xc3\xa9", b"/last"]


def test_empty_list(tmp_path: Path) -> None:
    (tmp_path / "l").write_bytes(b"")
    assert read_prefetch_list(str(tmp_path / "l")) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"/a\nbin/sh\n", "line 2 must be an absolute path of at most 4096 bytes without NUL, but is b'bin/sh'"),
        (b"/a\0b", "line 1 must be"),
        (b"/" + b"a" * 4096, "line 1 must be"),
        (b"/a\n" * (6 << 20), "has more than 16777216 bytes"),
    ],
)
def test_wrong_list_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "l").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_prefetch_list(str(tmp_path / "l"))
    assert message in str(error.value)
    assert str(error.value).startswith(f"--prefetch-files {tmp_path}/l: ")


@pytest.mark.parametrize("path", ["/no/where", "/tmp", "/dev/zero", "a\0b"])
def test_what_is_no_file_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="--prefetch-files"):
        read_prefetch_list(path)
