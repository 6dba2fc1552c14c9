"""The images of a whole Debian root file system that the other tests of this folder run: nothing of it is lost."""

from __future__ import annotations

from tests.containerd.images import FULL, cache_folder, find_image
from tests.image.build import rows
from tests.support import manifest


def test_image_of_a_debian_root_file_system_is_that_tree() -> None:
    made = find_image(FULL)
    wanted = manifest.walk(cache_folder() / "debian-python3")
    assert len(wanted) > 5000
    assert manifest.differences(wanted, rows(made.bootstrap, made.blob.parent)) == []
