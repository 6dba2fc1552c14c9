"""`python -m tests.fscache.guest KERNEL [CHECK…]` (`make test-fscache`): boot the guest, run the checks, tell how they end.

With $NYDUSD_FIXTURES the larger images are among them (minutes more).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.fscache.guest.checks import chosen

HERE = Path(__file__).resolve().parent
SECONDS = 900 if "NYDUSD_FIXTURES" not in os.environ else 3600
"""For all of it; on a quiet machine of two processors it takes about three minutes, without the larger images."""


def main(kernel: str, *names: str) -> int:
    """The exit status: 0 when every check went well."""
    command: list[str | Path] = [HERE / "run.sh", kernel, sys.executable, "-m", "tests.fscache.guest.checks", *names]
    environment = {**os.environ, "TIMEOUT": str(SECONDS)}
    environment.pop("TMPDIR", None)
    wanted = len(chosen(names))
    passed = 0
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, errors="replace", env=environment, cwd=HERE.parents[2]
    ) as guest:
        assert guest.stdout is not None
        for line in guest.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            passed += line.startswith("ok ")
    print(f"fscache in a guest kernel: {passed} of {wanted} checks passed")
    return int(guest.returncode != 0 or passed != wanted)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
