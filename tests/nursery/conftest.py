"""A daemon beside those of the tests: a nursery lives only as long as one does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.nursery import Another


@pytest.fixture(scope="module")
def first() -> Iterator[Another]:
    """A daemon that lives as long as a module's tests."""
    with Another(bootstrap=None) as daemon:
        yield daemon
