"""Real worker processes, with a supervisor that the test plays."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from nydusd.ipc.messages import DONE, HELLO, JOB, PROTOCOL, Json, decode, encode
from nydusd.ipc.spec import write_spec
from nydusd.storage.state.segment import READY
from tests.support.discipline import discipline
from tests.support.scarce import no_fd_left
from tests.workers.harness import Jobs, jobs

SECONDS = 60.0


class Worker:
    """A worker process and the supervisor's end of its line."""

    def __init__(self, folder: Path, role: str) -> None:
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.setsockopt(zmq.RCVTIMEO, int(SECONDS * 1000))
        endpoint = f"ipc://{folder}/work-{role}"
        self._router.bind(endpoint)
        out, self.lifeline = os.pipe()
        self.log = discipline.log_folder / f"worker-{uuid.uuid4().hex[:12]}.log"
        self.log.touch()
        discipline.logs.watch(self.log)
        spec = {
            "role": role,
            "index": 3,
            "identity": f"{role}-3-1",
            "work": endpoint,
            "lifeline_fd": out,
            "log": {"level": "info", "file": str(self.log)},
        }
        fd = write_spec(spec)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "workers", "--spec-fd", str(fd)], pass_fds=[fd, out], stdin=subprocess.DEVNULL
        )
        os.close(fd)
        os.close(out)
        identity, kind, body = self._router.recv_multipart()
        assert (identity, kind) == (f"{role}-3-1".encode(), HELLO)
        assert decode(body) == {"role": role, "pid": self.process.pid, "protocol": PROTOCOL}
        self._identity = identity

    def do(self, job: Json) -> Json:
        self._router.send_multipart([self._identity, JOB, encode(job | {"id": 5})])
        _, kind, body = self._router.recv_multipart()
        assert kind == DONE
        answer = decode(body)
        assert answer.pop("id") == 5
        return answer

    def close(self) -> None:
        if self.lifeline >= 0:
            os.close(self.lifeline)
        self.process.kill()
        self.process.wait(SECONDS)
        discipline.logs.end(self.log)
        self._router.close()
        self._context.term()


@pytest.fixture
def image(folder: Path) -> Iterator[Jobs]:
    with jobs("v6-lz4-sha256", folder) as made:
        yield made


@pytest.fixture
def fetch(folder: Path) -> Iterator[Worker]:
    worker = Worker(folder, "fetch")
    yield worker
    worker.close()


@pytest.fixture
def decompress(folder: Path) -> Iterator[Worker]:
    worker = Worker(folder, "decompress")
    yield worker
    worker.close()


def test_blob_is_prepared_filled_and_stored_by_processes(image: Jobs, fetch: Worker, decompress: Worker) -> None:
    answer = fetch.do(image.job(kind="prepare"))
    count = answer["count"]
    assert answer["ready"] == 0
    job = image.job(kind="fill", chunks=list(range(count)), verify=[], slot=None, source=None)
    assert decompress.do(job)["failed"] == []
    assert decompress.do({key: value for key, value in job.items() if key != "spec"})["reads"] == 0
    assert set(image.states()) == {READY}
    assert image.wrong_files() == []
    assert fetch.do(image.job(kind="checkpoint")) == {"stored": count}


def test_error_comes_back_with_its_class_and_errno(image: Jobs, fetch: Worker, decompress: Worker) -> None:
    assert fetch.do(image.job(kind="prepare"))["ready"] == 0
    image.data.unlink()
    answer = decompress.do(image.job(kind="fill", chunks=[0], verify=[], slot=None, source=None))
    assert (answer["type"], answer["errno"]) == ("StaleCacheError", errno.EIO)
    assert str(image.data) in answer["error"]


def test_job_that_lacks_file_descriptors_is_one_for_later_and_that_is_said_once(
    image: Jobs, fetch: Worker, decompress: Worker
) -> None:
    """Whether it is the segment that cannot be opened, or the stored blob."""
    count = fetch.do(image.job(kind="prepare"))["count"]
    job = image.job(kind="fill", chunks=list(range(count)), verify=[], slot=None, source=None)
    for spare in (0, 0, 1, 1):
        with no_fd_left(decompress.process.pid, spare):
            answer = decompress.do(job)
            assert (answer["type"], answer["retry_after"]) == ("ScarceError", 0.0)
            assert re.search("Too many open files|maximum number of files open", answer["error"])
    assert decompress.log.read_text().count("no file descriptor is left") == 1
    assert decompress.do(job)["failed"] == []
    assert image.wrong_files() == []


def test_worker_survives_our_bugs_and_logs_them(image: Jobs, fetch: Worker, expect_log: Callable[..., None]) -> None:
    expect_log("by a bug of ours", "Traceback")
    for job in ({"kind": "nonsense", "handle": 7}, {"kind": "prepare", "handle": 99}, {"kind": "prepare"}):
        answer = fetch.do(job)
        assert answer["type"] == "InternalError" and answer["errno"] == errno.EIO
    assert fetch.log.read_text().count("Traceback") == 3
    assert fetch.do(image.job(kind="prepare"))["ready"] == 0


def test_worker_ends_when_its_supervisor_has(fetch: Worker) -> None:
    os.close(fetch.lifeline)
    fetch.lifeline = -1
    assert fetch.process.wait(SECONDS) == 0


def test_worker_loads_only_what_its_role_needs(decompress: Worker) -> None:
    with open(f"/proc/{decompress.process.pid}/maps") as maps:
        loaded = maps.read()
    assert "cryptography" not in loaded, "only an encrypted blob needs it"
