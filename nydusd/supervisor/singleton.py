"""`nydusd singleton`: one daemon for many images, without a FUSE mount. It keeps the table of images that the API fills.

Runs in the supervisor. With `--fscache` it is `supervisor/fscache.py`.
What holds after SIGKILL: nothing of the table; clients tell the next daemon again.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from nydusd.storage.api.image import inspect
from nydusd.supervisor.blobs import BlobTable, check_folder
from nydusd.supervisor.children import Child
from nydusd.supervisor.daemon import Supervisor

if TYPE_CHECKING:
    from nydusd.cli.options import SingletonOptions
    from nydusd.config.blob_entry import BlobEntry
    from nydusd.forkserver.client import ForkServer

log = logging.getLogger(__name__)


class Singleton(Supervisor):
    """A daemon with an API, a table of images and a worker that looks at them."""

    def __init__(self, options: SingletonOptions, entries: list[BlobEntry], fork_server: ForkServer) -> None:
        from nydusd.config import bare_config

        super().__init__(options, bare_config(), fork_server)
        self._entries = entries
        self.blobs = self._table = BlobTable()

    def start(self) -> None:
        """Everything up to RUNNING. Raises NydusError."""
        self._begin(rows=1)
        for entry in self._entries:
            check_folder(entry)
            self._table.bind(entry, inspect(entry.metadata, [self.run_dir]))
        self._bind()
        self._family.add(Child("fetch", 0, "workers"))
        self.open_api()
        self._ready(f"{len(self._entries)} images, no mount")
