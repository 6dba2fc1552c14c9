"""Where the larger set of fixtures is, if this machine has it."""

from __future__ import annotations

import os
from pathlib import Path

_BESIDE = Path(__file__).resolve().parents[3] / "shared" / "fixtures"


def larger_fixtures() -> Path | None:
    """The folder with `images/` and the manifests: $NYDUSD_FIXTURES, else ../shared/fixtures beside the checkout, else None."""
    named = os.environ.get("NYDUSD_FIXTURES")
    if named:
        return Path(named)
    return _BESIDE if (_BESIDE / "images").is_dir() else None
