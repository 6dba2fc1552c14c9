"""What setup.cfg cannot say: whatever is built carries the name of its build, `BUILT` in nydusd/build.py."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

NAMED = "nydusd/build.py"
UNNAMED_LINE = 'BUILT = ""'
LIBRARIES = "requirements/constraints.txt"


def name_of(sources: Iterable[str]) -> str:
    """Twelve hexadecimal digits: a hash of what these files hold, by their paths below the folder that we are in."""
    found = hashlib.sha256()
    for source in sorted(sources):
        content = Path(source).read_bytes()
        found.update(f"{source} {len(content)}\n".encode() + content)
    return found.hexdigest()[:12]


class BuildPy(build_py):
    """Copies the sources, and writes the name of their build into the copy."""

    def run(self) -> None:
        self.force = True  # else a source older than what an earlier build left is not copied, but is in the name
        super().run()
        if self.editable_mode:
            return
        sources = [Path(source).as_posix() for _, _, source in self.find_all_modules()]
        name = name_of([*sources, *([LIBRARIES] if Path(LIBRARIES).exists() else [])])
        text = Path(NAMED).read_text()
        assert text.count(UNNAMED_LINE) == 1, f"{NAMED}: {UNNAMED_LINE} must be there once"
        Path(self.build_lib, NAMED).write_text(text.replace(UNNAMED_LINE, f'BUILT = "{name}"'))


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildPy})
