"""What the tests of EROFS have in common."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.faulty_server import faulty
from tests.support.mounted import Hub, Tree


@pytest.fixture
def hub(tree: Tree) -> Iterator[Hub]:
    with faulty() as server:
        yield Hub(tree, server)
