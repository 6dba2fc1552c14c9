"""An older release of ours and this one take over from each other, under readers that compare every byte. Real daemons.

The older one is code that was packed by `scripts/pack-release`: what its processes say to each other and leave to the next is
what they said and left, not what today's code says that it was.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from bench.image import build
from nydusd.version import GIT_COMMIT
from tests.supervisor.lives import IMAGE, ROOT, device_of, with_cache
from tests.support import oracle
from tests.support.daemon import Daemon, image_config, wait_for_role
from tests.support.discipline import wait_until
from tests.support.keeper import Keeper, upgrade
from tests.support.trees import random_tree
from tests.support.verifying import Verifying

PACKED = sorted((ROOT / "tests" / "data" / "releases").glob("*.tar.xz"))
BUILT = "2026-01-01T00:00:00Z"
"""What an older release says of when it was built, and this one does not."""
CHUNK = 1 << 16


@pytest.fixture(params=PACKED, ids=lambda packed: packed.name.removesuffix(".tar.xz"))
def older(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of an older release."""
    folder = tmp_path / "older"
    with tarfile.open(request.param) as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content is not None:
                path = folder / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.read())
    says(folder, "BUILD_TIME", BUILT)
    return folder


def says(release: Path, name: str, value: str) -> None:
    """Have a release say something else of itself."""
    file = release / "nydusd" / "version.py"
    text, count = re.subn(
        rf'^{name}: Final = ".*"$', f'{name}: Final = "{value}"', file.read_text(), flags=re.MULTILINE
    )
    assert count == 1
    file.write_text(text)


class Served:
    """A daemon whose next process may be of another release; what is read of it."""

    def __init__(self, daemon: Daemon, readers: Sequence[Verifying], files: Sequence[tuple[int, bytes]]) -> None:
        self.daemon = daemon
        self._readers = readers
        self._files = files
        self._device = device_of(daemon)

    def next_is_of(self, release: Path) -> None:
        run_by(self.daemon, release)

    def check(self, release: Path) -> None:
        """It is served by this release, by the same mount; who has a file open reads on, and so do all others."""
        answer = self.daemon.get("/api/v1/daemon")
        assert isinstance(answer, dict)
        assert (answer["version"]["build_time"] == BUILT) == (release != ROOT)
        assert device_of(self.daemon) == self._device
        for reader in self._readers:
            reader.go_on(100)
        for fd, content in self._files:
            assert os.pread(fd, len(content) + 1, 0) == content


def run_by(daemon: Daemon, release: Path) -> None:
    """Have the daemon's next process be of this release."""
    daemon._environment |= {"PYTHONPATH": str(release), "PYTHONDONTWRITEBYTECODE": "1"}


@contextmanager
def served(folder: Path, release: Path, args: tuple[str, ...] = ()) -> Iterator[Served]:
    """A daemon of a release with an image of its own, and one without a cache that was mounted by the API: it always misses."""
    for name in ("tree/files", "tree/more", "sizes"):
        (folder / name).mkdir(parents=True)
    tree, sizes = random_tree(folder / "tree" / "files", 2, 1 << 20), folder / "sizes"
    for path, content in oracle.truth(IMAGE.name).items():
        if path.startswith(b"sizes/"):
            (folder / os.fsdecode(path)).write_bytes(content)
    built = build(folder / "tree", folder / "image", CHUNK)
    config = image_config(built.blob.parent, folder / "cache") | {"amplify_io": 0}
    config["nydusd"] = {"front_ends": 2, "worker_patience": 2.0}
    daemon = Daemon(built.bootstrap, built.blob.parent, cache=folder / "cache", config=config, args=args)
    daemon.command.insert(1, "-P")  # only what $PYTHONPATH names
    run_by(daemon, release)
    with daemon, ExitStack() as stack:
        wait_for_role(daemon, "fuse", 2)
        uncached = with_cache(image_config(IMAGE.blobs, folder / "none") | {"id": "/more"}, type="")
        more = daemon.mount("/more", IMAGE.bootstrap, IMAGE.blobs, config=json.dumps(uncached))
        assert more == (204, "")
        places = ((daemon.mountpoint / "files", tree), (daemon.mountpoint / "more" / "sizes", sizes))
        files = []
        readers = []
        for number, (place, truth) in enumerate(places):
            beside = folder / f"readers{number}"
            beside.mkdir()
            readers.append(stack.enter_context(Verifying(place, truth, beside, 2)))
            name = max(truth.iterdir(), key=lambda path: path.stat().st_size).name
            fd = os.open(place / name, os.O_RDONLY | os.O_DIRECT)
            stack.callback(os.close, fd)
            files.append((fd, (truth / name).read_bytes()))
        yield Served(daemon, readers, files)


def test_it_takes_over_from_an_older_release_that_was_killed_and_that_from_it(older: Path, tmp_path: Path) -> None:
    """Both say that they are the same build: the front ends of the first serve all the time."""
    says(older, "GIT_COMMIT", GIT_COMMIT)
    with served(tmp_path, older) as it:
        it.check(older)
        front_ends = it.daemon.pids("fuse")
        for release in (ROOT, older):
            it.next_is_of(release)
            it.daemon.kill_supervisor()
            it.daemon.start()
            it.check(release)
            assert sorted(it.daemon.pids("fuse")) == sorted(front_ends)


def test_an_older_release_hands_over_to_it_and_it_to_that(older: Path, tmp_path: Path) -> None:
    """As nydus-snapshotter has it: they are other builds, and each replaces the front ends of the other."""
    says(older, "GIT_COMMIT", "an-older-one")
    with closing(Keeper(tmp_path)) as keeper, served(tmp_path, older, keeper.args) as it:
        keeper.save(it.daemon)
        for release in (ROOT, older):
            front_ends = set(it.daemon.pids("fuse"))
            it.next_is_of(release)
            upgrade(it.daemon, keeper)
            wait_until(
                lambda before=front_ends: not before & set(it.daemon.pids("fuse")),  # type: ignore[misc]
                "front ends of the next release",
                60,
            )
            wait_for_role(it.daemon, "fuse", 2)
            it.check(release)
