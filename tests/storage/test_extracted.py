"""The bootstrap that is taken out of a blob: there and whole, whoever is killed over it, and nothing piles up beside it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nydusd.storage.api.image import inspect
from tests.support import oracle
from tests.support.segments import in_child, join

IMAGE = oracle.image("v6-inline")


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_left_by_those_that_were_killed_is_one_file_and_the_next_one_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        os._exit(9)

    def extract() -> None:
        inspect(str(IMAGE.bootstrap), [str(tmp_path)])

    monkeypatch.setattr(os, "replace", killed)
    for _ in range(3):
        assert join(in_child(extract)) == 9
    monkeypatch.undo()
    (left,) = _names(tmp_path)
    (tmp_path / left).write_bytes((tmp_path / left).read_bytes() + b"more")
    facts = inspect(str(IMAGE.bootstrap), [str(tmp_path)])
    assert _names(tmp_path) == [Path(facts.bootstrap).name]
    assert facts.size == os.path.getsize(facts.bootstrap)


def test_what_earlier_releases_left_goes_but_not_that_of_one_that_lives(tmp_path: Path) -> None:
    name = Path(inspect(str(IMAGE.bootstrap), [str(tmp_path)]).bootstrap).name
    kept = [f"{name}.{os.getpid()}.tmp", f"{name}.x.tmp", f"a{name}.{1 << 22}.tmp"]
    for other in (*kept, f"{name}.{1 << 22}.tmp"):
        (tmp_path / other).touch()
    inspect(str(IMAGE.bootstrap), [str(tmp_path)])
    assert _names(tmp_path) == sorted([name, *kept])


def test_folder_that_takes_nothing_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    facts = inspect(str(IMAGE.bootstrap), [str(tmp_path / "file"), str(tmp_path / "folder")])
    assert Path(facts.bootstrap).parent == tmp_path / "folder"
