"""The answers of the API for a real mount, key by key against what the reference was seen to answer, and that they are true."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path

import pytest

from tests.support import oracle
from tests.support.daemon import Daemon, image_config
from tests.support.discipline import wait_until

RECORDED = json.loads((Path(__file__).resolve().parents[1] / "data/reference-answers.json").read_text())
IMAGE = oracle.image("v6-zstd-blake3")
READ, SIZES = 4, (1 << 10, 4 << 10, 16 << 10, 64 << 10, 128 << 10, 512 << 10, 1 << 20)
FILES = sorted({data: path for path, data in oracle.truth(IMAGE.name).items() if 0 < len(data) < 100_000}.values())[:40]
"""Of different contents: so no two are links to one file."""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One image at /, all that can be counted counted, 40 files read in one piece each.

    One front end: a read is counted after its answer, and of two each may be at that later than the other at the next read.
    """
    config = image_config(IMAGE.blobs, tmp_path_factory.mktemp("cache"))
    config |= {"nydusd": {"front_ends": 1}, "iostats_files": True, "access_pattern": True, "latest_read_files": True}
    with Daemon(IMAGE.bootstrap, IMAGE.blobs, config=config) as made:
        for path in FILES:
            with open(os.fsencode(made.mountpoint) + b"/" + path, "rb") as file:
                assert file.read() == oracle.truth(IMAGE.name)[path]
        wait_until(lambda: metrics(made)["fop_hits"][READ] >= len(FILES), "the counts of all reads")  # type: ignore[index]
        yield made


def metrics(daemon: Daemon, path: str = "/api/v1/metrics") -> dict[str, object]:
    found = daemon.get(path)
    assert isinstance(found, dict)
    return found


def shape(value: object, known: object) -> object:
    """The value without its contents: keys, types, and lengths of lists of numbers. Free keys stand for each other.

    The table `nydusd` of a configuration is ours alone.
    """
    if isinstance(value, dict) and isinstance(known, dict):
        if all(key.isdigit() or key.startswith("/") for key in (*value, *known)) and value and known:
            rows = [shape(item, next(iter(known.values()))) for item in value.values()]
            assert all(row == rows[0] for row in rows)
            return {"*": rows[0]}
        return {key: shape(item, known.get(key)) for key, item in value.items() if key != "nydusd"}
    if isinstance(value, list):
        if known and isinstance(known, list) and value and not isinstance(value[0], int):
            return [shape(value[0], known[0])]
        return f"{len(value)} numbers" if isinstance(known, list) and len(known) in (8, 15) else "list"
    return type(value).__name__


@pytest.mark.parametrize("path", RECORDED)
def test_keys_and_types_are_those_of_the_reference(daemon: Daemon, path: str) -> None:
    answer = daemon.get(path)
    assert shape(answer, RECORDED[path]) == shape(RECORDED[path], RECORDED[path])


def test_read_counts_are_those_of_the_files_that_were_read(daemon: Daemon) -> None:
    contents = [oracle.truth(IMAGE.name)[path] for path in FILES]
    found = metrics(daemon)
    assert found["data_read"] == sum(map(len, contents))
    hits, sizes, latencies = found["fop_hits"], found["block_count_read"], found["read_latency_dist"]
    total = found["fop_cumulative_latency_total"]
    assert (
        isinstance(hits, list) and isinstance(sizes, list) and isinstance(latencies, list) and isinstance(total, list)
    )
    assert hits[READ] == len(FILES) == sum(sizes) == sum(latencies)
    assert sizes == [sum(sum(len(data) >= limit for limit in SIZES) == of for data in contents) for of in range(8)]
    assert total[READ] > 0


def test_each_file_has_its_own_counts(daemon: Daemon) -> None:
    files = metrics(daemon, "/api/v1/metrics/files")
    for path in FILES:
        ino = os.lstat(os.fsencode(daemon.mountpoint) + b"/" + path).st_ino
        row = files[str(ino)]
        assert isinstance(row, dict)
        assert row["data_read"] >= len(oracle.truth(IMAGE.name)[path])
        assert row["fop_hits"][READ] >= 1
        assert row["total_fops"] == sum(row["fop_hits"])


def test_pattern_tells_the_order_of_first_reads(daemon: Daemon) -> None:
    rows = daemon.get("/api/v1/metrics/pattern")
    assert isinstance(rows, list)
    inodes = [os.lstat(os.fsencode(daemon.mountpoint) + b"/" + path).st_ino for path in FILES]
    assert [row["ino"] for row in rows] == list(dict.fromkeys(inodes))


def test_latest_files_are_told_once(daemon: Daemon) -> None:
    daemon.get("/api/v1/metrics/files?latest=true")
    assert daemon.get("/api/v1/metrics/files?latest=true") == []
    path = os.fsencode(daemon.mountpoint) + b"/" + FILES[0]
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        os.pread(fd, 4096, 0)
        ino = os.fstat(fd).st_ino
    finally:
        os.close(fd)
    wait_until(lambda: daemon.get("/api/v1/metrics/files?latest=true") == [[ino]], "the file that was read")


def test_ids_may_be_spelled_as_clients_do(daemon: Daemon) -> None:
    for path in ("metrics", "metrics/files", "metrics/pattern", "metrics/backend"):
        assert daemon.request("GET", f"/api/v1/{path}?id=/")[0] == 200
    assert daemon.request("GET", "/api/v1/metrics/blobcache?id=")[0] == 200
    for path in ("metrics", "metrics/files", "metrics/pattern", "metrics/backend", "metrics/blobcache"):
        status, body = daemon.request("GET", f"/api/v1/{path}?id=/none")
        assert status == 404
        assert json.loads(body)["message"].endswith("(Metrics(Stats(NoCounter)))")


def test_backend_counts_are_what_the_files_cost(daemon: Daemon) -> None:
    found = metrics(daemon, "/api/v1/metrics/backend")
    sizes, latencies = found["read_count_block_size_dist"], found["read_latency_sizes_dist"]
    assert isinstance(sizes, list) and isinstance(latencies, list)
    assert found["read_count"] == sum(sizes) == sum(map(sum, latencies)) > 0
    blob = next(IMAGE.blobs.iterdir())
    assert isinstance(found["read_amount_total"], int)
    assert 0 < found["read_amount_total"] <= blob.stat().st_size


def test_cache_counts_name_the_files_that_are_there(daemon: Daemon) -> None:
    found = metrics(daemon, "/api/v1/metrics/blobcache")
    assert found["underlying_files"] == [
        name for name in os.listdir(str(found["store_path"])) if name.endswith(".data")
    ]


def test_steering_is_refused_as_by_the_reference(daemon: Daemon) -> None:
    for path, status, message in (
        ("daemon/start", 400, 'Configure(DaemonAbnormal(UnexpectedEvent("Start")))'),
        ("daemon/fuse/takeover", 400, 'Upgrade(DaemonAbnormal(UnexpectedEvent("Takeover")))'),
        ("daemon/fuse/sendfd", 501, "Upgrade(DaemonAbnormal(Unsupported))"),
    ):
        found, body = daemon.request("PUT", f"/api/v1/{path}", b"")
        assert (found, json.loads(body)["message"]) == (status, message)


def test_any_spelling_of_a_mount_point_is_one(daemon: Daemon) -> None:
    facts = daemon.get("/api/v1/daemon/backend?mountpoint=/")
    for place in ("//", "/.", "%2F"):
        assert daemon.get(f"/api/v1/daemon/backend?mountpoint={place}") == facts
        trace = daemon.get(f"/api/v1/nydusd/trace?mountpoint={place}")
        assert isinstance(trace, dict) and [image["mountpoint"] for image in trace["images"]] == ["/"]
    for place in ("/x", "x", "", "/%00", "/.."):
        status, body = daemon.request("GET", f"/api/v1/daemon/backend?mountpoint={place}")
        assert (status, json.loads(body)["message"]) == (
            500,
            'FsBackendInfo(Metrics(Daemon(Other("object or filesystem doesn\'t exist"))))',
        )


def test_settings_are_told_without_secrets(daemon: Daemon) -> None:
    for path in ("config", "config?id=/", "config?id=/none"):
        assert daemon.get(f"/api/v1/{path}") == {}, "nothing was set"
    assert daemon.request("PUT", "/api/v1/config?id=/", b'{"registry_auth":"YTpiLXNlY3JldA=="}')[0] == 204
    assert daemon.get("/api/v1/config?id=/") == {"registry_auth": "***"}
    assert daemon.get("/api/v1/config") == {"/:registry_auth": "***"}
    proxy = b'{"proxy_url":"http://user:hunter2-secret@proxy:3128"}'
    assert daemon.request("PUT", "/api/v1/config?id=/", proxy)[0] == 204
    assert daemon.get("/api/v1/config?id=/") == {"registry_auth": "***", "proxy_url": "http://proxy:3128"}
    assert daemon.get("/api/v1/config?id=/x") == {}
    status, body = daemon.request("PUT", "/api/v1/config?id=/", b'{"prefetch":"x"}')
    assert (status, json.loads(body)["message"]) == (500, "Configure(ResponsePayloadType)")
    assert "YTpiLXNlY3JldA" not in daemon.log.read_text()


def test_a_fuse_daemon_binds_no_blobs(daemon: Daemon) -> None:
    entry = json.dumps({"type": "bootstrap", "id": "x", "config": {"metadata_path": "/b"}}).encode()
    for method, target, body, outer in (
        ("GET", "/api/v2/blobs?domain_id=x", None, "GetBlobObjects"),
        ("PUT", "/api/v2/blobs", entry, "CreateBlobObject"),
        ("DELETE", "/api/v2/blobs?domain_id=x", None, "DeleteBlobObject"),
    ):
        status, answer = daemon.request(method, target, body)
        assert (status, json.loads(answer)["message"]) == (501, f"{outer}(DaemonAbnormal(Unsupported))")
    assert daemon.request("DELETE", "/api/v2/blobs?blob_id=x")[0] == 204
    for method in ("GET", "DELETE"):
        status, answer = daemon.request(method, "/api/v2/blobs")
        assert (status, json.loads(answer)["message"]) == (400, "BadRequest")


def test_events_are_the_last_errors_with_their_time(tmp_path: Path, expect_log: Callable[..., None]) -> None:
    expect_log("blob .* cannot be opened", "a read failed")
    nowhere = tmp_path / "blobs"
    nowhere.mkdir()
    (blob,) = IMAGE.blobs.iterdir()
    with Daemon(IMAGE.bootstrap, nowhere) as daemon:
        with pytest.raises(OSError, match="Input/output error"):
            Path(os.fsdecode(os.fsencode(daemon.mountpoint) + b"/" + FILES[0])).read_bytes()
        found = metrics(daemon, "/api/v1/daemon/events")
    errors = found["errors"]
    assert isinstance(errors, list)
    assert found["total_errors"] == len(errors)
    assert found["total_size"] == sum(len(line.encode()) for line in errors)
    times, told = zip(*(line.split(" - ", 1) for line in errors), strict=True)
    assert any(line.startswith(f"blob {blob.name} cannot be opened: ") for line in told)
    assert all(parsedate_to_datetime(time).tzinfo is not None for time in times)
