"""A sample of the mutations of tests/fuzz/fuzz_blob_meta.py. `make fuzz` runs many more."""

from __future__ import annotations

from tests.fuzz.fuzz_blob_meta import TARGETS, run


def test_mutated_metadata_and_chunks_give_true_bytes_or_our_errors() -> None:
    outcome = run(seed=1, iterations=2000)
    assert sum(outcome.values()) == 2000
    for target in TARGETS:
        refused = sum(count for name, count in outcome.items() if name.startswith(target) and "accepted" not in name)
        assert refused > 20, f"mutations of {target} hardly ever break anything: {outcome}"
