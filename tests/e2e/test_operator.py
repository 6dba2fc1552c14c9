"""What an operator's commands say of a real daemon."""

from __future__ import annotations

import json
import os
import socket
import urllib.request
from contextlib import ExitStack
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.supervisor.lives import wrong
from tests.support.api import Wire
from tests.support.daemon import Daemon, image_config, wait_for_role
from tests.support.discipline import wait_until
from tests.support.oracle import image

IMAGE = image("v6-zstd-blake3")
FILES = ["/sizes/70K-random", "/dup/a", "/sizes/4097"]


def read(daemon: Daemon, files: list[str]) -> None:
    for file in files:
        (daemon.mountpoint / file[1:]).read_bytes()


def ready(daemon: Daemon) -> int:
    answer = daemon.get("/api/v1/nydusd/cache")
    assert isinstance(answer, dict)
    return int(answer["blobs"][0]["ready"])


def test_trace_of_one_daemon_is_the_prefetch_list_of_another(tmp_path: Path) -> None:
    config = image_config(IMAGE.blobs, tmp_path / "one") | {"amplify_io": 0}
    with Daemon(IMAGE.bootstrap, IMAGE.blobs, config=config) as daemon:
        read(daemon, FILES)
        listed = daemon.ctl("trace", "--prefetch-list")
        read_of_them = ready(daemon)
    assert listed.splitlines() == FILES
    (tmp_path / "list").write_text(listed)
    prefetch = {"enable": True, "threads_count": 2, "prefetch_all": False}
    config = image_config(IMAGE.blobs, tmp_path / "two") | {"amplify_io": 0, "fs_prefetch": prefetch}
    with Daemon(
        IMAGE.bootstrap, IMAGE.blobs, config=config, args=("--prefetch-files", str(tmp_path / "list"))
    ) as daemon:
        wait_until(lambda: ready(daemon) == read_of_them, "the files of the list")
        assert daemon.ctl("trace", "--prefetch-list") == ""


def test_trace_goes_on_when_a_front_end_is_replaced() -> None:
    with Daemon(IMAGE.bootstrap, IMAGE.blobs, args=("--fuse-threads", "1")) as daemon:
        read(daemon, FILES[:1])
        victim = daemon.pids("fuse")[0]
        daemon.kill(victim)
        wait_for_role(daemon, "fuse", 1, without=victim)
        read(daemon, FILES)
        rows = json.loads(daemon.ctl("--raw", "trace"))
        assert list(dict.fromkeys(row["path"] for row in rows)) == FILES
        assert rows[0]["missed"] is True


def test_workers_count_generations_and_jobs() -> None:
    with Daemon(IMAGE.bootstrap, IMAGE.blobs) as daemon:
        read(daemon, FILES)
        victim = daemon.pids("decompress")[0]
        daemon.kill(victim)
        wait_for_role(daemon, "decompress", len(os.sched_getaffinity(0)), without=victim)
        answer = json.loads(daemon.ctl("--raw", "workers"))
        rows = {(row["role"], row["index"]): row for row in answer["processes"]}
        assert {role for role, _ in rows} == {"supervisor", "fork server", "fuse", "fetch", "decompress", "api"}
        assert [row["generation"] for key, row in rows.items() if key[0] == "decompress"].count(2) == 1
        assert rows["fetch", 0]["jobs"] >= 1
        assert all(row["pss_bytes"] > 1 << 20 for row in rows.values())
        assert {row["commit"] for row in rows.values()} == {daemon.get("/api/v1/daemon")["version"]["git_commit"]}  # type: ignore[index]


def test_every_process_of_a_daemon_is_shown_with_its_memory() -> None:
    with Daemon(IMAGE.bootstrap, IMAGE.blobs) as daemon:

        def memory() -> dict[int, int]:
            answer = daemon.get("/api/v1/nydusd/workers")
            assert isinstance(answer, dict)
            return {row["pid"]: row["pss_bytes"] for row in answer["processes"] if row["pid"]}

        wait_until(lambda: set(memory()) == {daemon.pid, *daemon.family()}, "all processes to be shown")
        assert all(memory().values())


def test_top_and_map_of_a_live_daemon() -> None:
    with Daemon(IMAGE.bootstrap, IMAGE.blobs) as daemon:
        read(daemon, FILES)
        assert "slowest backend" in daemon.ctl("top", "-n", "1", "-i", "0.1")
        drawn = daemon.ctl("cache", "--map", "--png", str(daemon.folder / "x.png")).splitlines()
        assert sum(len(line) for line in drawn[4:-1]) == int(drawn[1].split()[1])
        assert (daemon.folder / "x.png").stat().st_size > 100


def test_commands_answer_while_every_front_end_is_stopped() -> None:
    """Nothing of it looks at the mount."""
    with Daemon(IMAGE.bootstrap, IMAGE.blobs) as daemon:
        read(daemon, FILES[:1])
        fronts = daemon.pids("fuse")
        for pid in fronts:
            os.kill(pid, 19)
        try:
            assert daemon.ctl("workers").count("stopped") == len(fronts)
            for args in (["info"], ["cache", "--map"], ["trace"], ["top", "-n", "1", "-i", "0.1"]):
                assert daemon.ctl(*args)
        finally:
            for pid in fronts:
                os.kill(pid, 18)


def test_reads_are_answered_while_clients_of_the_api_have_said_half_of_what_they_want() -> None:
    request = "PUT /api/v1/daemon HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\n" + '{"log_level":"info"}'
    with Daemon(IMAGE.bootstrap, IMAGE.blobs) as daemon, ExitStack() as stack:
        slow = [stack.enter_context(Wire(str(daemon.apisock))) for _ in range(60)]
        for length, wire in enumerate(slow, 1):
            wire.send(request[:length])
        # And some that read nothing of what they asked for: more than a socket buffers.
        deaf = [stack.enter_context(Wire(str(daemon.apisock))) for _ in range(5)]
        for wire in deaf:
            wire.send("GET /metrics/prometheus HTTP/1.1\r\nHost: x\r\n\r\n" * 50)
        assert wrong(daemon) == [], "each byte of the image, of which nothing was cached"
        assert all(wire.is_open() for wire in slow), "they wait still"
        assert wrong(daemon) == []
        slow[9].send(request[10:])
        assert slow[9].response().status == 204


def scrape(port: int) -> dict[str, float]:
    """The samples over TCP, by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_of_a_live_daemon_over_tcp_survive_the_api_process(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    config = image_config(IMAGE.blobs, tmp_path) | {"nydusd": {"metrics_listen": f"127.0.0.1:{port}"}}
    with Daemon(IMAGE.bootstrap, IMAGE.blobs, config=config) as daemon:
        before = scrape(port)
        read(daemon, FILES)
        blob = next(IMAGE.blobs.iterdir()).name
        assert before["nydusd_state RUNNING"] == 1
        assert before.get(f"nydusd_chunks {blob} ready", 0) == 0  # not open yet, perhaps
        # What is read ahead of the reader comes after what it waited for.
        wait_until(
            lambda: scrape(port)[f"nydusd_chunks {blob} ready"] == ready(daemon), "both to count the same chunks"
        )
        after = scrape(port)
        assert after["nydusd_fetched_bytes_total on_demand"] > 0
        assert after[f"nydusd_chunk_read_bytes_total {blob} miss"] > 0
        assert after[f"nydusd_cache_allocated_bytes {blob}"] > 0
        assert after["nydusd_process_restarts_total api"] == 0
        victim = daemon.pids("api")[0]
        daemon.kill(victim)
        wait_for_role(daemon, "api", 1, without=victim)
        assert scrape(port)["nydusd_process_restarts_total api"] == 1


def test_metrics_port_that_is_taken_is_a_line_in_the_log_and_the_mount_goes_on(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config = image_config(IMAGE.blobs, tmp_path) | {"nydusd": {"metrics_listen": address}}
        with Daemon(IMAGE.bootstrap, IMAGE.blobs, config=config) as daemon:
            assert f"nydusd.metrics_listen {address}: Address already in use" in daemon.log_tail()
            read(daemon, FILES)
