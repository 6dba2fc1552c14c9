"""What a supervisor writes down of each mounted image, so that its successor knows it again under the same names.

The record of the image of the command line holds no configuration: the same command line gives it again, and perhaps newer
credentials. That of an image that came by the API holds the text that the client gave, credentials included: so it is
readable for the daemon's user only, as the client's own file is (`checked.py`).
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING

from nydusd.errors import CacheError, ConfigError, NydusError, ScarceError
from nydusd.ipc.file_counters import make_tables
from nydusd.ipc.messages import Json
from nydusd.ipc.mount_counters import make_counters
from nydusd.ipc.shared_block import map_block
from nydusd.storage.api.factory import BlobFactory
from nydusd.storage.api.image import ImageFacts
from nydusd.storage.cache.manager import Former
from nydusd.supervisor.image_memory import make_trace
from nydusd.supervisor.images import Image
from nydusd.supervisor.mount_table import MountTable, parse_place

if TYPE_CHECKING:
    from nydusd.config import Config
    from nydusd.supervisor.mount_request import Request

log = logging.getLogger(__name__)


def record_of(image: Image, request: Request) -> Json:
    """All that is to be known of a mounted image beside its place and index."""
    return {
        "source": image.source,
        "config": request.text,
        "prefetch": None if request.files is None else [path.hex() for path in request.files],
        "mounted_at": image.mounted_at.timestamp(),
        "facts": image.metadata.to_json(),
        "caches": [[cache.handle, cache.spec.segment] for cache in image.caches],
        "counters": image.counters,
        "files": image.files,
        "trace": image.trace,
    }


class Recorded:
    """A record that was read again. Raises CacheError when it is none."""

    def __init__(self, index: int, place: str, raw: Json, given: Config) -> None:
        """`given`: the configuration of the command line."""
        self.index = index
        self.place = place
        try:
            self.source = str(raw["source"])
            self.given = raw["config"] is None
            self._config = given if self.given else str(raw["config"])
            self.files = None if raw["prefetch"] is None else [bytes.fromhex(path) for path in raw["prefetch"]]
            self.facts = ImageFacts.from_json(raw["facts"])
            self.mounted_at = datetime.fromtimestamp(raw["mounted_at"], UTC)
            self._caches = [Former(int(handle), str(segment)) for handle, segment in raw["caches"]]
            self._counters, self._files, self._trace = (raw[name] for name in ("counters", "files", "trace"))
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise CacheError(f"the record of the image at {place} cannot be used: {e!r}") from e
        if len(self._caches) != len(self.facts.blobs):
            raise CacheError(f"the record of the image at {place} names {len(self._caches)} caches")

    @cached_property
    def config(self) -> Config:
        """Read when it is needed: hundreds take a while. Raises ConfigError for one that is none now."""
        from nydusd.config import load_config, secret_values
        from nydusd.logs import register_secret

        given = self._config
        config = load_config(given, f"configuration of {self.place}") if isinstance(given, str) else given
        for secret in secret_values(config):
            register_secret(secret)
        return config

    @property
    def handles(self) -> list[int]:
        """How front ends call its blobs."""
        return [former.handle for former in self._caches]

    def image(self, factory: BlobFactory, rows: int) -> Image:
        """The image, mounted: with its counters for so many front ends, its blobs open. Raises NydusError.

        Counters that are gone, with what they had counted, are made anew.
        """
        image = Image(self.place, self.source, self.config, self.facts, factory, self._caches)
        image.index, image.given = self.index, self.given
        image.mounted_at = self.mounted_at
        image.counters, image.files, image.trace = self._counters, self._files, self._trace
        if image.trace is not None:
            make_trace(image.trace)  # a release of before 2026-11-27 left that to front ends
        try:
            self._have_counters(image, rows)
        except NydusError:
            image.release()
            raise
        for cache in image.caches:
            if cache.state == "new" and not cache.lost:  # an image that is known already may share it
                cache.take_over()
        return image

    def _have_counters(self, image: Image, rows: int) -> None:
        if image.counters is None:
            return
        try:
            image.block = map_block(image.counters)
        except ScarceError:
            raise  # they are there
        except CacheError as e:
            log.error("the image at %s is counted from 0 again: %s", self.place, e)
            image.block = make_counters(image.counters, rows)
        if image.files is None or not image.counts_files:
            return
        try:
            make_tables(image.files, rows)  # a release of before 2026-11-27 left that to front ends
        except ScarceError:
            raise
        except CacheError as e:
            log.error("the image at %s: %s; accesses to its files are not counted", self.place, e)


def readable(table: MountTable, given: Config, needed: str | None) -> list[Recorded]:
    """The records of a table that can be used. An image whose record cannot be is taken out of the table, and the others stay.

    Raises CacheError or ConfigError when it is the image at `needed`, that of the command line.
    """
    found = []
    at = None if needed is None else parse_place(needed)[0]
    for index, place in table.mounted():
        _, names = parse_place(place)
        try:
            recorded = Recorded(index, place, table.record(names), given)
            if place == at:
                _ = recorded.config  # that one must be one
            found.append(recorded)
        except (CacheError, ConfigError) as e:
            if place == at:
                raise
            log.error("the image at %s cannot be taken over: %s; it is unmounted", place, e)
            table.forget(names)
    return found
