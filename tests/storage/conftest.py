"""What the tests of the storage layer have in common."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.storage.device_blob import Blob
from tests.support.segments import segment_name


@pytest.fixture
def blob(tmp_path: Path) -> Iterator[Blob]:
    with segment_name() as one, segment_name() as two:
        made = Blob(tmp_path, [one, two])
        yield made
        made.close()
