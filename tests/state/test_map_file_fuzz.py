"""A short run of the mutations of stored chunk maps; `make fuzz` runs more."""

from __future__ import annotations

from tests.fuzz import fuzz_chunk_map


def test_mutated_maps_and_records_are_never_believed_too_much() -> None:
    outcome = fuzz_chunk_map.run(1, 1500)
    assert sum(outcome.values()) == 1500
    assert outcome.keys() == {"set aside", "believed in part", "empty"}
