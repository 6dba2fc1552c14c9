"""Each build has a name of its own, by its sources: so nobody takes other code for the same, in a checkout or installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ASK = """
import os, sys
from nydusd.nursery import place
from nydusd.version import GIT_COMMIT, commit_on_disk
before = place.identity()
if sys.argv[1:]:
    os.utime(sys.argv[1], (1, 1))
print(GIT_COMMIT, commit_on_disk(), place.identity() == before)
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A checkout of our own."""
    folder = tmp_path / "code"
    for package in ("nydusd", "workers"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "requirements"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def ask(code: Path, *arguments: str) -> tuple[str, str, bool]:
    """The names of what a process has loaded and of what is on disk then, and whether a nursery would still be the same."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", ASK, *arguments],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(code)},
    )  # fmt: skip
    loaded, found, same = done.stdout.split()
    return loaded, found, same == "True"


def test_in_a_checkout_each_change_of_a_source_is_another_build(code: Path) -> None:
    name, on_disk, same = ask(code)
    assert re.fullmatch(r"python-[0-9a-f]{12}", name)
    assert (on_disk, same) == (name, True)
    (code / "nydusd/__pycache__").mkdir(exist_ok=True)
    (code / "nydusd/__pycache__/left.py").touch()
    assert ask(code) == (name, name, True), "what an interpreter leaves beside the sources is none"
    names = [name]
    (code / "workers/loop.py").write_text((code / "workers/loop.py").read_text() + "\n")
    names.append(ask(code)[0])
    (code / "nydusd/frontends/newer.py").touch()
    names.append(ask(code)[0])
    (code / "nydusd/frontends/newer.py").unlink()
    assert ask(code)[0] == names[1]
    assert len(set(names)) == 3


def test_a_lock_of_an_editor_or_what_is_missing_stops_nobody(code: Path) -> None:
    (code / "nydusd/.#build.py").symlink_to("somebody@host.1:2")
    shutil.rmtree(code / "workers")
    name, on_disk, same = ask(code)
    assert (on_disk, same) == (name, True)


def test_without_sources_a_process_has_the_name_of_its_build(code: Path, tmp_path: Path) -> None:
    out = built(code, tmp_path / "out")
    name = ask(out)[0]
    subprocess.run([sys.executable, "-m", "compileall", "-q", "-b", str(out)], check=True)
    for source in out.glob("**/*.py"):
        source.unlink()
    assert ask(out) == (name, name, True)


def test_a_process_goes_on_with_the_name_of_what_it_has_loaded(code: Path) -> None:
    before = ask(code)[0]
    loaded, on_disk, same = ask(code, str(code / "nydusd/codec/compress.py"))
    assert loaded == before != on_disk
    assert not same, "another nursery for the next daemons"
    assert ask(code)[0] == on_disk


def built(code: Path, out: Path) -> Path:
    """What setuptools makes of the sources, for a wheel."""
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(out)]
    subprocess.run(command, cwd=code, check=True, capture_output=True)
    return out


def test_what_is_built_has_a_name_by_what_its_sources_say_and_keeps_it(code: Path, tmp_path: Path) -> None:
    name = ask(built(code, tmp_path / "one"))[0]
    for source in code.glob("nydusd/**/*.py"):
        os.utime(source, (1, 1))
    assert ask(built(code, tmp_path / "two"))[0] == name
    loaded, on_disk, _ = ask(tmp_path / "one", str(tmp_path / "one/nydusd/codec/compress.py"))
    assert loaded == on_disk == name
    changed = (code / "workers/loop.py").read_text() + "\n"
    (code / "workers/loop.py").write_text(changed)
    os.utime(code / "workers/loop.py", (1, 1))
    assert ask(built(code, tmp_path / "one"))[0] != name
    assert (tmp_path / "one/workers/loop.py").read_text() == changed, "though the one that was there is newer"
    assert 'BUILT = ""' in (code / "nydusd/build.py").read_text()
