"""Two images of one domain that share a blob: one table of chunks serves both, and who contradicts it is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nydusd.cli.options import SingletonOptions
from nydusd.errors import FormatError
from nydusd.formats import open_bootstrap
from nydusd.ipc.messages import Json
from nydusd.storage.api.domain import additions
from nydusd.storage.api.image import ImageFacts, inspect
from nydusd.storage.cache.requests import Job
from nydusd.supervisor import blobs
from nydusd.supervisor.fscache import FscacheDaemon
from tests.image.build import image
from tests.support.fork_server import fork_server
from workers.blobs import OpenBlobs
from workers.inspect import compare_tables, inspect_image
from workers.prepare import _raw_chunks

NAMES = ("gone", "keep", "last")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`lower.boot` is an image, `merged.boot` the same with another layer, which replaces one of its files."""
    folder = tmp_path_factory.mktemp("domain")
    source = random.Random(7)
    trees = {
        "lower": {name: source.randbytes(60_000) for name in NAMES},
        "upper": {"gone": source.randbytes(7_000)},
    }
    (folder / "blobs").mkdir()
    for layer, files in trees.items():
        (folder / layer).mkdir()
        for name, content in files.items():
            (folder / layer / name).write_bytes(content)
        image("create", "--fs-version", "6", "-B", folder / f"{layer}.boot", "-D", folder / "blobs", folder / layer)
    image("merge", "-B", folder / "merged.boot", folder / "lower.boot", folder / "upper.boot")
    return folder


def facts_of(path: Path) -> ImageFacts:
    return inspect(str(path), [])


def blob_of(folder: Path) -> str:
    """The blob that both images have."""
    (info,) = facts_of(folder / "lower.boot").blobs
    return info.blob_id


@pytest.fixture(scope="module")
def liar(folder: Path) -> Path:
    """The lower image with another digest for the chunk that the other one does not list."""
    raw = bytearray((folder / "lower.boot").read_bytes())
    kept = {c.digest for c in open_bootstrap(memoryview((folder / "merged.boot").read_bytes()), "m", None).raw_chunks()}
    listed = [c.digest for c in open_bootstrap(memoryview(bytes(raw)), "l", None).raw_chunks() if c.digest not in kept]
    assert len(listed) == 1
    at = raw.find(listed[0])
    raw[at] ^= 1
    path = folder / "liar.boot"
    path.write_bytes(raw)
    return path


def test_it_is_known_who_lists_more_of_a_shared_blob(folder: Path) -> None:
    lower, merged = facts_of(folder / "lower.boot"), facts_of(folder / "merged.boot")
    assert additions(merged, [("/lower", lower)], "d") == set(), "what only it has is nobody else's business"
    assert additions(lower, [("/merged", merged)], "d") == {blob_of(folder)}
    assert additions(lower, [("/merged", merged), ("/lower", lower)], "d") == set()


def test_who_says_something_else_of_a_shared_blob_is_told_of_which_and_what_to_do(folder: Path, liar: Path) -> None:
    lower = facts_of(folder / "lower.boot")
    with pytest.raises(FormatError) as told:
        additions(facts_of(liar), [("/d/lower", lower)], "d")
    for part in (str(liar), blob_of(folder), "another digest than in the image /d/lower", "domain d", "domain_id"):
        assert part in str(told.value)
    (info,) = lower.blobs
    for wrong in (
        {"chunk_count": info.chunk_count + 1},
        {"uncompressed_size": info.uncompressed_size + 4096},
        {"ci_offset": info.ci_offset + 8},
        {"features": info.features ^ 1},
    ):
        with pytest.raises(FormatError, match="has another"):
            additions(replace(lower, blobs=[replace(info, **cast(Any, wrong))]), [("/d/lower", lower)], "d")


# --- the daemon -----------------------------------------------------------------------------------------------------


class World:
    """A daemon that was told of no image yet, its mounts and workers played by the test. `renewed`: blobs, in order."""

    def __init__(self, daemon: FscacheDaemon, folder: Path) -> None:
        self.daemon = daemon
        self.folder = folder
        self.renewed: list[str] = []
        self.jobs: list[Job] = []
        mounts = SimpleNamespace(bind=lambda image: None, unbind=lambda place: None)
        kernel = SimpleNamespace(renew=lambda cache: self.renewed.append(cache.spec.info.blob_id))
        daemon.mounts = cast(Any, mounts)
        daemon._kernel = cast(Any, kernel)
        daemon._engine = cast(Any, SimpleNamespace(fetch=SimpleNamespace(submit=self.jobs.append)))
        table = daemon._table
        table.bound, table.dropped, table.sharing = daemon._add, daemon._drop, daemon._sharing

    def ask(self, name: str, path: Path, domain: str = "d") -> list[Json]:
        """Have an image bound, as the API does; gives where the answer will be."""
        config = {
            "id": name,
            "backend_type": "localfs",
            "backend_config": {"dir": str(self.folder / "blobs")},
            "cache_type": "fscache",
            "cache_config": {"work_dir": str(self.folder)},
            "metadata_path": str(path),
        }
        entry = {"type": "bootstrap", "id": name, "domain_id": domain, "config": config}
        answers: list[Json] = []
        blobs.LATER["bind_blob"](self.daemon, {"entry": entry}, answers.append)
        return answers

    def work(self) -> list[str]:
        """Do the jobs that there are; gives their kinds."""
        jobs, self.jobs[:] = list(self.jobs), []
        for job in jobs:
            run: Callable[[OpenBlobs, Json], Json] = {"inspect": inspect_image, "compare_tables": compare_tables}[
                job.kind
            ]
            try:
                answer = run(cast(Any, None), json.loads(json.dumps(job.payload)))
            except FormatError as e:
                answer = {"error": str(e)}
            job.done(job, answer)
        return [job.kind for job in jobs]

    def bind(self, name: str, path: Path, domain: str = "d") -> Json:
        answers = self.ask(name, path, domain)
        while self.jobs:
            self.work()
        (answer,) = answers
        return answer

    def chunks(self) -> list[int]:
        """Which chunks of the shared blob would be known to who prepares it."""
        (found,) = [c for c in self.daemon.factory.blobs() if c.spec.info.blob_id == blob_of(self.folder)]
        info = found.spec.info
        chunks: Sequence[int] = [c.index for c in _raw_chunks(found.spec) if c.blob_index == info.index]
        return sorted(set(chunks))


@pytest.fixture
def world(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("NYDUSD_RUNTIME_DIR", str(tmp_path))
    with fork_server() as server:
        daemon = FscacheDaemon(SingletonOptions(fscache=str(tmp_path)), [], cast(Any, server))
        yield World(daemon, folder)
        daemon._kernel = daemon._engine = None
        daemon.stop()


def test_the_chunks_of_all_images_of_a_domain_are_known_whichever_was_first(world: World) -> None:
    folder = world.folder
    assert world.bind("merged", folder / "merged.boot") == {"ok": None}
    before = world.chunks()
    assert world.bind("lower", folder / "lower.boot") == {"ok": None}
    assert world.renewed == [blob_of(folder)], "a file that the kernel has open is looked at anew"
    known = world.chunks()
    assert len(known) == len(before) + 1
    world.daemon._table.drop("d", "merged")
    assert world.chunks() == known
    (found,) = [c for c in world.daemon.factory.blobs() if c.spec.info.blob_id == blob_of(folder)]
    assert (found.spec.bootstrap, found.spec.more) == (str(folder / "lower.boot"), ()), "the other may be deleted now"


def test_an_image_that_adds_nothing_changes_nothing(world: World) -> None:
    folder = world.folder
    world.bind("lower", folder / "lower.boot")
    assert world.bind("merged", folder / "merged.boot") == {"ok": None}
    assert world.renewed == []
    (found,) = [c for c in world.daemon.factory.blobs() if c.spec.info.blob_id == blob_of(folder)]
    assert (found.spec.bootstrap, found.spec.more) == (str(folder / "lower.boot"), ())


def test_an_image_that_contradicts_another_of_its_domain_is_refused_and_bound_in_another(
    world: World, liar: Path
) -> None:
    assert world.bind("lower", world.folder / "lower.boot") == {"ok": None}
    refused = world.bind("liar", liar)["error"]["message"]
    for part in (blob_of(world.folder), "another digest than in the image /d/lower", "domain d", "another domain_id"):
        assert part in refused
    assert list(world.daemon._bound) == ["/d/lower"]
    assert world.bind("liar", liar, domain="e") == {"ok": None}


def test_of_two_that_are_bound_at_once_the_second_is_compared_with_the_first(world: World, liar: Path) -> None:
    first, second = world.ask("lower", world.folder / "lower.boot"), world.ask("liar", liar)
    assert world.work() == ["inspect", "inspect"]
    assert (first, second) == ([{"ok": None}], [])
    assert world.work() == ["compare_tables"]
    assert "another digest" in second[0]["error"]["message"]
