"""`make fuzz`: at least 100,000 mutated inputs through every parser. FUZZ_INPUTS and FUZZ_SEED change number and seed."""

from __future__ import annotations

import os
import random
import sys
import time

from tests.fuzz import fuzz_blob_meta, fuzz_bootstrap, fuzz_chunk_map

TARGETS = (
    ("bootstraps", fuzz_bootstrap.run, 5),
    ("blob metadata", fuzz_blob_meta.run, 4),
    ("chunk maps", fuzz_chunk_map.run, 1),
)
"""What is fuzzed, by what, and its share of the inputs."""
STEP = 1000


def main() -> int:
    """Run all targets in steps, so that progress is seen and a failure can be repeated by its seed."""
    wanted = int(os.environ.get("FUZZ_INPUTS", "100000"))
    seed = int(os.environ.get("FUZZ_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
    shares = sum(share for _, _, share in TARGETS)
    print(f"seed {seed} (FUZZ_SEED repeats this run)")
    for name, run, share in TARGETS:
        count = -(-wanted * share // shares)
        counts: dict[str, int] = {}
        begin = time.monotonic()
        for done in range(0, count, STEP):
            for key, value in run(seed + done, min(STEP, count - done)).items():
                counts[key] = counts.get(key, 0) + value
            sys.stdout.write(f"\r{name}: {min(done + STEP, count):,} of {count:,}, {time.monotonic() - begin:.0f} s ")
            sys.stdout.flush()
        print("\n  " + ", ".join(f"{key}: {value:,}" for key, value in sorted(counts.items())))
    print("nothing but our own errors escaped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
