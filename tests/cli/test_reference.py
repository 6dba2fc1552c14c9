"""Man pages and completions: fresh, well-formed, and doing what they are for in real shells."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nydusd.cli.reference import Command, commands, files

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", sorted(files()))
def test_file_is_what_the_command_lines_say(name: str) -> None:
    assert (ROOT / name).read_text() == files()[name], f"{name} is stale: run `make reference`"


def test_nothing_else_lies_beside_them() -> None:
    there = {f"{folder}/{path.name}" for folder in ("man", "completions") for path in (ROOT / folder).iterdir()}
    assert there | {"docs/metrics.md"} == set(files())


def test_check_says_what_is_stale() -> None:
    done = subprocess.run([sys.executable, "scripts/reference", "--check"], cwd=ROOT, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("name", ["nydusd", "nydusctl", "nydus-image"])
def test_man_page_is_well_formed_and_names_every_option(name: str) -> None:
    path = ROOT / "man" / f"{name}.8"
    lint = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning,stop", path], capture_output=True, text=True, check=False
    )
    assert (lint.returncode, lint.stdout, lint.stderr) == (0, "", "")
    page = subprocess.run(["mandoc", "-T", "ascii", path], capture_output=True, check=True).stdout
    plain = subprocess.run(["col", "-b"], input=page, capture_output=True, check=True).stdout.decode()
    command = next(command for command in commands() if command.name == name)
    words = {flag for option in command.options for flag in option.flags} | {sub.name for sub in command.commands}
    assert not [word for word in words if word not in plain]


def test_every_variable_that_is_read_is_in_the_man_page_and_every_word_is_explained() -> None:
    page = (ROOT / "man" / "nydusd.8").read_text()
    code = "".join(path.read_text() for path in (ROOT / "nydusd").rglob("*.py"))
    names = set(re.findall(r'"(NYDUSD?_[A-Z_]*|DOCKER_CONFIG|IMAGE_PULL_AUTH)"', code))
    assert {"NYDUSD_DEFAULTS", "NYDUS_HEADER_", "NYDUSD_UNIT"} < names
    assert not [name for name in names if f"`{name}" not in page.replace("\\fB", "`")]

    def words(command: Command) -> Iterator[str]:
        yield from (f"{command.name} {option.flags}" for option in command.options if not option.help)
        for sub in command.commands:
            yield from words(sub)

    assert [word for command in commands() for word in words(command)] == []


COMPLETE = """
source "$1"; shift
name=$1
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
"_$name"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def bash(*words: str) -> set[str]:
    """What bash offers for the last of these words."""
    file = ROOT / "completions" / f"{words[0]}.bash"
    # compopt works in a running completion only.
    script = "compopt() { :; }\n" + COMPLETE
    done = subprocess.run(
        ["bash", "-c", script, "-", file, *words], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["nydusctl", "wor"], {"workers"}),
        (["nydusctl", "-S", "info", "me"], {"metrics"}),  # the socket's name is no command
        (["nydusctl", "-S", "x", "metrics", ""], {"backend", "cache", "fsstats", "-h", "--help", "-r", "--raw"}),
        (["nydusctl", "-S", "x", "cache", "--p"], {"--png"}),
        (["nydusctl", "--sock", "setup.c"], {"setup.cfg"}),
        (["nydusctl", "-S", "x", "set", "log-level", "de"], {"debug"}),
        (["nydusd", "fu"], {"fuse"}),
        (["nydusd", "fuse", "--log-level", "w"], {"warn"}),
        (["nydusd", "fuse", "--boot"], {"--bootstrap"}),
        (["nydusd", "fuse", "-M", "nydusd/f"], {"nydusd/forkserver", "nydusd/formats", "nydusd/frontends"}),
    ],
)
def test_bash_completes(words: list[str], offered: set[str]) -> None:
    assert bash(*words) == offered


def zsh(line: str, until: str) -> str:
    """What an interactive zsh shows when Tab is pressed twice after `line`: as soon as `until` is in it."""
    pid, fd = os.forkpty()
    if pid == 0:
        os.environ.update(TERM="dumb", ZDOTDIR="/nonexistent", HOME="/nonexistent", LC_ALL="C")
        os.execvp("zsh", ["zsh", "-f", "-i"])
    shown = b""
    try:
        setup = (
            f"PS1='READY''> '; fpath=({ROOT}/completions $fpath); autoload -Uz compinit; compinit -u -D; cd {ROOT}\n"
        )
        os.write(fd, setup.encode())
        deadline = time.monotonic() + 30
        asked = False
        while until.encode() not in shown and time.monotonic() < deadline:
            if select.select([fd], [], [], 0.5)[0]:
                shown += os.read(fd, 4096)
            if not asked and b"READY> " in shown:
                asked, shown = True, b""
                os.write(fd, line.encode() + b"\t\t")
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(fd)
    return shown.decode(errors="replace")


@pytest.mark.parametrize(
    ("line", "until"),
    [
        ("nydusctl -S x w", "orkers"),
        ("nydusctl -S x metrics ", "fsstats"),
        ("nydusctl -S x cache --", "write a picture of the chunk maps"),
        ("nydusctl -S x set log-level de", "bug"),
        ("nydusd fuse --boot", "strap"),
    ],
)
def test_zsh_completes(line: str, until: str) -> None:
    assert until in zsh(line, until)
