"""A sample of the mutations that `python -m tests.fuzz` runs by the hundred thousand."""

from __future__ import annotations

from tests.fuzz import fuzz_bootstrap


def test_mutated_bootstraps_are_refused_or_read_within_bounds() -> None:
    counts = fuzz_bootstrap.run(seed=20261124, iterations=1500)
    assert counts["inputs"] == 1500
    # The sample is only worth something when mutations get past the opening, and calls both fail and succeed.
    assert counts["refused when opened"] < 500
    assert counts["refused calls"] > 1000
    assert counts["answers"] > 1000
