"""`nydusd singleton`: the table of images that API v2 fills, without a mount."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import oracle
from tests.support.daemon import Daemon
from tests.support.singleton import Singleton, entry

V6, V5 = oracle.image("v6-zstd-blake3"), oracle.image("v5-zstd-blake3")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Singleton]:
    with Singleton(entry("first", V6, tmp_path)) as made:
        yield made


def put(daemon: Daemon, what: dict[str, object]) -> tuple[int, str]:
    status, body = daemon.request("PUT", "/api/v2/blobs", json.dumps(what).encode())
    return status, json.loads(body)["message"] if body else ""


def ids(daemon: Daemon, domain: str = "d") -> list[str]:
    answer = daemon.get(f"/api/v2/blobs?domain_id={domain}")
    assert isinstance(answer, dict)
    return [row["id"] for row in answer["blobs"] if row["type"] == "bootstrap"]


def test_images_are_bound_and_dropped(daemon: Singleton, tmp_path: Path) -> None:
    assert ids(daemon) == ["first"]
    assert put(daemon, entry("second", V6, tmp_path)) == (204, "")
    status, message = put(daemon, entry("second", V6, tmp_path))
    assert (status, "blob_cache: bootstrap blob already exists" in message) == (500, True)
    assert put(daemon, entry("second", V6, tmp_path, domain="")) == (204, ""), "another domain"
    assert daemon.request("DELETE", "/api/v2/blobs?domain_id=d&blob_id=first")[0] == 204
    status, body = daemon.request("DELETE", "/api/v2/blobs?domain_id=d&blob_id=first")
    assert (status, "blob_cache: cache entry not found" in json.loads(body)["message"]) == (500, True)
    assert ids(daemon) == ["second"]
    assert daemon.request("DELETE", "/api/v2/blobs?domain_id=d")[0] == 204
    assert (ids(daemon), ids(daemon, "")) == ([], ["second"])


def test_what_cannot_be_bound_is_refused_and_harms_nothing(daemon: Singleton, tmp_path: Path) -> None:
    good = entry("x", V6, tmp_path)
    config = good["config"]
    assert isinstance(config, dict)
    for wrong, why in (
        (entry("x", V5, tmp_path), "only images of RAFS v6"),
        (entry("x", V6, tmp_path / "none"), "work_dir"),
        (good | {"type": "datablob"}, "type"),
        (good | {"id": "a/b"}, "id: must be a name"),
        (good | {"domain_id": ".."}, "domain_id: must be a name"),
        (good | {"config": config | {"metadata_path": ""}}, "metadata_path"),
        (good | {"config": config | {"metadata_path": str(tmp_path)}}, "not a regular file"),
        (good | {"config": config | {"cache_type": "dummycache"}}, "cache"),
        (good | {"config": config | {"backend_type": "none"}}, "none"),
    ):
        status, message = put(daemon, wrong)
        assert status == 500
        assert message.startswith("CreateBlobObject(DaemonAbnormal(Other(")
        assert why in message
    assert ids(daemon) == ["first"]


def test_a_singleton_mounts_nothing(daemon: Singleton) -> None:
    assert daemon.mount("/a", V6.bootstrap, V6.blobs) == (501, "Mount(DaemonAbnormal(Unsupported))")
    assert daemon.umount("/a") == (501, "Mount(DaemonAbnormal(Unsupported))")
    assert daemon.request("GET", "/api/v1/metrics")[0] == 404


def test_other_answers_are_those_of_the_reference(daemon: Singleton, tmp_path: Path) -> None:
    """As it was seen to answer, but for what it has not: a list of what is bound, and of the reads that wait."""
    counters = "(Metrics(Stats(NoCounter)))"
    for method, target, status, message in (
        ("GET", "/api/v1/metrics", 404, f"GlobalMetrics{counters}"),
        ("GET", "/api/v1/metrics/backend", 404, f"BackendMetrics{counters}"),
        ("GET", "/api/v1/metrics/blobcache", 404, f"BlobcacheMetrics{counters}"),
        ("GET", "/api/v2/blobs", 400, "BadRequest"),
        ("DELETE", "/api/v2/blobs", 400, "BadRequest"),
    ):
        found, body = daemon.request(method, target)
        assert (target, found, json.loads(body)["message"]) == (target, status, message)
    assert daemon.get("/api/v1/config") == {}
    assert daemon.request("DELETE", "/api/v2/blobs?domain_id=none")[0] == 204
    for path in ("/api/v1/daemon", "/api/v2/daemon"):
        answer = daemon.get(path)
        assert isinstance(answer, dict)
        assert answer.keys() == {"version", "id", "supervisor", "state", "backend_collection"}
        assert answer["backend_collection"] is None
    assert put(daemon, entry("first", V6, tmp_path))[1] == (
        'CreateBlobObject(DaemonAbnormal(Other("blob_cache: bootstrap blob already exists")))'
    )


def test_several_singletons_live_side_by_side(daemon: Singleton, tmp_path: Path) -> None:
    with Singleton() as other:
        assert put(other, entry("theirs", V6, tmp_path)) == (204, "")
        assert (ids(other), ids(daemon)) == (["theirs"], ["first"])
