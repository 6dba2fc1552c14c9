"""Finding the mount point without touching what is mounted there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nydusd.cli import mountpoint
from nydusd.cli.mountpoint import has_fuse_mount, resolve_mountpoint
from nydusd.errors import ConfigError


def test_folder_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)
    for given in ("m", "./m/", "m/.", str(tmp_path / "m")):
        assert resolve_mountpoint(given) == str(tmp_path / "m")


def test_links_are_resolved(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "m").mkdir()
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "c").symlink_to("b/m")
    (tmp_path / "d").symlink_to(tmp_path / "c")
    assert resolve_mountpoint(str(tmp_path / "d")) == str(tmp_path / "a" / "m")
    assert resolve_mountpoint(str(tmp_path / "b" / "m")) == str(tmp_path / "a" / "m")


def test_root_of_the_machine() -> None:
    assert resolve_mountpoint("/") == "/"


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nothing")
    for given in ("f", "loop", "dangling", "missing", "f/x", "missing/x", "a\0b"):
        with pytest.raises(ConfigError, match="--mountpoint"):
            resolve_mountpoint(str(tmp_path / given))
    with pytest.raises(ConfigError, match="--mountpoint: '' is not a path"):
        resolve_mountpoint("")


def test_fuse_mount_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    touched: list[str] = []
    real = os.stat
    monkeypatch.setattr(mountpoint, "has_fuse_mount", lambda path: path == str(tmp_path / "m"))

    def recording_stat(path: str, **more: bool) -> os.stat_result:
        touched.append(path)
        return real(path, **more)

    monkeypatch.setattr(os, "stat", recording_stat)
    assert resolve_mountpoint(str(tmp_path / "m")) == str(tmp_path / "m")
    assert str(tmp_path / "m") not in touched
    monkeypatch.setattr(mountpoint, "has_fuse_mount", lambda _: False)
    resolve_mountpoint(str(tmp_path / "m"))
    assert str(tmp_path / "m") in touched


def test_only_mounts_of_fuse_count() -> None:
    assert not has_fuse_mount("/proc")
    assert not has_fuse_mount("/")
    assert mountpoint._unescape(rb"/a\040b\134c\011\012") == b"/a b\\c\t\n"
