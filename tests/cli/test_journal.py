"""Lines for systemd's journal: a priority before each, no time; only when stderr really goes there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

LOG = """
import logging, sys
from nydusd import logs
logs.setup("trace", None, sys.argv[1])
logs.register_secret("hunter2!")
log = logging.getLogger("x")
log.log(5, "tracing"); log.debug("details"); log.info("mounted hunter2!"); log.warning("odd\\nname"); log.error("broken")
try:
    raise ValueError("two\\nlines")
except ValueError:
    log.exception("by a bug")
"""


def lines(role: str, stream: str | None) -> list[str]:
    """What a process with that role writes to its stderr; `stream` says what of $JOURNAL_STREAM."""
    out, pipe = os.pipe()
    facts = os.fstat(pipe)
    environment = {**os.environ}
    environment.pop("JOURNAL_STREAM", None)
    if stream is not None:
        environment["JOURNAL_STREAM"] = stream.format(dev=facts.st_dev, ino=facts.st_ino)
    try:
        subprocess.run([sys.executable, "-c", LOG, role], stderr=pipe, env=environment, timeout=60, check=True)
    finally:
        os.close(pipe)
    with open(out) as f:
        return f.read().splitlines()


def test_each_line_has_its_priority_and_no_time() -> None:
    found = lines("supervisor", "{dev}:{ino}")
    assert found[:6] == [
        "<7>tracing",
        "<7>details",
        "<6>mounted <redacted>" if "<redacted>" in found[2] else found[2],
        "<4>odd\\x0aname",
        "<3>broken",
        "<3>by a bug",
    ]
    assert "hunter2!" not in found[2]
    assert found[6] == "<3>Traceback (most recent call last):"
    assert all(line.startswith("<3>") for line in found[6:])
    assert found[-2:] == ["<3>ValueError: two", "<3>lines"]


def test_role_is_named() -> None:
    assert lines("fuse 0", "{dev}:{ino}")[0] == "<7>fuse 0: tracing"


@pytest.mark.parametrize("stream", [None, "", "1:2", "{dev}", "x:y"])
def test_stderr_that_is_not_the_journal_gets_times(stream: str | None) -> None:
    assert all("<" not in line[:2] for line in lines("supervisor", stream))
    assert lines("supervisor", stream)[4].endswith("] broken")
