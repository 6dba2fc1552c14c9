"""The page of metrics: what Prometheus' own parser makes of it, and what is declared of it."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from nydusd.control.exposition import Family, Page
from nydusd.control.metrics import FAMILIES, page
from nydusd.errors import InternalError
from nydusd.nursery.place import LOOK
from nydusd.storage.state.segment import EMPTY, FAILED, READY
from tests.support.api import ApiProcess, Json
from tests.support.segments import make_segment, segment_name

ROOT = Path(__file__).resolve().parents[2]
STATE = bytes([READY, READY, EMPTY, FAILED])
POOL = {
    "workers": 3,
    "busy": 1,
    "queued": {"user": 1, "ahead": 2, "prefetch": 3},
    "jobs_done": 40,
    "jobs_failed": 2,
    "read_bytes": {"user": 1000, "prefetch": 500},
    "route_bytes": {"origin": 900, "proxy": 600},
}


def facts(segment: str, folder: str, nursery: str) -> Json:
    """What the supervisor says, with nothing left out."""
    image = {
        "place": "/a",
        "backend": "registry",
        "fs": {
            "data_read": 900533,
            "block_count_read": [34, 0, 0, 3, 0, 3, 0, 0],
            "fop_hits": [2, 0, 0, 0, 40, *[0] * 10],
            "fop_errors": [0, 0, 0, 0, 3, *[0] * 10],
            "fop_cumulative_latency_total": [0, 0, 0, 0, 117329, *[0] * 10],
            "read_latency_dist": [37, 2, 0, 0, 1, 0, 0, 0],
        },
        "backend_metrics": {
            "read_count": 7,
            "read_errors": 1,
            "read_amount_total": 756539,
            "read_cumulative_latency_millis_total": 1500,
            "read_latency_sizes_dist": [[1, 0, 0, 0, 0, 0, 0, 0]] * 3 + [[0, 2, 0, 0, 0, 0, 0, 1]] + [[0] * 8] * 4,
        },
        "blobcache": {
            "partial_hits": 39,
            "whole_hits": 1,
            "total": 40,
            "entries_count": 2994,
            "prefetch_data_amount": 4096,
            "prefetch_requests_count": 2,
            "prefetch_workers": 4,
            "prefetch_unmerged_chunks": 9,
            "prefetch_cumulative_time_millis": 50,
            "prefetch_begin_time_secs": 10,
            "prefetch_begin_time_millis": 900,
            "prefetch_end_time_secs": 12,
            "prefetch_end_time_millis": 100,
            "buffered_backend_size": 0,
        },
    }
    data = os.path.join(folder, "b.blob.data")
    return {
        "version": {"package_ver": "9", "git_commit": "abc"},
        "id": "d1",
        "uptime": 12.5,
        "images": [image],
        "blobs": [{"blob_id": "b", "segment": segment, "uncompressed_size": 400, "data_file": data}],
        "processes": [
            {"role": "supervisor", "index": 0, "pid": os.getpid(), "generation": 1},
            {"role": "fuse", "index": 1, "pid": 0, "generation": 4},
        ],
        "load": {
            "state": "RUNNING",
            "arena_bytes": 4096,
            "prefetch": {"requests": 3, "bytes": 300},
            "pools": {"fetch": POOL, "decompress": POOL},
        },
        "seats": {"roles": {"fetch": {"waits": 3, "waited_seconds": 0.25}}, "nursery": nursery},
        "waits": [0.5, 11.0],
        "folders": {
            "/cache": {
                "quota": 900,
                "used": 800,
                "evicted_chunks": 7,
                "evicted_bytes": 70,
                "removed_blobs": 2,
                "rounds": 1,
            },
            "/free": {
                "quota": 0,
                "used": None,
                "evicted_chunks": 0,
                "evicted_bytes": 0,
                "removed_blobs": 0,
                "rounds": 0,
            },
        },
    }


@contextmanager
def nursery(path: str) -> Iterator[None]:
    """What answers who asks for the seats of the node, at this path."""
    rows = {"fetch": {"seats": 16, "taken": 5, "waiting": 1}}

    def serve() -> None:
        while True:
            with listener.accept()[0] as wire:
                if wire.recv(64) != LOOK:
                    return
                wire.send(json.dumps({"daemons": 2, "roles": rows, "active": []}).encode())

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        yield
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as wire:
            wire.connect(path)
            wire.send(b"end")
            thread.join()


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Json]:
    (tmp_path / "b.blob.data").write_bytes(b"x" * 8192)
    with segment_name() as name:
        segment = make_segment(name, len(STATE), state=STATE)
        row = segment.counters(1)
        row[:] = memoryview(bytes(48)).cast("Q")
        row[0], row[1], row[2], row[3], row[4] = 10, 1000, 5, 500, 1
        row.release()
        with nursery(str(tmp_path / "nursery")):
            yield facts(name, str(tmp_path), str(tmp_path / "nursery"))
        segment.close()


def parsed(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def values(text: str) -> dict[str, float]:
    """Each sample, its labels sorted: `name{a="b"}`."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            inner = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
            found[sample.name + (f"{{{inner}}}" if inner else "")] = sample.value
    return found


def test_every_declared_metric_is_on_a_full_page_with_its_type_and_help(full: Json) -> None:
    found = parsed(page(full))
    for family in FAMILIES:
        metric = found.pop(family.name.removesuffix("_total") if family.kind == "counter" else family.name)
        assert (metric.type, metric.documentation) == (family.kind, family.help)
        for sample in metric.samples:
            assert set(sample.labels) - {"le"} == set(family.labels)
    assert found == {}


def test_values(full: Json) -> None:
    found = values(page(full))
    expected = {
        'nydusd_info{commit="abc",version="9"}': 1,
        'nydusd_state{state="RUNNING"}': 1,
        'nydusd_state{state="INIT"}': 0,
        'nydusd_processes{role="fuse"}': 0,
        'nydusd_process_restarts_total{role="fuse"}': 3,
        'nydusd_chunk_reads_total{blob="b",result="hit"}': 10,
        'nydusd_chunk_read_bytes_total{blob="b",result="miss"}': 500,
        'nydusd_chunk_read_failures_total{blob="b"}': 1,
        'nydusd_chunks{blob="b",state="ready"}': 2,
        'nydusd_chunks{blob="b",state="failed"}': 1,
        'nydusd_cache_allocated_bytes{blob="b"}': 8192,
        'nydusd_fetched_bytes_total{cause="on_demand"}': 2000,
        'nydusd_fetched_bytes_total{cause="prefetch"}': 1000,
        'nydusd_route_bytes_total{route="proxy"}': 1200,
        'nydusd_workers{pool="fetch",state="idle"}': 2,
        'nydusd_jobs_queued{pool="decompress",priority="prefetch"}': 3,
        'nydusd_node_workers{pool="fetch",state="seats"}': 16,
        'nydusd_node_workers{pool="fetch",state="taken"}': 5,
        'nydusd_node_waiting_daemons{pool="fetch"}': 1,
        'nydusd_seat_waits_total{pool="fetch"}': 3,
        'nydusd_seat_wait_seconds_total{pool="fetch"}': 0.25,
        'nydusd_cumulative_read_block_bytes_bucket{image_ref="/a",le="1023"}': 34,
        'nydusd_cumulative_read_block_bytes_bucket{image_ref="/a",le="65535"}': 37,
        'nydusd_cumulative_read_block_bytes_sum{image_ref="/a"}': 900533,
        'nydusd_cache_prefetch_unmerged_chunks{image_ref="/a"}': 9,
        'nydusd_cache_prefetch_cumulative_time_millis{image_ref="/a"}': 50,
        'nydusd_cache_prefetch_duration_millis{image_ref="/a"}': 1200,
        'nydusd_cache_quota_bytes{folder="/cache"}': 900,
        'nydusd_cache_quota_bytes{folder="/free"}': None,
        'nydusd_cache_used_bytes{folder="/cache"}': 800,
        'nydusd_cache_used_bytes{folder="/free"}': None,
        'nydusd_evicted_chunks_total{folder="/cache"}': 7,
        'nydusd_evicted_bytes_total{folder="/cache"}': 70,
        'nydusd_removed_blobs_total{folder="/cache"}': 2,
        "nydusd_hung_io_counts": 1,
        "nydusd_longest_wait_seconds": 11,
        'nydusd_read_errors{image_ref="/a"}': 3,
        'nydusd_operations_total{image_ref="/a",operation="read"}': 40,
        'nydusd_read_latency_seconds_bucket{image_ref="/a",le="0.001"}': 39,
        'nydusd_read_latency_seconds_count{image_ref="/a"}': 40,
        'nydusd_read_latency_seconds_sum{image_ref="/a"}': 0.117329,
        'nydusd_backend_latency_seconds_bucket{backend="registry",image_ref="/a",le="+Inf"}': 6,
        'nydusd_backend_latency_seconds_sum{backend="registry",image_ref="/a"}': 1.5,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert found['nydusd_process_proportional_memory_bytes{index="0",role="supervisor"}'] > 1 << 20


def test_histograms_only_grow_from_bucket_to_bucket(full: Json) -> None:
    for name, metric in parsed(page(full)).items():
        if metric.type == "histogram":
            buckets = [sample.value for sample in metric.samples if sample.name == f"{name}_bucket"]
            assert len(buckets) == 8
            assert buckets == sorted(buckets)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_name_follows_the_conventions(family: Family) -> None:
    assert re.fullmatch(r"nydusd_[a-z0-9_]+", family.name)
    assert family.help.endswith(".")
    assert family.unit
    if not family.kept:
        assert family.name.endswith("_total") == (family.kind == "counter")
        assert not re.search(r"_(millis|milliseconds|microseconds|kilobytes|kib|mib|count)(_total)?$", family.name)
        for unit in ("seconds", "bytes"):
            assert (family.unit == unit) == (unit in family.name.removesuffix("_total").rsplit("_", 1)[-1])


def test_hostile_names_stay_in_their_labels(full: Json) -> None:
    name = 'a"} 1\nevil{x="\\\udcff\x00'
    image = full["images"][0]  # type: ignore[index]
    image["place"] = name
    found = parsed(page(full))
    assert "evil" not in found
    (label,) = {sample.labels["image_ref"] for sample in found["nydusd_read_hits"].samples}
    assert label == name.encode(errors="backslashreplace").decode()


def with_a_wrong_fact(value: object) -> list[Json]:
    """All facts, with this in the place of each one of them."""
    known = facts("/nydusd.gone", "/nonexistent", "/nonexistent")
    known["processes"] = known["processes"][1:]  # type: ignore[index]  # the memory of ours takes long to look up
    wrong = [{**known, key: value} for key in known]
    image = known["images"][0]  # type: ignore[index]
    for part in ("fs", "backend_metrics", "blobcache"):
        wrong += [{**known, "images": [{**image, part: {**image[part], key: value}}]} for key in image[part]]
    return wrong


@pytest.mark.parametrize(
    "value", [None, True, -1, 1 << 70, "", "text", [], [1, "text"], [[], [[None]], -1], {}, {"a": [0]}], ids=repr
)
def test_wrong_facts_cost_their_part_of_the_page_and_no_more(value: object) -> None:
    for wrong in with_a_wrong_fact(value):
        assert parsed(page(wrong))


@settings(max_examples=200)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists, max_leaves=4), st.data())
def test_any_wrong_fact_costs_its_part_of_the_page_and_no_more(value: object, data: st.DataObject) -> None:
    assert parsed(page(data.draw(st.sampled_from(with_a_wrong_fact(value)))))


def test_undeclared_metric_is_our_bug() -> None:
    out = Page(FAMILIES)
    with pytest.raises(InternalError):
        out.add("nydusd_unheard_of", 1)
    with pytest.raises(InternalError):
        out.add("nydusd_images", 1, blob="x")


def test_dashboard_uses_what_there_is() -> None:
    board = json.loads((ROOT / "conf" / "grafana.json").read_text())
    names = {family.name for family in FAMILIES}
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    used = {name for text in expressions for name in re.findall(r"nydusd_\w+", text)}
    assert {re.sub(r"_bucket$", "", name) for name in used} - names == set()
    assert len(used) >= 15


def test_queries_of_the_page_use_what_there_is() -> None:
    head = (ROOT / "docs" / "metrics.md").read_text().partition("| name |")[0]
    used = set(re.findall(r"nydusd_\w+", head)) - {"nydusd_config"}
    assert used - {family.name for family in FAMILIES} == set()


class TestServed:
    def test_on_the_api_socket(self, tmp_path: Path, full: Json) -> None:
        with ApiProcess(tmp_path, lambda _: {"ok": full}) as api, api.connect() as wire:
            for path in ("/metrics", "/metrics/prometheus", "/api/v1/metrics/prometheus"):
                response = wire.ask("GET", path)
                assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
                assert 'nydusd_chunks{blob="b",state="ready"} 2' in response.body.decode().splitlines()
            assert wire.ask("GET", "/api/v1/daemon").headers["content-type"] == "application/json"

    def test_tcp_port_serves_metrics_and_nothing_else(self, tmp_path: Path, full: Json) -> None:
        with ApiProcess(tmp_path, lambda _: {"ok": full}, metrics=True) as api, api.connect_metrics() as wire:
            assert wire.ask("GET", "/metrics").status == 200
            assert wire.ask("GET", "/metrics/prometheus").status == 200
            for method, path in (("GET", "/api/v1/daemon"), ("PUT", "/api/v1/daemon/exit"), ("GET", "/api/v1/metrics")):
                assert (wire.ask(method, path).status, method, path) == (404, method, path)
            assert wire.ask("PUT", "/metrics").status == 400
            assert {str(request["op"]) for request in api.supervisor.asked} == {"prometheus"}
            with api.connect() as other:
                assert other.ask("GET", "/api/v1/daemon").status == 200
