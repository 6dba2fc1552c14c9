"""Raising the limit of open files."""

from __future__ import annotations

import resource

import pytest

from nydusd.cli import limits
from nydusd.cli.limits import raise_nofile_limit


class Machine:
    """A machine with its limits, in place of the real one."""

    def __init__(self, soft: int, hard: int, privileged: bool) -> None:
        self.limit = (soft, hard)
        self.privileged = privileged

    def get(self, _: int) -> tuple[int, int]:
        return self.limit

    def set(self, _: int, limit: tuple[int, int]) -> None:
        if limit[1] > self.limit[1] and not self.privileged:
            raise ValueError("not allowed to raise maximum limit")
        self.limit = limit


@pytest.mark.parametrize(
    ("soft", "hard", "privileged", "file_max", "wanted", "expected", "warns"),
    [
        (1024, 4096, True, 10**9, 0, (1024, 4096), False),
        (1024, 4096, True, 10**9, 1_000_000, (1_000_000, 1_000_000), False),
        (1024, 4096, True, 10**9, 2_000_000, (1_000_000, 1_000_000), False),
        (1024, 4096, True, 116_384, 1_000_000, (100_000, 100_000), False),
        (1024, 4096, True, 16_384, 1_000_000, (1024, 4096), False),
        (1024, 4096, False, 10**9, 1_000_000, (4096, 4096), True),
        (1024, 4096, False, 10**9, 2048, (2048, 4096), False),
        (5000, 9000, False, 10**9, 2048, (2048, 9000), False),
    ],
)
def test_limit(
    soft: int,
    hard: int,
    privileged: bool,
    file_max: int,
    wanted: int,
    expected: tuple[int, int],
    warns: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine(soft, hard, privileged)
    monkeypatch.setattr(resource, "getrlimit", machine.get)
    monkeypatch.setattr(resource, "setrlimit", machine.set)
    monkeypatch.setattr(limits, "_file_max", lambda: file_max)
    warning = raise_nofile_limit(wanted)
    assert machine.limit == expected
    assert (warning is not None) == warns
