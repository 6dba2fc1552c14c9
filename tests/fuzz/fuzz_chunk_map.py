"""Mutations of stored chunk maps and their records: whatever they hold, no chunk is ready that was not recorded as ours.

`run(seed, iterations)` is the whole interface. It works on files in a folder of its own. Property: `load` never raises
and never gives READY for a chunk outside the good record, and a checkpoint after it stores exactly the truth.
"""

from __future__ import annotations

import os
import random
import struct
import tempfile
from collections import Counter
from pathlib import Path

from nydusd.storage.state.map_file import checkpoint, load, record_path
from nydusd.storage.state.segment import EMPTY, READY, VERIFY, Identity
from tests.fuzz.fuzz_blob_meta import mutate

_HEADER = struct.Struct("<IIII")
_COUNTS = (1, 5, 8, 9, 64, 373)


def _map(rng: random.Random, count: int) -> bytes:
    """A map as a reference daemon could leave it: any bits, perhaps the marker, perhaps the old version."""
    bits = bytearray(rng.randbytes((count + 7) // 8))
    if count % 8:
        bits[-1] &= 0xFF00 >> count % 8 & 0xFF
    marker = rng.choice((0, 0, 0, 0x4D4D4150, rng.getrandbits(32)))
    return _HEADER.pack(0x424D4150, rng.choice((1, 1, 1, 0)), 0x434D4150, marker).ljust(4096, b"\0") + bits


def _mutate_map(rng: random.Random, raw: bytes) -> bytes:
    """Half of the time only the parts that mean something are hit."""
    if rng.random() < 0.5:
        return mutate(rng, raw)
    size = len(raw)
    mixed = mutate(rng, raw[:16] + raw[4096:])
    return (mixed[:16] + raw[16:4096] + mixed[16:])[: size + 9]


def _one(rng: random.Random, folder: Path) -> str:
    count = rng.choice(_COUNTS)
    path = folder / "b.blob.data.chunk_map"
    record = record_path(path)
    fd = os.open(folder / "b.blob.data", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        identity = Identity.of(fd, 4096 * count, rng.choice((b"", b"L" * 32)))
        ours = sorted(rng.sample(range(count), rng.randrange(count + 1)))
        checkpoint(path, fd, ours, count, identity)
        if rng.random() < 0.5:
            path.write_bytes(_map(rng, count))
        kind = rng.randrange(4)
        if kind & 1:
            path.write_bytes(_mutate_map(rng, path.read_bytes()))
        if kind & 2:
            record.write_bytes(mutate(rng, record.read_bytes()))
        state = load(path, count, identity)
        assert len(state) == count and set(state) <= {EMPTY, READY, VERIFY}
        ready = {chunk for chunk in range(count) if state[chunk] == READY}
        assert ready <= set(ours), f"chunks {ready - set(ours)} are ready and nobody recorded them"
        checkpoint(path, fd, ours, count, identity)
        again = load(path, count, identity)
        assert {chunk for chunk in range(count) if again[chunk] == READY} == set(ours)
        if path.with_name(path.name + ".bad").exists():
            return "set aside"
        return "believed in part" if ready else "empty"
    finally:
        os.close(fd)
        for left in folder.iterdir():
            left.unlink()


def run(seed: int, iterations: int) -> dict[str, int]:
    """Try `iterations` mutations; how many ended how. Raises what must not happen, with a note that says how to repeat it."""
    outcome: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="nydusd-fuzz-") as folder:
        for iteration in range(iterations):
            try:
                outcome[_one(random.Random(f"{seed}:{iteration}"), Path(folder))] += 1
            except BaseException as error:
                error.add_note(f"seed {seed}, iteration {iteration}")
                raise
    return dict(outcome)
