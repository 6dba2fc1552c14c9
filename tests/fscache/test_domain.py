"""Two images of one domain that share a blob: one table of chunks serves both, and who contradicts it is refused."""

from __future__ import annotations

import json
import os
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nydusd.cli.options import SingletonOptions
from nydusd.config import settings_of
from nydusd.errors import FormatError, ScarceError
from nydusd.formats import open_bootstrap
from nydusd.formats.model import RawChunk
from nydusd.ipc.messages import Json
from nydusd.storage.api.domain import Tables, _chunks_of, additions
from nydusd.storage.api.image import ImageFacts, inspect
from nydusd.storage.cache.prefetch import PrefetchWorker
from nydusd.storage.cache.requests import Job
from nydusd.supervisor import blobs, control_ops
from nydusd.supervisor.fscache import FscacheDaemon
from nydusd.supervisor.fscache_images import read_noted
from tests.image.build import image
from tests.support.blob_entry import blob_entry
from tests.support.fork_server import fork_server
from tests.support.scarce import no_fd_left
from workers.blobs import OpenBlobs
from workers.inspect import compare_tables, inspect_image
from workers.prepare import _raw_chunks, prepare

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


class Made:
    """Images of one domain whose tables are made up: `choose` says which chunks of which blobs, and who contradicts others.

    `reads` counts how often the table of each was read. The bootstrap of some was removed.
    """

    def __init__(self, like: ImageFacts, choose: random.Random, count: int, folder: Path) -> None:
        self.tables: dict[str, list[RawChunk]] = {}
        self.reads: Counter[str] = Counter()
        self.images: list[tuple[str, ImageFacts]] = []
        folder.mkdir()
        for number in range(count):
            path = folder / str(number)
            if choose.random() < 0.9:
                path.touch()
            names = choose.sample("abcde", choose.randrange(1, 4))
            self.tables[str(path)] = [
                chunk(blob, index, at, wrong=choose.random() < 0.01)
                for blob, name in enumerate(names)
                for at, index in enumerate(choose.sample(range(20), choose.randrange(1, 20)))
            ]
            infos = [replace(like.blobs[0], index=index, blob_id=name) for index, name in enumerate(names)]
            self.images.append((f"/{number}", replace(like, bootstrap=str(path), blobs=infos)))

    def read(self, facts: ImageFacts) -> list[RawChunk]:
        self.reads[facts.bootstrap] += 1
        return self.tables[facts.bootstrap]

    def listed(self, facts: ImageFacts, blob_id: str) -> dict[int, RawChunk]:
        indexes = [info.index for info in facts.blobs if info.blob_id == blob_id]
        return {chunk.index: chunk for chunk in self.tables[facts.bootstrap] if chunk.blob_index in indexes}

    def expected(self, new: ImageFacts, others: Sequence[tuple[str, ImageFacts]]) -> set[str] | str:
        """By definition: what it adds, or the place of the image that it contradicts."""
        found = set()
        for info in new.blobs:
            sharing = [each for each in others if info.blob_id in [there.blob_id for there in each[1].blobs]]
            known: dict[int, tuple[RawChunk, str]] = {}
            for place, other in sharing:
                if os.path.exists(other.bootstrap):
                    for index, there in self.listed(other, info.blob_id).items():
                        known.setdefault(index, (there, place))
            for index, one in self.listed(new, info.blob_id).items() if sharing else ():
                if index not in known:
                    found.add(info.blob_id)
                elif known[index][0].digest != one.digest:
                    return f"than in the image {known[index][1]},"
        return found


def chunk(blob: int, index: int, place: int, *, wrong: bool) -> RawChunk:
    digest = bytes([1 + index, wrong]) * 16
    return RawChunk(digest, blob, 1, 100 + index, 4096, 100 * index, 4096 * index, 7 * place, index, 9)


def test_many_images_bound_one_after_the_other_are_told_what_pairs_of_them_say(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = added = 0
    for seed in range(40):
        made = Made(facts_of(folder / "lower.boot"), random.Random(seed), 12, tmp_path / str(seed))
        monkeypatch.setattr("nydusd.storage.api.domain._chunks_of", made.read)
        told = Tables("d", "abcde")
        bound: list[tuple[str, ImageFacts]] = []
        for place, facts in made.images:
            expected = made.expected(facts, bound)
            if not os.path.exists(facts.bootstrap):  # since it was bound
                told.know(place, facts)
                bound.append((place, facts))
            elif isinstance(expected, str):
                refused += 1
                with pytest.raises(FormatError, match=expected):
                    told.additions(facts)
                with pytest.raises(FormatError, match=expected):
                    additions(facts, bound, "d")
            else:
                assert told.additions(facts) == additions(facts, bound, "d") == expected, (seed, place)
                added += bool(expected)
                told.know(place, facts)
                bound.append((place, facts))
    assert refused > 20
    assert added > 100


@pytest.mark.parametrize("count", [5, 50])
def test_each_table_is_read_once_and_of_those_whose_additions_are_known_none(
    count: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(facts_of(folder / "lower.boot"), random.Random(1), count, tmp_path / "made")
    for path in made.tables:
        Path(path).touch()
        made.tables[path] = [chunk(blob, index, 0, wrong=False) for blob in range(3) for index in range(9)]
    monkeypatch.setattr("nydusd.storage.api.domain._chunks_of", made.read)
    told = Tables("d", "abcde")
    for place, facts in made.images:
        told.know(place, facts)
    assert made.reads.total() == 0
    told = Tables("d", "abcde")
    for place, facts in made.images:
        told.additions(facts)
        told.know(place, facts)
    assert set(made.reads.values()) == {1}
    assert made.reads.total() == count


# --- the daemon -----------------------------------------------------------------------------------------------------


class World:
    """A daemon that was told of no image yet, its mounts and workers played by the test. `renewed`: blobs, in order."""

    def __init__(self, daemon: FscacheDaemon, folder: Path) -> None:
        self.daemon = daemon
        self.folder = folder
        self.renewed: list[str] = []
        self.jobs: list[Job] = []
        self.successors: list[World] = []
        mounts = SimpleNamespace(bind=lambda image: None, unbind=lambda place: None)
        kernel = SimpleNamespace(renew=lambda cache: self.renewed.append(cache.spec.info.blob_id))
        daemon.mounts = cast(Any, mounts)
        daemon._kernel = cast(Any, kernel)
        daemon._engine = cast(Any, SimpleNamespace(fetch=SimpleNamespace(submit=self.jobs.append)))
        table = daemon._table
        table.bound, table.dropped, table.sharing = daemon._add, daemon._drop, daemon._bound.sharing

    def ask(self, name: str, path: Path, domain: str = "d", backend: Json | None = None) -> list[Json]:
        """Have an image bound, as the API does; gives where the answer will be."""
        entry = blob_entry(name, path, self.folder / "blobs", self.folder, domain, "fscache")
        entry["config"] |= backend or {}  # type: ignore[operator]
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

    def bind(self, name: str, path: Path, domain: str = "d", backend: Json | None = None) -> Json:
        answers = self.ask(name, path, domain, backend)
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
        made = World(daemon, folder)
        yield made
        for each in (made, *made.successors):
            each.daemon._kernel = each.daemon._engine = None
            each.daemon.stop()


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


def test_what_no_image_of_the_domain_lists_is_never_fetched_ahead_and_is_when_one_does(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be stored unchecked, and believed when an image is bound that has a digest for it."""
    monkeypatch.setattr(os, "getppid", os.getpid)  # of the worker that we are
    world.bind("merged", world.folder / "merged.boot")
    (cache,) = [c for c in world.daemon.factory.blobs() if c.spec.info.blob_id == blob_of(world.folder)]
    file = os.open(tmp_path / "cookie", os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, -(-cache.spec.info.uncompressed_size // 4096) * 4096)
    cache.give((os.getpid(), file))

    def fetched_ahead() -> list[int]:
        workers, job = OpenBlobs(), {"handle": cache.handle, "spec": cache.spec.to_json()}
        workers.learn(job)
        prepare(workers, job)
        workers.close()
        cache.opened()
        ahead = PrefetchWorker()
        ahead.want(cache, 0, -1)
        (_, found) = ahead.take(0.0) or (cache, [])
        return list(found)

    few = fetched_ahead()
    assert few == world.chunks()
    world.bind("lower", world.folder / "lower.boot")
    assert fetched_ahead() == world.chunks() == list(range(cache.meta.count))
    assert len(few) == cache.meta.count - 1
    os.close(file)


def successor(world: World, images: Sequence[Json], monkeypatch: pytest.MonkeyPatch) -> tuple[World, list[str]]:
    """Another daemon that was told the same by what is noted, and whose tables it has read for that."""
    read: list[str] = []

    def noting(facts: ImageFacts) -> Iterator[RawChunk]:
        read.append(Path(facts.bootstrap).name)
        return _chunks_of(facts)

    monkeypatch.setattr("nydusd.storage.api.domain._chunks_of", noting)
    made = World(
        FscacheDaemon(cast(SingletonOptions, world.daemon.options), [], world.daemon.fork_server), world.folder
    )
    world.successors.append(made)
    made.daemon._recall(json.loads(json.dumps(images)))
    return made, read


def adds_of(world: World) -> dict[str, set[str]]:
    return {place: bound.adds for place, bound in world.daemon._bound.items()}


def test_a_successor_knows_what_each_image_adds_and_compares_only_what_is_not_as_it_was_noted(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = world.folder
    for name in ("merged", "lower"):
        (tmp_path / f"{name}.boot").write_bytes((folder / f"{name}.boot").read_bytes())
        world.bind(name, tmp_path / f"{name}.boot")
    world.bind("other", folder / "upper.boot", domain="e")
    expected = adds_of(world)
    assert expected == {"/d/merged": set(), "/d/lower": {blob_of(folder)}, "/e/other": set()}
    images = world.daemon.session_state()["images"]
    same, read = successor(world, images, monkeypatch)
    assert (adds_of(same), read, same.chunks()) == (expected, [], world.chunks())
    former = [{key: raw[key] for key in ("entry", "dropped")} for raw in images]
    same, read = successor(world, former, monkeypatch)
    assert (adds_of(same), sorted(read)) == (expected, ["lower.boot", "merged.boot"])
    os.utime(tmp_path / "lower.boot")
    same, read = successor(world, images, monkeypatch)
    assert (adds_of(same), sorted(read)) == (expected, ["lower.boot", "merged.boot"])
    (tmp_path / "merged.boot").unlink()
    assert "is lost" not in caplog.text
    same, read = successor(world, images, monkeypatch)
    assert f"an image of the daemon before is lost: {tmp_path}/merged.boot" in caplog.text
    assert adds_of(same) == {"/d/lower": set(), "/e/other": set()}, "what another has listed must not be missing"
    assert read == []


def test_an_image_for_which_no_file_descriptor_is_left_at_a_takeover_is_waited_for_and_never_lost(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("merged", "lower"):
        world.bind(name, world.folder / f"{name}.boot")
    images = world.daemon.session_state()["images"]
    expected = adds_of(world)
    with ExitStack() as lacking:
        lacking.enter_context(no_fd_left(os.getpid()))
        monkeypatch.setattr("nydusd.supervisor.fscache_images.time.sleep", lambda _seconds: lacking.close())
        told = read_noted(images, str(world.folder))
    assert [image.entry.id for image in told] == ["merged", "lower"]
    same, read = successor(world, images, monkeypatch)
    assert (adds_of(same), read) == (expected, [])
    monkeypatch.setattr("nydusd.supervisor.fscache_images._PATIENCE", 0.0)
    monkeypatch.setattr("nydusd.supervisor.fscache_images.time.sleep", lambda _seconds: None)
    with no_fd_left(os.getpid()), pytest.raises(ScarceError, match="Too many open files"):
        read_noted(images, str(world.folder))
    assert "is lost" not in caplog.text


def test_an_image_that_cannot_be_bound_for_want_of_a_file_descriptor_is_not_lost_either(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world.bind("merged", world.folder / "merged.boot")
    told = read_noted(world.daemon.session_state()["images"], str(world.folder))
    same, _ = successor(world, [], monkeypatch)

    def lacks(_image: object) -> None:
        raise ScarceError("shared memory: Too many open files")

    monkeypatch.setattr("nydusd.supervisor.fscache_images._PATIENCE", 0.0)
    monkeypatch.setattr(same.daemon.mounts, "bind", lacks)
    with pytest.raises(ScarceError):
        same.daemon._bind_told(told)
    monkeypatch.setattr(same.daemon.mounts, "bind", lambda _image: None)
    same.daemon._bind_told(told)
    assert adds_of(same) == adds_of(world) and "is lost" not in caplog.text


def test_a_liar_that_has_taken_the_place_of_an_image_is_not_bound_again(
    world: World, liar: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world.bind("lower", world.folder / "lower.boot")
    copy = tmp_path / "copy.boot"
    copy.write_bytes((world.folder / "lower.boot").read_bytes())
    world.bind("copy", copy)
    images = world.daemon.session_state()["images"]
    copy.write_bytes(liar.read_bytes())
    assert list(successor(world, images, monkeypatch)[0].daemon._bound) == ["/d/lower"]
    assert "another digest than in the image /d/lower" in caplog.text


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


def test_images_of_one_domain_have_one_type_of_backend(world: World) -> None:
    """Else one would be asked for with what is the other's, credentials included."""
    registry = {"backend_type": "registry", "backend_config": {"host": "h", "repo": "r", "auth": "YTpi"}}
    assert world.bind("lower", world.folder / "lower.boot") == {"ok": None}
    refused = world.bind("merged", world.folder / "merged.boot", backend=registry)["error"]["message"]
    for part in ("type registry", "/d/lower", "type localfs", "a domain of its own"):
        assert part in refused
    assert world.bind("merged", world.folder / "merged.boot", "e", registry) == {"ok": None}


def test_credentials_that_are_set_are_those_of_all_images_until_one_brings_its_own(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be set before, and a successor knows them."""
    Path(world.daemon.run_dir).mkdir(parents=True, exist_ok=True)
    set_before, own = "YTpi", "YTpj"
    settings: Json = {"id": "/", "values": {"registry_auth": set_before}}
    monkeypatch.setattr(world.daemon.mounts, "images", {}, raising=False)
    control_ops.OPS["set_config"](world.daemon, settings)

    def backend(auth: str | None) -> Json:
        return {"backend_type": "registry", "backend_config": {"host": "h", "repo": "r", "auth": auth}}

    def known(by: World) -> dict[str, str]:
        return {place: settings_of(bound.image.config)["registry_auth"] for place, bound in by.daemon._bound.items()}

    boot = world.folder / "lower.boot"
    assert world.bind("one", boot, "d", backend(None)) == {"ok": None}
    assert known(world) == {"/d/one": set_before}
    noted = world.daemon.session_state()["images"]
    assert known(successor(world, noted, monkeypatch)[0]) == {"/d/one": set_before}
    assert world.bind("two", boot, "e", backend(own)) == {"ok": None}
    assert known(world)["/e/two"] == own
    noted = world.daemon.session_state()["images"]
    assert set(known(successor(world, noted, monkeypatch)[0]).values()) == {own}


def test_an_image_whose_folders_the_kernel_would_read_from_a_blob_is_refused(world: World, tmp_path: Path) -> None:
    damaged = bytearray((world.folder / "lower.boot").read_bytes())
    struct.pack_into("<I", damaged, 1408 + 68, 1)
    (tmp_path / "damaged.boot").write_bytes(damaged)
    refused = world.bind("damaged", tmp_path / "damaged.boot")["error"]["message"]
    for part in (f"{tmp_path}/damaged.boot: devices[0].mapped_blkaddr", "use `nydusd fuse`"):
        assert part in refused
    assert not world.daemon._bound


def test_of_two_that_are_bound_at_once_the_second_is_compared_with_the_first(world: World, liar: Path) -> None:
    first, second = world.ask("lower", world.folder / "lower.boot"), world.ask("liar", liar)
    assert world.work() == ["inspect", "inspect"]
    assert (first, second) == ([{"ok": None}], [])
    assert world.work() == ["compare_tables"]
    assert "another digest" in second[0]["error"]["message"]
