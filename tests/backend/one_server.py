"""What tests of a backend and the one server behind it have in common: a blob, a server that gives it, a read of it."""

from __future__ import annotations

from nydusd.storage.backend.base import ReadHow
from nydusd.storage.backend.registry.backend import RegistryBackend
from tests.support.backends import Blob
from tests.support.faulty_server import Reply, Request, part_of

BLOB = Blob()
PAGE = b"<html><body>" + b"Sorry, something went wrong. " * 40_000 + b"</body></html>"


def good(request: Request) -> Reply:
    return part_of(BLOB.data, request)


def read(backend: RegistryBackend, offset: int = 1000, size: int = 150_000, how: ReadHow | None = None) -> bytes:
    return bytes(backend.get_reader(BLOB.id).read(offset, size, how or ReadHow()))
