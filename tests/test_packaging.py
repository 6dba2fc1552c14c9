"""The project's files agree with its code: what is imported is declared, what is declared is pinned, versions are equal."""

from __future__ import annotations

import ast
import configparser
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nydusd.version import VERSION

ROOT = Path(__file__).resolve().parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
DECLARED = [Requirement(line) for line in SETUP["options"]["install_requires"].split("\n") if line]
PINS = {
    name: dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", (ROOT / "requirements" / name).read_text(), re.MULTILINE))
    for name in ("constraints.txt", "dev.txt")
}


def imported_modules() -> set[str]:
    """Top-level modules of others that `nydusd` and `workers` import anywhere, also inside functions."""
    found = set()
    for path in [*(ROOT / "nydusd").rglob("*.py"), *(ROOT / "workers").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"nydusd", "workers"}


def test_what_is_imported_is_declared_and_the_reverse() -> None:
    owners = packages_distributions()
    imported = {canonicalize_name(owners[module][0]) for module in imported_modules()}
    assert imported == {canonicalize_name(requirement.name) for requirement in DECLARED}


def test_dependencies_are_ranges_of_major_and_minor() -> None:
    for requirement in DECLARED:
        assert re.fullmatch(r"~=\d+\.\d+", str(requirement.specifier)), f"{requirement}: must be `~= X.Y`"


def test_pinned_versions_satisfy_the_ranges() -> None:
    pinned = {canonicalize_name(name): version for name, version in PINS["constraints.txt"].items()}
    for requirement in DECLARED:
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_every_pin_has_a_hash_and_no_index_is_named() -> None:
    for name, pins in PINS.items():
        text = (ROOT / "requirements" / name).read_text()
        entries = re.findall(
            r"^[A-Za-z0-9._-]+==[^\n]*\\\n(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+", text, re.MULTILINE
        )
        assert len(entries) == len(pins) > 0, f"{name}: a pin without hash"
        assert "://" not in text, f"{name}: names an address"


def test_the_two_pin_files_do_not_contradict() -> None:
    both = PINS["constraints.txt"].keys() & PINS["dev.txt"].keys()
    assert {name: PINS["constraints.txt"][name] for name in both} == {name: PINS["dev.txt"][name] for name in both}


def test_version_is_the_same_everywhere() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert SETUP["metadata"]["version"] == VERSION == newest[1]
