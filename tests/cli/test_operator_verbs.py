"""The verbs of `nydusctl` that clients of the reference do not know, against a real API process."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nydusd.cli.ctl.terminal import Screen, screen
from nydusd.cli.nydusctl import main
from nydusd.ipc.trace import Trace
from nydusd.storage.state.segment import EMPTY, FAILED, PENDING, READY
from tests.support.api import ApiProcess, Json
from tests.support.oracle import image
from tests.support.segments import make_segment, segment_name

STATE = bytes([READY, READY, EMPTY, PENDING, FAILED])
IMAGE = image("v6-zstd-blake3")


def process(role: str, pid: int, index: int = 0, jobs: int | None = None) -> Json:
    state = "idle" if jobs is not None else "running"
    row: Json = {"role": role, "index": index, "pid": pid, "generation": 3, "commit": "abc", "state": state}
    return {**row, "busy": None, "jobs": jobs}


def load(**reads: int) -> Json:
    totals = {"hits": 0, "hit_bytes": 0, "misses": 0, "miss_bytes": 0, "errors": 0}
    pool = {"workers": 2, "busy": 1, "queued": {"user": 3, "ahead": 2, "prefetch": 1}, "jobs_done": 9}
    return {
        "time": 100.0,
        "state": "RUNNING",
        "images": ["/"],
        "blobs": 1,
        "waiting": 4,
        "arena_bytes": 2048,
        "pools": {"fetch": pool, "decompress": pool},
        "reads": totals | reads,
        "prefetch": {"requests": 0, "bytes": 0},
    }


class Daemon:
    """What the supervisor says. An answer that is a list is given item by item, its last one for ever."""

    def __init__(self, segment: str) -> None:
        blob = {"blob_id": "ab" * 32, "segment": segment, "mountpoints": ["/"]}
        self.by_op: dict[str, object] = {
            "workers": {
                "processes": [process("supervisor", os.getpid()), process("fetch", 0, 1, 17)],
                "supervisor": os.getpid(),
                "uptime": 7261.5,
            },
            "cache": {"blobs": [{"blob_id": "ab" * 32, "chunks": 5, "ready": 2, "state": "ready", "reason": None}]},
            "chunks": {"blobs": [blob]},
            "load": load(),
            "trace": {"images": []},
            "metrics_backend": {"backend_type": "localfs", "read_count": 0},
        }
        self.asked: list[Json] = []

    def __call__(self, request: Json) -> Json:
        self.asked.append(request)
        answer = self.by_op.get(str(request["op"]))
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        return {"error": {"status": 404, "message": "gone"}} if answer is None else {"ok": answer}


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with segment_name() as name:
        segment = make_segment(name, len(STATE), state=STATE)
        yield Daemon(name)
        segment.close()


@pytest.fixture
def api(tmp_path: Path, daemon: Daemon) -> Iterator[ApiProcess]:
    with ApiProcess(tmp_path, daemon) as process:
        yield process


def ctl(api: ApiProcess, capsys: pytest.CaptureFixture[str], *args: str) -> str:
    status = main(["-S", api.path, *args])
    printed = capsys.readouterr()
    assert (status, printed.err) == (0, "")
    return printed.out


class TestWorkers:
    def test_shows_each_process_with_its_memory(self, api: ApiProcess, capsys: pytest.CaptureFixture[str]) -> None:
        head, own, fetch, _, total = ctl(api, capsys, "workers").splitlines()
        assert head.split() == ["PROCESS", "PID", "GENERATION", "JOBS", "RSS", "PSS", "BUILD", "STATE"]
        name, pid, generation, jobs, rss, _, pss, _, build, state = own.split()
        assert (name, pid, generation, jobs, build, state) == (
            "supervisor",
            str(os.getpid()),
            "3",
            "-",
            "abc",
            "running",
        )
        assert 0 < float(pss) <= float(rss)
        assert fetch.split() == ["fetch", "1", "0", "3", "17", "-", "-", "abc", "idle"]
        assert total.startswith("1 process, ")
        assert total.endswith(" PSS in all, up 2 h 1 min")

    def test_says_what_is_stopped_and_what_works(
        self, api: ApiProcess, daemon: Daemon, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with subprocess.Popen(["sleep", "60"]) as sleeper:
            try:
                sleeper.send_signal(19)
                os.waitid(os.P_PID, sleeper.pid, os.WSTOPPED | os.WNOWAIT)
                busy = process("decompress", 0, 0, 1) | {"state": "busy", "busy": "fill"}
                daemon.by_op["workers"] = {"processes": [process("fuse", sleeper.pid), busy], "uptime": 1}
                lines = ctl(api, capsys, "workers").splitlines()
            finally:
                sleeper.kill()
        assert lines[1].endswith("stopped")
        assert lines[2].endswith("busy: fill")

    def test_says_how_long_one_that_keeps_dying_waits(
        self, api: ApiProcess, daemon: Daemon, capsys: pytest.CaptureFixture[str]
    ) -> None:
        dying = process("fetch", 0, 0, None) | {"state": "restarting", "deaths": 6, "starts_in": 1.25}
        daemon.by_op["workers"] = {"processes": [dying], "uptime": 1}
        assert ctl(api, capsys, "workers").splitlines()[1].endswith("restarting in 1.2 s, after 6 early deaths")

    def test_upgrade_says_what_became_of_it(
        self, api: ApiProcess, daemon: Daemon, capsys: pytest.CaptureFixture[str]
    ) -> None:
        daemon.by_op["upgrade_workers"] = {"workers": 3, "from": "a", "to": "b", "checked": "all", "seconds": 0.52}
        assert ctl(api, capsys, "workers", "upgrade").splitlines() == [
            "3 workers of build a were replaced in 0.5 s",
            "they are of build b now; tried: all",
        ]

    def test_upgrade_that_came_to_nothing_is_an_error_with_its_cause_alone(
        self, api: ApiProcess, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["-S", api.path, "workers", "upgrade"]) == 1
        assert capsys.readouterr().err == "Error: gone\n"

    def test_scale_sends_numbers_by_role(
        self, api: ApiProcess, daemon: Daemon, capsys: pytest.CaptureFixture[str]
    ) -> None:
        daemon.by_op["scale_workers"] = {"decompress": {"before": 2, "wanted": 4}}
        told = ctl(api, capsys, "workers", "scale", "decompress=4", "fetch=0")
        assert told == "decompress: 2 workers, 4 wanted\n"
        assert daemon.asked[-1] == {"op": "scale_workers", "wanted": {"decompress": 4, "fetch": 0}}

    @pytest.mark.parametrize(
        "arguments",
        [["scale"], ["scale", "decompress"], ["scale", "=4"], ["scale", "fetch=-1"], ["upgrade", "fetch=1"]],
    )
    def test_what_is_no_size_is_refused_before_anything_is_asked(
        self, arguments: list[str], api: ApiProcess, daemon: Daemon, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["-S", api.path, "workers", *arguments]) == 2
        assert "decompress=4" in capsys.readouterr().err
        assert daemon.asked == []

    def test_says_where_connections_are_open(
        self, api: ApiProcess, capsys: pytest.CaptureFixture[str], daemon: Daemon
    ) -> None:
        connected = process("fetch", 0, 0, 1) | {"connections": {"registry.example.org": 1, "10.0.0.1:5000": 2}}
        daemon.by_op["workers"] = {"processes": [connected], "uptime": 1}
        assert (
            ctl(api, capsys, "workers")
            .splitlines()[1]
            .endswith("idle, connected to registry.example.org, 10.0.0.1:5000 (2)")
        )


class TestCache:
    def test_map(self, api: ApiProcess, daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
        lines = ctl(api, capsys, "cache", "--map").splitlines()
        assert lines[2:5] == ["", "ab" * 32, "██·↓✗" if screen().unicode else "##.vx"]
        assert {"op": "chunks", "blob_id": ""} in daemon.asked

    def test_no_map_without_a_terminal(self, api: ApiProcess, capsys: pytest.CaptureFixture[str]) -> None:
        assert len(ctl(api, capsys, "cache").splitlines()) == 2

    def test_png(self, api: ApiProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        ctl(api, capsys, "cache", "--png", str(tmp_path / "x.png"))
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")

    def test_png_that_cannot_be_written_is_one_line(
        self, api: ApiProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["-S", api.path, "cache", "--png", str(tmp_path)]) == 1
        assert capsys.readouterr().err == f"Error: --png {tmp_path}: Is a directory\n"

    def test_only_the_blobs_asked_for(
        self, api: ApiProcess, daemon: Daemon, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert len(ctl(api, capsys, "cache", "--map", "--blob", "ac").splitlines()) > 1  # what `chunks` gave is shown
        assert {"op": "chunks", "blob_id": "ac"} in daemon.asked
        assert "ab" * 32 not in ctl(api, capsys, "cache", "--blob", "ac")

    def test_blob_whose_segment_is_gone_has_no_chunks(
        self, api: ApiProcess, daemon: Daemon, capsys: pytest.CaptureFixture[str]
    ) -> None:
        daemon.by_op["chunks"] = {"blobs": [{"blob_id": "x", "segment": "/nydusd.gone"}, {"segment": ""}, 5]}
        assert ctl(api, capsys, "cache", "--map")


class TestTrace:
    def entry(self, trace: Path) -> Json:
        boot = str(IMAGE.bootstrap)
        facts: Json = {"mountpoint": "/", "trace": str(trace), "bootstrap": boot, "path_id": "bootstrap"}
        return {**facts, "extracted": False, "blobs": ["cd" * 32]}

    def test_names_files_in_the_order_of_first_reads(
        self, api: ApiProcess, daemon: Daemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from nydusd.formats import open_bootstrap

        boot = open_bootstrap(memoryview(IMAGE.bootstrap.read_bytes()), "b", "bootstrap")
        inodes = []
        for path in (b"sizes/300K-text", b"dup/a"):
            ino: int | None = boot.root_ino
            for name in path.split(b"/"):
                assert ino is not None
                ino = boot.lookup(ino, name)
            assert ino is not None
            inodes.append(ino)
        (tmp_path / "t").touch()
        writer = Trace(str(tmp_path / "t"))
        for ino, missed in ((inodes[0], True), (inodes[1], False), (1 << 40, False)):
            writer.note(ino, boot.extents(inodes[0], 0, 10), missed)
        daemon.by_op["trace"] = {"images": [self.entry(tmp_path / "t")]}
        lines = ctl(api, capsys, "trace").splitlines()
        assert lines[0].split() == ["TIME", "BLOB", "CHUNKS", "MISS", "FILE"]
        assert [line.split()[3:] for line in lines[1:]] == [
            ["miss", "/sizes/300K-text"],
            ["hit", "/dup/a"],
            ["hit", "?"],
        ]
        assert lines[1].split()[1] == "cd" * 6
        assert ctl(api, capsys, "trace", "--prefetch-list") == "/sizes/300K-text\n/dup/a\n"
        assert '"path":"/dup/a"' in ctl(api, capsys, "--raw", "trace")

    def test_image_that_nobody_read(
        self, api: ApiProcess, daemon: Daemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        daemon.by_op["trace"] = {"images": [self.entry(tmp_path / "none")]}
        assert ctl(api, capsys, "trace", "--prefetch-list") == ""
        assert ctl(api, capsys, "--raw", "trace") == "[]\n"
        assert ctl(api, capsys, "trace") == "no reads were noted since the mount\n"

    def test_image_must_be_named_where_there_are_several(
        self, api: ApiProcess, daemon: Daemon, capsys: pytest.CaptureFixture[str]
    ) -> None:
        daemon.by_op["trace"] = {"images": [{"mountpoint": "/a"}, {"mountpoint": "/b"}]}
        assert main(["-S", api.path, "trace"]) == 1
        assert capsys.readouterr().err == "Error: --mountpoint: name one of /a, /b\n"
        daemon.by_op["trace"] = {"images": []}
        assert main(["-S", api.path, "trace", "--mountpoint", "/c"]) == 1
        assert capsys.readouterr().err == "Error: no image is mounted at /c; `nydusctl info` lists them\n"
        assert daemon.asked[-1] == {"op": "trace", "mountpoint": "/c"}


class TestTop:
    def run(self, api: ApiProcess, capsys: pytest.CaptureFixture[str], turns: int = 1) -> list[str]:
        return ctl(api, capsys, "top", "-i", "0.1", "-n", str(turns)).splitlines()

    def test_shows_what_happened_in_a_turn(
        self, api: ApiProcess, daemon: Daemon, capsys: pytest.CaptureFixture[str]
    ) -> None:
        now = load(hits=30, misses=10, hit_bytes=3 << 20, miss_bytes=1 << 20, errors=2) | {"time": 102.0}
        daemon.by_op["load"] = [load(), now]
        before = {
            "backend_type": "oss",
            "read_count": 5,
            "read_amount_total": 0,
            "read_cumulative_latency_millis_total": 100,
        }
        after = {**before, "read_count": 9, "read_amount_total": 4096, "read_cumulative_latency_millis_total": 300}
        daemon.by_op["metrics_backend"] = [before, after]
        text = "\n".join(self.run(api, capsys))
        assert text.startswith("nydusd RUNNING, up 2 h 1 min, 1 image, 1 blobs, 1 process, ")
        assert "reads    2.0 MiB/s  hit rate 75.0%  hits 15/s  misses 5/s" in text
        assert "4 reads wait, 2.0 KiB in shared memory, prefetch 0/s, failed reads 2" in text
        assert "decompress   1 of 2 workers busy, queued: user 3, ahead 2, prefetch 1" in text
        assert "slowest backend  oss of /: 2.0 requests/s, 2.0 KiB/s, 50.0 ms each" in text

    def test_shows_the_slowest_of_several_backends(
        self, api: ApiProcess, daemon: Daemon, capsys: pytest.CaptureFixture[str]
    ) -> None:
        daemon.by_op["load"] = load() | {"images": ["/a", "/b"]}
        quick = {"backend_type": "q", "read_count": 1, "read_cumulative_latency_millis_total": 1}
        slow = {"backend_type": "s", "read_count": 1, "read_cumulative_latency_millis_total": 1}
        later = {"read_count": 2, "read_cumulative_latency_millis_total": 500}
        daemon.by_op["metrics_backend"] = [slow, quick, slow | later, quick | {"read_count": 2}]
        assert "slowest backend  s of /a:" in "\n".join(self.run(api, capsys))

    def test_says_of_which_images_the_backends_were_asked(
        self, api: ApiProcess, daemon: Daemon, capsys: pytest.CaptureFixture[str]
    ) -> None:
        daemon.by_op["load"] = load() | {"images": [f"/{number}" for number in range(65)]}
        assert "slowest backend (of the first 64 of 65 images)  none was asked" in self.run(api, capsys)

    def test_daemon_that_began_anew_shows_no_negative_rates(
        self, api: ApiProcess, daemon: Daemon, capsys: pytest.CaptureFixture[str]
    ) -> None:
        daemon.by_op["load"] = [load(hits=1000) | {"time": 9000.0}, load(hits=3) | {"time": 1.0}]
        assert "-" not in next(line for line in self.run(api, capsys) if line.startswith("reads")).replace("rate -", "")

    @pytest.mark.parametrize(("columns", "rows"), [(30, 10), (200, 10), (30, 100), (20, 8)])
    def test_no_line_wraps_and_none_is_behind_the_last_row_of_a_terminal(
        self,
        columns: int,
        rows: int,
        api: ApiProcess,
        daemon: Daemon,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr("nydusd.cli.ctl.top.screen", lambda: Screen(True, True, True, columns, rows))
        daemon.by_op["load"] = load() | {"images": [f"/{number}" for number in range(65)]}
        lines = "".join(self.run(api, capsys)).replace("\x1b[H", "").replace("\x1b[J", "").split("\x1b[K")
        assert lines[0].startswith("nydusd RUNNING, up ")
        assert len(lines) <= rows and max(map(len, lines)) <= columns

    def test_image_that_goes_meanwhile_is_no_error(
        self, api: ApiProcess, daemon: Daemon, capsys: pytest.CaptureFixture[str]
    ) -> None:
        daemon.by_op["metrics_backend"] = None
        assert "slowest backend  none was asked" in self.run(api, capsys, turns=2)


@pytest.mark.parametrize("args", [["workers"], ["cache", "--map"], ["trace"], ["top", "-n", "1", "-i", "0.1"]])
def test_missing_and_wrong_fields_are_no_traceback(
    args: list[str], api: ApiProcess, daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong: list[object] = [None, {}, [], [None], [{}], "x", -1, True, [1, "x", None]]
    fields = {op: list(answer) for op, answer in daemon.by_op.items() if isinstance(answer, dict)}
    for value in wrong:
        daemon.by_op = {op: dict.fromkeys(names, value) for op, names in fields.items()}
        main(["-S", api.path, *args])
        assert "Traceback" not in capsys.readouterr().err
