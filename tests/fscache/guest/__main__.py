"""`python -m tests.fscache.guest KERNEL` (`make test-fscache`): boot the guest, have it run the checks, tell how each ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.fscache.guest.checks import CHECKS

HERE = Path(__file__).resolve().parent
SECONDS = 900
"""For all of it; on a quiet machine of two processors it takes about two minutes."""


def main(kernel: str) -> int:
    """The exit status: 0 when every check went well."""
    command: list[str | Path] = [HERE / "run.sh", kernel, sys.executable, "-m", "tests.fscache.guest.checks"]
    environment = {**os.environ, "TIMEOUT": str(SECONDS)}
    environment.pop("TMPDIR", None)
    passed = 0
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, errors="replace", env=environment, cwd=HERE.parents[2]
    ) as guest:
        assert guest.stdout is not None
        for line in guest.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            passed += line.startswith("ok ")
    print(f"fscache in a guest kernel: {passed} of {len(CHECKS)} checks passed")
    return int(guest.returncode != 0 or passed != len(CHECKS))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
