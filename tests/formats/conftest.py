"""Bootstraps that tests may change: a fresh copy of the fixture's bytes for each test."""

from __future__ import annotations

import pytest

from tests.support.patched import PatchedV5, PatchedV6


@pytest.fixture
def v6() -> PatchedV6:
    return PatchedV6()


@pytest.fixture
def tarfs() -> PatchedV6:
    return PatchedV6("v6-tarfs")


@pytest.fixture
def v5() -> PatchedV5:
    return PatchedV5()
