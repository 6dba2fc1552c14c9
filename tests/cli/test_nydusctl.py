"""`nydusctl` against a real API process."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nydusd.cli.nydusctl import main
from nydusd.control.routes import ROUTES
from nydusd.version import version_text
from tests.support.api import ApiProcess, Json

BLOB = {
    "blob_id": "c0ef" * 16,
    "mountpoint": "/",
    "chunks": 3000,
    "ready": 2999,
    "pending": 1,
    "failed": 0,
    "uncompressed_size": 12_000_000,
    "ready_bytes": 11_996_000,
    "compressed_size": 5_000_000,
    "hits": 7,
    "hit_bytes": 70,
    "misses": 8,
    "miss_bytes": 80,
    "errors": 0,
    "data_file": "/c/x",
    "state": "ready",
    "reason": None,
}
BROKEN = {**BLOB, "blob_id": "ab", "chunks": 0, "ready": 0, "state": "failed", "reason": "no\nblob"}
INFO: Json = {
    "version": {"package_ver": "9", "git_commit": "abc", "build_time": "t", "profile": "release", "rustc": "r"},
    "id": None,
    "supervisor": None,
    "state": "RUNNING",
    "backend_collection": {
        "/": {
            "backend_type": "Rafs",
            "mountpoint": "/",
            "mounted_time": "2026-11-24 01:57:41.436886358 +00:00:00",
            "config": {"rafs": {"mode": "direct", "prefetch": {"enable": True, "batch_size": 1048576}}},
        },
        "/p": {"backend_type": "PassthroughFs", "mountpoint": "/p", "mounted_time": "x", "config": None},
    },
}
BACKEND: Json = {
    "backend_type": "localfs",
    "read_count": 2,
    "read_errors": 0,
    "read_amount_total": 756539,
    "read_cumulative_latency_millis_total": 10,
    "read_cumulative_latency_millis_dist": [0, 0, 0, 0, 0, 0, 10, 0],
    "read_count_block_size_dist": [0, 0, 0, 1, 0, 0, 1, 0],
}
BLOBCACHE: Json = {
    "underlying_files": ["c0ef.blob.data"],
    "store_path": "CACHE",
    "partial_hits": 39,
    "whole_hits": 0,
    "total": 40,
    "entries_count": 2994,
    "prefetch_data_amount": 4096,
    "prefetch_requests_count": 2,
    "prefetch_workers": 1,
    "prefetch_unmerged_chunks": 0,
    "prefetch_cumulative_time_millis": 50,
    "prefetch_begin_time_secs": 10,
    "prefetch_begin_time_millis": 900,
    "prefetch_end_time_secs": 12,
    "prefetch_end_time_millis": 100,
    "data_all_ready": False,
}
METRICS: Json = {
    "id": "/",
    "data_read": 900533,
    "block_count_read": [34, 0, 0, 3, 0, 3, 0, 0],
    "fop_hits": [2, 0, 0, 0, 40, 0, 0, 0, 0, 47, 72, 67, 0, 0, 0],
    "fop_errors": [0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    "read_latency_dist": [37, 2, 0, 0, 1, 0, 0, 0],
}
ANSWERS: dict[str, Json] = {
    "daemon": INFO,
    "cache": {"blobs": [BLOB, BROKEN]},
    "metrics_backend": BACKEND,
    "metrics_blobcache": BLOBCACHE,
    "metrics": METRICS,
    "set_log_level": {},
}


class Answers:
    """What the supervisor says; a test may change it."""

    def __init__(self) -> None:
        self.by_op = dict(ANSWERS)

    def __call__(self, request: Json) -> Json:
        data = self.by_op.get(str(request["op"]))
        return {"error": {"status": 404, "message": "gone"}} if data is None else {"ok": data}


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def api(tmp_path: Path, answers: Answers) -> Iterator[ApiProcess]:
    with ApiProcess(tmp_path, answers) as process:
        yield process


def ctl(api: ApiProcess, *args: str, capsys: pytest.CaptureFixture[str]) -> str:
    status = main(["-S", api.path, *args])
    printed = capsys.readouterr()
    assert (status, printed.err) == (0, "")
    return printed.out


def test_info(api: ApiProcess, capsys: pytest.CaptureFixture[str]) -> None:
    assert ctl(api, "info", capsys=capsys).splitlines() == [
        'Version:  "9"',
        'Status:   "RUNNING"',
        'Profile:  "release"',
        'Commit:   "abc"',
        "",
        "Instances:",
        "Mountpoint:             /",
        "Type:                   Rafs",
        "Mounted Time:           2026-11-24 01:57:41.436886358 +00:00:00",
        "Mode:                   direct",
        "Prefetch:               true",
        "Prefetch Merging Size:  1048576",
        "",
        "Mountpoint:    /p",
        "Type:          PassthroughFs",
        "Mounted Time:  x",
        "",
    ]


def test_cache_table_is_aligned(api: ApiProcess, capsys: pytest.CaptureFixture[str]) -> None:
    head, one, two = ctl(api, "cache", capsys=capsys).splitlines()
    assert head.split() == ["BLOB", "CHUNKS", "READY", "%", "BYTES", "OF", "HITS", "MISSES", "ERRORS", "STATE"]
    # 2999 of 3000 is not 100 %.
    assert one.split() == [str(BLOB["blob_id"]), "3000", "2999", "99.9", "11996000", "12000000", "7", "8", "0", "ready"]
    assert two.split()[:4] == ["ab", "0", "0", "-"]
    assert two.endswith("failed: no\\nblob")
    assert head.index("STATE") == one.index("ready") == two.index("failed")
    assert head.index("READY") + len("READY") == one.index("2999") + 4


def test_metrics_backend(api: ApiProcess, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ctl(api, "metrics", "backend", capsys=capsys).splitlines()
    assert "Backend Type:         localfs" in lines
    assert [line.split() for line in lines if line.startswith("512K~")] == [["512K~", "1", "10", "10.0"]]


def test_metrics_cache(api: ApiProcess, capsys: pytest.CaptureFixture[str]) -> None:
    rows = dict(line.split(":", 1) for line in ctl(api, "metrics", "cache", capsys=capsys).splitlines())
    assert {name: value.strip() for name, value in rows.items()} == {
        "Partial Hits": "39",
        "Whole Hits": "0",
        "Total Reads": "40",
        "Hit Ratio": "97.5%",
        "Chunks Ready": "2994",
        "All Data Ready": "false",
        "Directory": "CACHE",
        "Files": "c0ef.blob.data",
        "Prefetch Workers": "1",
        "Prefetch Amount (bytes)": "4096",
        "Prefetch Requests": "2",
        "Prefetch Unmerged Chunks": "0",
        "Prefetch Average Size (bytes)": "2048",
        "Prefetch Average Latency (s)": "0.025",
        "Prefetch Duration (s)": "1.200",
    }


def test_metrics_fsstats(api: ApiProcess, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ctl(api, "metrics", "fsstats", capsys=capsys).splitlines()
    assert "Read Errors:  5" in lines
    assert ["Readdir", "72", "0"] in [line.split() for line in lines]
    assert ["<=1ms", "2"] in [line.split() for line in lines]


@pytest.mark.parametrize("verb", ["backend", "cache", "fsstats"])
def test_metrics_of_one_image_of_several(
    verb: str, api: ApiProcess, answers: Answers, capsys: pytest.CaptureFixture[str]
) -> None:
    ctl(api, "metrics", verb, "-m", "/b", capsys=capsys)
    (asked,) = api.supervisor.asked
    assert asked["id"] == "/b"
    answers.by_op = {"load": {"images": ["/a", "/b"]}}
    why = "Error: --mountpoint: name one of /a, /b\n"
    assert failure(api.path, "metrics", verb, capsys=capsys) == why
    assert failure(api.path, "metrics", verb, "--mountpoint", "/c", capsys=capsys) == why
    answers.by_op = {"load": {"images": []}}
    assert "NoCounter" in failure(api.path, "metrics", verb, capsys=capsys)


@pytest.mark.parametrize(
    ("args", "op"),
    [
        (["info"], "daemon"),
        (["cache"], "cache"),
        (["metrics", "backend"], "metrics_backend"),
        (["metrics", "cache"], "metrics_blobcache"),
        (["metrics", "fsstats"], "metrics"),
    ],
)
def test_raw_is_the_answer_on_one_line(
    args: list[str], op: str, api: ApiProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    for asked in (["--raw", *args], [*args, "-r"], [args[0], "--raw", *args[1:]], ["-r", *args, "--raw"]):
        (line,) = ctl(api, *asked, capsys=capsys).splitlines()
        assert json.loads(line) == ANSWERS[op]


def test_set_log_level(api: ApiProcess, capsys: pytest.CaptureFixture[str]) -> None:
    assert ctl(api, "set", "log-level", "WARN", capsys=capsys) == ""
    assert api.supervisor.asked == [{"op": "set_log_level", "log_level": "warn"}]
    assert 0 < api.supervisor.patience[0] <= 5


@pytest.mark.parametrize(
    "args", [["info"], ["cache"], ["metrics", "backend"], ["metrics", "cache"], ["metrics", "fsstats"]]
)
def test_missing_and_wrong_fields_are_no_error(
    args: list[str], api: ApiProcess, answers: Answers, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong: list[object] = [None, {}, [], "x", -1, True, [1, "x", None]]
    for value in wrong:
        answers.by_op = {op: dict.fromkeys(fields, value) for op, fields in ANSWERS.items()}
        ctl(api, *args, capsys=capsys)
    answers.by_op = {op: {} for op in ANSWERS}
    ctl(api, *args, capsys=capsys)


def test_intervals(
    api: ApiProcess, answers: Answers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            raise KeyboardInterrupt
        if len(naps) == 1:
            more = {"read_amount_total": 756539 + 4096, "read_count": 4, "read_cumulative_latency_millis_total": 13}
            answers.by_op["metrics_backend"] = {**BACKEND, **more}

    monkeypatch.setattr("nydusd.cli.ctl.metrics_backend.time.sleep", nap)
    assert main(["-S", api.path, "metrics", "backend", "-I", "2"]) == 130
    assert naps == [2.0, 2.0, 2.0]
    assert capsys.readouterr().out.splitlines() == [
        "bandwidth 2.0 KiB/s, average request 2.0 KiB, average latency 1.5 ms",
        "bandwidth 0.0 KiB/s, average request 0.0 KiB, average latency 0.0 ms",
    ]


def failure(path: str, *args: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["-S", path, *args]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


def test_error_of_the_daemon_is_one_line(api: ApiProcess, answers: Answers, capsys: pytest.CaptureFixture[str]) -> None:
    answers.by_op.clear()
    assert failure(api.path, "metrics", "cache", capsys=capsys) == (
        "Error: GET /api/v1/metrics/blobcache: status 404: BlobcacheMetrics(Metrics(Stats(NoCounter)))\n"
    )


def test_no_daemon_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "s")
    assert (
        failure(path, "info", capsys=capsys) == f"Error: {path}: no such socket: was the daemon started with this "
        "--apisock? `nydusctl list` names those of all daemons\n"
    )
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
        assert failure(path, "info", capsys=capsys) == (
            f"Error: {path}: nobody listens: the daemon has ended, or is being started again\n"
        )
    long = "/" + "x" * 200
    assert failure(long, "info", capsys=capsys).startswith(f"Error: {long}: cannot talk to the daemon: ")


def test_whoever_may_not_use_the_socket_is_told_who_may(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.chmod(tmp_path, 0o755)
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen()
        command = [sys.executable, "-m", "nydusd.cli.nydusctl", "-S", path, "info"]
        done = subprocess.run(command, capture_output=True, text=True, user=65534, group=65534, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (
        1,
        f"Error: {path}: permission denied: run nydusctl as the daemon's user (root)\n",
    )


def test_without_a_socket_there_is_a_way_to_find_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["info"])
    assert ended.value.code == 2
    assert "-S/--sock (`nydusctl list` names those of all daemons)" in capsys.readouterr().err


def test_version_names_the_build(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["-V"])
    assert (ended.value.code, capsys.readouterr().out) == (0, version_text("nydusctl"))


@contextmanager
def something_else(path: str, says: bytes) -> Iterator[None]:
    """A server at `path` that answers one connection with fixed bytes."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(says)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join(30)


@pytest.mark.parametrize(
    "says",
    [
        b"",
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 \r\nContent-Length: 50\r\n\r\nshort",
        b"HTTP/1.1 200 \r\nContent-Length: 3\r\n\r\n\xff\n{",
        b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\n[]",
        b"HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 500 \r\nContent-Length: 9\r\n\r\n\x1b[2J\nevil",
        b"HTTP/1.1 200 \r\nContent-Length: 100000\r\n\r\n" + b"[" * 100_000,
    ],
)
def test_server_that_is_no_daemon_is_one_line(tmp_path: Path, says: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "s")
    with something_else(path, says):
        assert "\x1b" not in failure(path, "info", capsys=capsys)


@pytest.mark.parametrize(
    "args", [[], ["info"], ["-S", "x"], ["-S", "x", "set", "log-level", "loud"], ["-S", "x", "boo"]]
)
def test_wrong_arguments(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(args)
    assert status.value.code == 2
    assert "usage: nydusctl" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "x", "1e9"])
def test_wrong_interval(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["-S", "x", "metrics", "backend", "-I", seconds])
    assert "must be seconds from 0.1 to 86400" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["", "x", "1X", "K", "-1", "1" * 5000])
def test_wrong_size(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["-S", "x", "cache", "gc", "--to", size])
    assert (ended.value.code, "--to: must be a number of bytes" in capsys.readouterr().err) == (2, True)


def test_a_mount_is_waited_for_as_long_as_the_api_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []

    def silent(connection: http.client.HTTPConnection, *_: object) -> None:
        assert connection.timeout is not None
        waits.append(connection.timeout)
        raise TimeoutError

    monkeypatch.setattr(http.client.HTTPConnection, "request", silent)
    (tmp_path / "c").write_text("")
    for args in (["mount", "-s", "x", "-c", str(tmp_path / "c"), "-m", "/x"], ["umount", "-m", "/x"]):
        assert main(["-S", "x", *args]) == 1
        assert capsys.readouterr().err == f"Error: x: no answer within {waits[-1]:g} s\n"
        for method in ("POST", "DELETE"):
            patience = ROUTES["/api/v1/mount"][method].patience
            assert patience is not None and waits[-1] > patience


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("module", "args"),
    [("nydusctl", ["info"]), ("nydusctl", ["-h"]), ("nydusctl", ["-V"]), ("nydusd", ["--help"]), ("nydusd", ["-V"])],
)
def test_output_that_cannot_be_written_is_no_traceback(
    module: str, args: list[str], unbuffered: str, api: ApiProcess
) -> None:
    command = [sys.executable, "-m", f"nydusd.cli.{module}", *args]
    if module == "nydusd":
        command = [sys.executable, "-c", "import sys; from nydusd.cli.nydusd import main; sys.exit(main())", *args]
    elif args == ["info"]:
        command[3:] = ["-S", api.path, "info"]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    out, pipe = os.pipe()
    os.close(out)
    done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, env=environment, timeout=60, check=False)
    os.close(pipe)
    assert (done.returncode, done.stderr) == (1, b""), "its reader has left"
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, b"Error: standard output: No space left on device\n")


def test_what_is_not_unicode_or_not_of_the_locale_is_no_traceback(api: ApiProcess, answers: Answers) -> None:
    command = [sys.executable, "-m", "nydusd.cli.nydusctl", "-S", api.path]
    answers.by_op["umount"] = {}
    assert subprocess.run([*command, "umount", "-m", b"/\xff"], timeout=60, check=False).returncode == 0
    assert api.supervisor.asked == [{"op": "umount", "mountpoint": "/\ufffd"}]
    answers.by_op["daemon"] = {"backend_collection": {"/\u00e4": {}}}
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    shown = subprocess.run([*command, "info"], capture_output=True, env=environment, timeout=60, check=False)
    assert (shown.returncode, b"/\\xe4" in shown.stdout) == (0, True)
