"""What is checked of fscache in the guest: `python -m tests.fscache.guest.checks`. It prints one line a check, in their order.

The checks follow one another with the same daemon, because its start takes seconds in an emulated machine: the first that
fails ends them. `tests/fscache/guest/__main__.py` boots the guest and counts them.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from nydusd.formats import open_bootstrap
from tests.fscache.guest.world import (
    CACHE,
    DOMAIN,
    RUNTIME,
    TAG,
    WORK,
    Reader,
    Store,
    bind,
    copies_of_open_files,
    daemon,
    drop_page_cache,
    entry,
    kill_all,
    mount,
    request,
    same,
    unmount,
    wait,
)
from tests.image.build import image as nydus_image
from tests.support import keeper, manifest
from tests.support.oracle import Image, image, images

FIRST, SECOND, THIRD = image("v6-zstd-blake3"), image("v6-smallchunk"), image("v6-batch")


def an_image_is_read_cold_while_workers_are_killed() -> None:
    daemon.start()
    bind("first", FIRST)
    place = mount("first")
    reader = Reader(FIRST, place)
    killed: set[int] = set()
    while reader.is_alive() and len(killed) < 6:
        for pid in daemon.pids("decompress") + daemon.pids("fetch"):
            if pid not in killed and len(killed) < 6:
                killed.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
    reader.finish()


def the_kernel_calls_the_cache_by_its_tag() -> None:
    rows = [row.split() for row in Path("/proc/fs/fscache/caches").read_text().splitlines()]
    assert [row[-1] for row in rows[2:]] == [TAG], rows


def what_is_cached_is_read_again_without_a_fetch() -> None:
    before = request("GET", "/api/v1/metrics/backend?id=/first")
    drop_page_cache()
    same(FIRST, WORK / "first")
    unmount(WORK / "first")
    same(FIRST, mount("first"))
    told = [json.loads(body)["read_count"] for _, body in (before, request("GET", "/api/v1/metrics/backend?id=/first"))]
    assert told[0] == told[1] > 0


def every_image_that_no_other_check_reads_shows_its_manifest() -> None:
    """But tarfs, which is not served. What was read once is in the kernel's cache, and others want theirs to be cold."""
    others = {FIRST.name, SECOND.name, THIRD.name, "v6-toc", "v6-none-sha256", "v6-tarfs"}
    daemon.be_there()
    for what in images():
        if "v6" not in what.name or ":" in what.name or what.name in others:
            continue
        bind(what.name, what)
        place = mount(what.name)
        same(what, place)
        unmount(place)
        assert request("DELETE", f"/api/v2/blobs?domain_id={DOMAIN}&blob_id={what.name}")[0] == 204


def every_larger_image_shows_its_manifest() -> None:
    """Those beside the repository, where $NYDUSD_FIXTURES names them; tarfs is refused."""
    daemon.be_there()
    for what in images():
        if not what.name.startswith("large:v6"):
            continue
        name = what.name.replace(":", "-")
        if what.name == "large:v6-tarfs":
            status, message = request("PUT", "/api/v2/blobs", entry(name, what, name))
            assert status == 500
            assert "blocks of 4096 bytes" in message
            continue
        began = time.monotonic()
        bind(name, what, name)
        place = mount(name, name)
        same(what, place)
        unmount(place)
        print(f"   {what.name}: no difference, {time.monotonic() - began:.1f} s", flush=True)


def what_cannot_be_bound_or_mounted_is_refused() -> None:
    for wrong, why in (
        (entry("old", image("v5-zstd-blake3")), "only images of RAFS v6"),
        (entry("first", FIRST), "exists"),
    ):
        status, message = request("PUT", "/api/v2/blobs", wrong)
        assert status == 500
        assert why in message
    try:
        mount("stranger")
    except OSError:
        return
    raise AssertionError("an image that is not bound was mounted")


def images_of_a_domain_share_a_blob_of_which_one_lists_more_and_a_liar_is_refused() -> None:
    folder = WORK / "sharing"
    (folder / "blobs").mkdir(parents=True)
    made = {"lower": {"gone": os.urandom(60_000), "keep": os.urandom(60_000)}, "upper": {"gone": os.urandom(7_000)}}
    for layer, files in made.items():
        (folder / layer).mkdir()
        for name, content in files.items():
            (folder / layer / name).write_bytes(content)
        nydus_image(
            "create", "--fs-version", "6", "-B", folder / f"{layer}.boot", "-D", folder / "blobs", folder / layer
        )
    nydus_image("merge", "-B", folder / "merged.boot", folder / "lower.boot", folder / "upper.boot")
    lower, merged = (
        Image(name, folder / f"{name}.boot", folder / "blobs", folder, folder) for name in ("lower", "merged")
    )
    bind("merged", merged, "two")
    place = mount("merged", "two")
    assert (place / "gone").read_bytes() == made["upper"]["gone"]
    bind("lower", lower, "two")
    below = mount("lower", "two")
    assert (below / "gone").read_bytes() == made["lower"]["gone"]
    drop_page_cache()
    for each in (place, below):
        assert (each / "keep").read_bytes() == made["lower"]["keep"]
    raw = bytearray(lower.bootstrap.read_bytes())
    raw[raw.find(listed_digest(lower))] ^= 1
    (folder / "liar.boot").write_bytes(raw)
    status, message = request(
        "PUT", "/api/v2/blobs", entry("liar", lower._replace(bootstrap=folder / "liar.boot"), "two")
    )
    assert status == 500
    assert "another digest than in the image" in message
    for each in (place, below):
        unmount(each)
    for name in ("merged", "lower"):
        assert request("DELETE", f"/api/v2/blobs?domain_id=two&blob_id={name}")[0] == 204


def listed_digest(what: Image) -> bytes:
    """Of a chunk of the image."""
    return next(open_bootstrap(memoryview(what.bootstrap.read_bytes()), "", None).raw_chunks()).digest


def readers_live_through_a_kill_of_the_supervisor_and_of_the_guard() -> None:
    (guard,) = daemon.pids("guard")
    os.kill(guard, signal.SIGKILL)
    wait("another guard", lambda: daemon.pids("guard") not in ([], [guard]))
    bind("second", SECOND)
    place = mount("second")
    reader = Reader(SECOND, place)
    wait("a fetch", lambda: '"read_count":0' not in request("GET", "/api/v1/metrics/backend?id=/second")[1])
    daemon.end(signal.SIGKILL)
    daemon.start()
    reader.finish()
    drop_page_cache()
    same(FIRST, WORK / "first")


def readers_of_what_a_stuck_worker_of_the_former_daemon_has_open_are_served_when_it_has_ended() -> None:
    """We are that worker: the kernel opens no file anew that we have open, too."""
    daemon.be_there()
    bind("stuck", SECOND, "stuck")
    place = mount("stuck", "stuck")
    for pid in daemon.pids("fetch") + daemon.pids("decompress"):
        os.kill(pid, signal.SIGSTOP)
    reader = Reader(SECOND, place)
    wait("a reader whom nobody answers", reader.waits)
    copies = copies_of_open_files()
    assert copies
    daemon.end(signal.SIGKILL)
    before = len(daemon.log.read_bytes())
    daemon.start()
    wait("a read that it cannot answer", lambda: b"somebody else has open still" in daemon.log.read_bytes()[before:])
    for fd in copies:
        os.close(fd)
    reader.finish()
    unmount(place)
    assert request("DELETE", "/api/v2/blobs?domain_id=stuck&blob_id=stuck")[0] == 204


def an_image_that_was_bound_before_the_kill_is_bound_after_it() -> None:
    assert request("PUT", "/api/v2/blobs", entry("second", SECOND)) == (204, ""), "who lost an answer may repeat"
    status, message = request("PUT", "/api/v2/blobs", entry("second", SECOND))
    assert (status, "already exists" in message) == (500, True)


def a_dropped_image_is_served_while_it_is_mounted_and_culled_when_it_is_not() -> None:
    bind("third", THIRD)
    (blob,) = THIRD.blobs.iterdir()
    unmount(mount("third"))  # the kernel gives a file its name when it is closed
    wait("a file in the cache", lambda: list(CACHE.glob(f"cache/*/*/D{blob.name}")))
    place = mount("third")
    assert request("DELETE", f"/api/v2/blobs?domain_id={DOMAIN}&blob_id=third")[0] == 204
    same(THIRD, place)
    status, message = request("DELETE", f"/api/v2/blobs?blob_id={blob.name}")
    assert (status, "uses it still" in message) == (500, True)
    unmount(place)
    wait("a file in the cache", lambda: list(CACHE.glob(f"cache/*/*/D{blob.name}")))
    wait("the cull", lambda: request("DELETE", f"/api/v2/blobs?blob_id={blob.name}")[0] == 204)
    assert list(CACHE.glob(f"cache/*/*/D{blob.name}")) == []
    try:
        mount("third")
    except OSError:
        return
    raise AssertionError("a dropped image was mounted")


def a_full_cache_fails_reads_and_serves_them_when_there_is_room() -> None:
    bind("alone", THIRD, domain="")
    knob = Path("/proc/sys/cachefiles/error_injection")
    place = mount("alone", None)
    files = [row for row in manifest.load(THIRD.manifest).values() if "sha256" in row]
    largest = manifest.unescape(str(max(files, key=lambda row: int(str(row["size"])))["path"]))
    knob.write_text("1")
    try:
        with open(os.path.join(os.fsencode(place), largest), "rb") as f:
            f.read()
        raise AssertionError("a read went well without room")
    except OSError as e:
        assert e.errno == errno.EIO
    finally:
        knob.write_text("0")
    unmount(place)
    same(THIRD, mount("alone", None))


def a_stop_leaves_mounted_images_readable_and_the_next_daemon_serves_them() -> None:
    assert daemon.end(signal.SIGTERM) == 0
    assert len(daemon.pids("guard")) == 1
    drop_page_cache()
    same(SECOND, WORK / "second")
    daemon.start()
    unmount(WORK / "alone")
    same(THIRD, mount("alone", None))


def with_the_device_in_an_fd_store_everything_of_ours_may_be_killed_at_once() -> None:
    assert daemon.end(signal.SIGTERM) == 0
    store = Store()
    daemon.start(store)
    bind("kept", image("v6-toc"))
    place = mount("kept")
    store.take()
    reader = Reader(image("v6-toc"), place)
    kill_all()
    daemon.start(store)
    reader.finish()
    same(SECOND, WORK / "second")
    unmount(place)
    store.close()


def nobody_reads_zeros_when_all_processes_are_killed_at_once() -> None:
    bind("last", image("v6-none-sha256"))
    place = mount("last")
    kill_all()
    rows = manifest.load(image("v6-none-sha256").manifest)
    failed = 0
    for row in rows.values():
        if row.get("size") and "sha256" in row:
            path = os.path.join(os.fsencode(place), manifest.unescape(str(row["path"])))
            try:
                with open(path, "rb") as f:
                    content = f.read()
            except OSError:
                failed += 1
                continue
            assert hashlib.sha256(content).hexdigest() == row["sha256"], path
    assert failed, "nothing was left to be read from the cache"


def a_stop_without_mounts_leaves_nothing() -> None:
    for name in ("first", "second", "alone", "last"):
        unmount(WORK / name)
    daemon.start()
    bind("last", image("v6-none-sha256"))
    same(image("v6-none-sha256"), mount("last"))
    unmount(WORK / "last")
    assert daemon.end(signal.SIGTERM) == 0
    wait("their end", lambda: not daemon.pids(""))
    assert [path.name for path in RUNTIME.iterdir() if "fscache" in path.name] == []


@functools.cache
def keeping() -> keeper.Keeper:
    """Who keeps the device of the daemon, as nydus-snapshotter does: that is started again for this."""
    made = keeper.Keeper(WORK)
    daemon.command += made.args
    daemon.start()
    return made


def an_upgrade_goes_on_with_reads_that_nobody_has_answered() -> None:
    """The old daemon's workers are stopped: what it has taken is left for the next one to answer."""
    keeping()
    bind("upgraded", SECOND, "handover")
    place = mount("upgraded", "handover")
    keeping().save(daemon)
    readers: list[Reader] = []

    def have_reads_under_way() -> None:
        for pid in daemon.pids("fetch") + daemon.pids("decompress"):
            os.kill(pid, signal.SIGSTOP)
        readers.append(Reader(SECOND, place))
        wait("a reader whom nobody answers", readers[0].waits)

    keeper.upgrade(daemon, keeping(), have_reads_under_way)
    readers[0].finish()
    assert '"read_count":0' not in request("GET", "/api/v1/metrics/backend?id=/handover/upgraded")[1]


def with_a_keeper_the_supervisor_may_be_killed_or_everything_with_its_folder_gone() -> None:
    """The guard has the device in the first case, and only the keeper in the second, where it alone knows the images, too."""
    for name, what, kill in (("first", FIRST, lambda: daemon.end(signal.SIGKILL)), ("third", THIRD, kill_all)):
        bind(name, what, "handover")
        place = mount(name, "handover")
        keeping().save(daemon)
        reader = Reader(what, place)
        metrics = f"/api/v1/metrics/backend?id=/handover/{name}"
        wait("a fetch", lambda metrics=metrics: '"read_count":0' not in request("GET", metrics)[1])  # type: ignore[misc]
        kill()
        if kill is kill_all:
            shutil.rmtree(RUNTIME)
        keeper.succeed(daemon, keeping())
        reader.finish()
    drop_page_cache()
    for name, what in (("upgraded", SECOND), ("first", FIRST), ("third", THIRD)):
        same(what, WORK / name)


def a_stop_of_what_was_kept_leaves_nothing() -> None:
    for name in ("upgraded", "first", "third"):
        unmount(WORK / name)
    keeping().close()
    assert daemon.end(signal.SIGTERM) == 0
    wait("their end", lambda: not daemon.pids(""))
    assert [path.name for path in RUNTIME.iterdir() if "fscache" in path.name] == []


CHECKS = (
    an_image_is_read_cold_while_workers_are_killed,
    the_kernel_calls_the_cache_by_its_tag,
    what_is_cached_is_read_again_without_a_fetch,
    every_image_that_no_other_check_reads_shows_its_manifest,
    *([every_larger_image_shows_its_manifest] if os.environ.get("NYDUSD_FIXTURES") else []),
    what_cannot_be_bound_or_mounted_is_refused,
    images_of_a_domain_share_a_blob_of_which_one_lists_more_and_a_liar_is_refused,
    readers_live_through_a_kill_of_the_supervisor_and_of_the_guard,
    readers_of_what_a_stuck_worker_of_the_former_daemon_has_open_are_served_when_it_has_ended,
    an_image_that_was_bound_before_the_kill_is_bound_after_it,
    a_dropped_image_is_served_while_it_is_mounted_and_culled_when_it_is_not,
    a_full_cache_fails_reads_and_serves_them_when_there_is_room,
    a_stop_leaves_mounted_images_readable_and_the_next_daemon_serves_them,
    with_the_device_in_an_fd_store_everything_of_ours_may_be_killed_at_once,
    nobody_reads_zeros_when_all_processes_are_killed_at_once,
    a_stop_without_mounts_leaves_nothing,
    an_upgrade_goes_on_with_reads_that_nobody_has_answered,
    with_a_keeper_the_supervisor_may_be_killed_or_everything_with_its_folder_gone,
    a_stop_of_what_was_kept_leaves_nothing,
)


def chosen(names: Sequence[str]) -> list[Callable[[], None]]:
    """These checks, all if none is named. Some need those before them."""
    return [check for check in CHECKS if not names or check.__name__ in names]


def main(names: Sequence[str]) -> int:
    """Run checks; the first that fails ends them, for the others build on it."""
    WORK.mkdir()
    for check in chosen(names):
        began = time.monotonic()
        try:
            check()
        except BaseException:
            print(f"FAILED {check.__name__}", flush=True)
            traceback.print_exc(file=sys.stdout)
            print("the daemon's log:")
            if daemon.log.exists():
                print(daemon.log.read_text(errors="replace")[-6000:], flush=True)
            return 1
        print(f"ok {check.__name__} {time.monotonic() - began:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
