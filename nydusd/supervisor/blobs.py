"""The images that a singleton daemon was told of (`PUT /api/v2/blobs`), each with the blobs it needs. Kept in memory by the
supervisor; without fscache lost with it, as clients expect: they tell a new daemon again.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from nydusd.config.blob_entry import BlobEntry, parse_blob_entry
from nydusd.errors import ConfigError, NydusError
from nydusd.ipc.messages import Json
from nydusd.storage.api.image import ImageFacts
from nydusd.storage.cache.requests import Answer, Job, Priority
from nydusd.supervisor import control_ops
from nydusd.supervisor.control_ops import NotHereError

if TYPE_CHECKING:
    from nydusd.supervisor.daemon import Supervisor

log = logging.getLogger(__name__)

EXISTS = "blob_cache: bootstrap blob already exists"
NOT_FOUND = "blob_cache: cache entry not found"
"""A text that clients look for."""


class BlobError(NydusError):
    """A blob cannot be bound, or is not bound."""


class BlobTable:
    """Images by domain and id; a domain's data blobs are counted by the images that need them.

    `bound` is told of an image before it is added, and of which blobs it lists more chunks than those that it shares them with;
    it may raise NydusError; `dropped` after it was removed. `repeated` says
    whether an image that is there may be told of once more.
    """

    def __init__(self) -> None:
        self.bound: Callable[[BlobEntry, ImageFacts, Collection[str]], None] = lambda entry, facts, adds: None
        self.sharing: Callable[[BlobEntry, ImageFacts], list[tuple[str, ImageFacts]]] = lambda entry, facts: []
        """Images, by place, with which this one must agree over blobs."""
        self.dropped: Callable[[BlobEntry], None] = lambda entry: None
        self.repeated: Callable[[BlobEntry], bool] = lambda entry: False
        self.cull: Callable[[str, Callable[[NydusError | None], None]], None] = lambda name, done: done(None)
        """Removes what the kernel's cache has of this name, and tells how that ended."""
        self._images: dict[tuple[str, str], tuple[BlobEntry, ImageFacts]] = {}
        self._blobs: Counter[tuple[str, str]] = Counter()

    def check_new(self, entry: BlobEntry) -> None:
        """Raises BlobError when an image of this name is there."""
        if (entry.domain_id, entry.id) in self._images:
            raise BlobError(EXISTS)

    def bind(self, entry: BlobEntry, facts: ImageFacts, adds: Collection[str] = ()) -> None:
        """Add an image. Raises BlobError when there is one of this name, or it is not a v6 image."""
        self.check_new(entry)
        if facts.version != 6:
            raise BlobError(
                f"{entry.metadata}: only images of RAFS v6 can be served to the kernel, this is v{facts.version}"
            )
        self.bound(entry, facts, adds)
        self._images[entry.domain_id, entry.id] = (entry, facts)
        for blob in facts.blobs:
            self._blobs[entry.domain_id, blob.blob_id] += 1

    def drop(self, domain: str, name: str) -> None:
        """Remove an image, and one use of each of its blobs. Raises BlobError when there is none."""
        if (domain, name) not in self._images:
            raise BlobError(NOT_FOUND)
        entry, facts = self._images.pop((domain, name))
        for blob in facts.blobs:
            self._blobs[domain, blob.blob_id] -= 1
        self._blobs = +self._blobs
        self.dropped(entry)

    def drop_domain(self, domain: str) -> None:
        """Remove all images of a domain."""
        for of, name in list(self._images):
            if of == domain:
                self.drop(of, name)

    def rows(self, domain: str, name: str | None) -> Iterator[Json]:
        """What is bound in a domain, or one of it."""
        for (of, image), (entry, facts) in self._images.items():
            if of == domain and name in (None, "", image):
                blobs = [blob.blob_id for blob in facts.blobs]
                yield {
                    "type": "bootstrap",
                    "id": image,
                    "domain_id": of,
                    "metadata_path": entry.metadata,
                    "blobs": blobs,
                }
        for (of, blob_id), uses in self._blobs.items():
            if of == domain and name in (None, "", blob_id):
                yield {"type": "datablob", "id": blob_id, "domain_id": of, "references": uses}


def _table(daemon: Supervisor) -> BlobTable:
    if daemon.blobs is None:
        raise NotHereError
    return daemon.blobs


def _list(daemon: Supervisor, request: Json) -> Json:
    name = request.get("blob_id")
    rows = list(_table(daemon).rows(str(request["domain_id"]), None if name is None else str(name)))
    if name and not rows:
        raise BlobError(NOT_FOUND)
    return {"blobs": rows}


def _delete(daemon: Supervisor, request: Json, reply: Callable[[Json], object]) -> None:
    domain, name = request.get("domain_id"), request.get("blob_id")

    def culled(error: NydusError | None) -> None:
        if error is None:
            reply({"ok": None})
        else:
            reply({"error": {"status": error.rest_status, "message": f"Other({json.dumps(str(error))})"}})

    if domain is None:
        if daemon.blobs is None:
            reply({"ok": None})  # there is no such cache
        else:
            daemon.blobs.cull(str(name), culled)
        return
    table = _table(daemon)
    if name:
        table.drop(str(domain), str(name))
    else:
        table.drop_domain(str(domain))
    reply({"ok": None})


def _bind(daemon: Supervisor, request: Json, reply: Callable[[Json], object]) -> None:
    """Have a worker look at the image, then add it."""
    from nydusd.config import secret_values
    from nydusd.logs import register_secret
    from nydusd.supervisor.fscache_images import place_of

    table = _table(daemon)
    try:
        entry = parse_blob_entry(request["entry"], "blob entry")
    except ConfigError as e:
        raise BlobError(str(e)) from e
    for secret in secret_values(entry.config):
        register_secret(secret)
    check_folder(entry)
    if table.repeated(entry):
        reply({"ok": None})
        return
    table.check_new(entry)
    entry = replace(entry, config=control_ops.as_set(daemon, place_of(entry), entry.config, counts=True))

    def ask(kind: str, payload: Json, then: Callable[[Answer], None]) -> None:
        def done(_job: Job, answer: Answer) -> None:
            try:
                if "error" in answer:
                    raise BlobError(answer["error"])
                then(answer)
            except NydusError as e:
                text = json.dumps(str(e), ensure_ascii=False)
                reply({"error": {"status": e.rest_status, "message": f"Other({text})"}})

        daemon.engine.fetch.submit(Job(kind, None, Priority.USER, payload, done))

    def settle(facts: ImageFacts, compared: list[tuple[str, ImageFacts]], adds: Collection[str]) -> None:
        """Bind it, once it was compared with all that are there: others may have been bound meanwhile."""
        sharing = table.sharing(entry, facts)
        if sharing == compared:
            table.bind(entry, facts, adds)
            reply({"ok": None})
            return
        others = [[place, other.to_json()] for place, other in sharing]
        payload = {"image": facts.to_json(), "others": others, "domain": entry.domain_id or entry.id}
        ask("compare_tables", payload, lambda answer: settle(facts, sharing, answer["adds"]))

    ask(
        "inspect",
        {"source": os.path.abspath(entry.metadata), "folders": [daemon.run_dir]},
        lambda answer: settle(ImageFacts.from_json(answer["image"]), [], ()),
    )


def check_folder(entry: BlobEntry) -> None:
    """Raises BlobError when the cache folder of an entry is not there."""
    folder = entry.config.cache.work_dir if entry.config.cache is not None else None
    if folder is None or not os.path.isdir(folder):
        raise BlobError(f"the work_dir of its cache must be a folder, but is {folder!r}")


OPS: dict[str, Callable[[Supervisor, Json], object]] = {"list_blobs": _list}
LATER: dict[str, Callable[[Supervisor, Json, Callable[[Json], object]], None]] = {
    "bind_blob": _bind,
    "delete_blob": _delete,
}
"""Those that wait for a worker."""
