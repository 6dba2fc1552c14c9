"""One registry with the two images for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.containerd.images import FULL, SMALL, Image, find_image
from tests.containerd.oci import push_image
from tests.support.registry import DockerRegistry, docker_registry


class Shop(NamedTuple):
    """The registry, and by name the images and the references to pull them by."""

    registry: DockerRegistry
    images: dict[str, Image]
    references: dict[str, str]


@pytest.fixture(scope="package")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    images = {name: find_image(name) for name in (FULL, SMALL)}
    with docker_registry(tmp_path_factory.mktemp("registry")) as registry:
        references = {name: push_image(registry, "shop/python", image) for name, image in images.items()}
        yield Shop(registry, images, references)
