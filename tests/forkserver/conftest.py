"""Modules that children of a fork server run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.forkserver.spawned import CHILD, LEAVES


@pytest.fixture(autouse=True)
def _modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    (tmp_path / "leaves.py").write_text(LEAVES)
    (tmp_path / "extra.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
