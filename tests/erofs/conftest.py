"""What the tests of EROFS have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.erofs.shared_file import Kernel
from tests.support.faulty_server import faulty
from tests.support.mounted import Hub, Tree


@pytest.fixture
def hub(tree: Tree) -> Iterator[Hub]:
    with faulty() as server:
        yield Hub(tree, server)


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    with ExitStack() as stack:
        yield Kernel(tmp_path / "blob.data", stack)
