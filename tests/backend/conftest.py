"""Servers that several tests of backends share: S3 because starting it takes longer than using it, and one for faults."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from nydusd.storage.backend.registry.backend import RegistryBackend
from tests.backend.token_hub import NEW, OLD, SECRETS, Hub
from tests.support.backends import registry_backend
from tests.support.faulty_server import Faulty, faulty
from tests.support.s3_server import S3Server, s3_server


@pytest.fixture(scope="package")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One OpenStack Swift for all. Objects of different tests have different prefixes."""
    folder: Path = tmp_path_factory.mktemp("swift") / "data"
    with s3_server(folder) as server:
        gc.collect()  # botocore's client is a cycle that holds its connection
        yield server


@pytest.fixture
def server() -> Iterator[Faulty]:
    with faulty() as server:
        yield server


@pytest.fixture
def backend(server: Faulty) -> Iterator[RegistryBackend]:
    with registry_backend(server.host) as backend:
        yield backend


@pytest.fixture
def no_docker_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))


@pytest.fixture
def no_secret_in_any_log_line(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level("DEBUG")
    yield
    said = "\n".join(
        logging.Formatter().format(record) for record in caplog.get_records("call")
    )  # `text` is empty by now
    for secret in (*SECRETS, OLD, NEW, "token-number"):
        assert secret not in said


@pytest.fixture
def hub(server: Faulty) -> Hub:
    return Hub(server)
