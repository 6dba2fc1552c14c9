"""Scenes of images that the kernel's EROFS reads by itself, over the cache files."""

from __future__ import annotations

import os

from tests.killing.scene import FILES, SECONDS, Config, read
from tests.killing.scenes import Life, Shared
from tests.support.daemon import Daemon
from tests.support.discipline import wait_until

ALONE = b"the kernel reads it by itself"
"""What a front end logs when nothing of a blob is missing, and all of it is on the disk."""


class Bare(Daemon):
    """`nydusd erofs` without an image: nothing is mounted at its mount point."""

    def serves(self) -> bool:
        return self.says_running()


class KernelShared(Shared):
    """An image is mounted by the API and the kernel, read, unmounted."""

    def make(self) -> Daemon:
        return Bare(
            None,
            self.folder,
            cache=self.cache,
            config=self.config(),
            environment=self.plan.environment,
            verb="erofs",
            args=("--driver", "fanotify"),
        )

    def read_all(self, place: str = "") -> None:
        for name in FILES:
            found = read(self.daemon.mountpoint / place / name, direct=False)
            assert found == self.tree.contents[name], f"{name}: wrong bytes"

    def after(self) -> None:
        super().after()
        assert os.listdir(self.daemon.mountpoint) == [], "a folder was left"


class Kernel(Life):
    """The same with the kernel's EROFS over the cache files, and fanotify; until the kernel asks nobody any more."""

    verb = "erofs"

    def config(self) -> Config:
        return super().config() | {"nydusd": self.tuning | {"checkpoint_interval": 0.2}}

    def serve(self) -> None:
        before = self.daemon.log.stat().st_size
        super().serve()

        def is_alone() -> bool:
            self.read_all()  # what was doubted, since a worker was killed that had synced it, is looked at when it is read
            return ALONE in self.daemon.log.read_bytes()[before:]

        wait_until(is_alone, "the kernel to read by itself", SECONDS)

    def read_all(self, place: str = "") -> None:
        for name in FILES:
            assert read(self.daemon.mountpoint / name, direct=False) == self.tree.contents[name], f"{name}: wrong bytes"


class KernelSuccessors(Kernel):
    """The same, and its front end is killed while reads wait in it."""

    def serve(self) -> None:
        wait_until(self.daemon.serves, "the daemon to serve", SECONDS)
        self.read_while_front_ends_are_killed("erofs")
