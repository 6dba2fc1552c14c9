"""What the tests of exports under kills have in common."""

from __future__ import annotations

import pytest

from bench.image import Built, build
from tests.killing.plan import Plan
from tests.support.trees import random_tree

FILES, FILE_SIZE, CHUNK = 6, 1 << 20, 1 << 16


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    tree = random_tree(tmp_path_factory.mktemp("tree"), FILES, FILE_SIZE)
    return build(tree, tmp_path_factory.mktemp("image"), CHUNK)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return Plan(tmp_path_factory.mktemp("plan") / "plan")
