"""The loop of a worker process: take a job from the supervisor, do it, report it.

One job at a time; the supervisor queues. A worker that is killed in mid-job leaves chunks either stored and marked, or not
marked: its job is done again by another. When the supervisor is gone, a worker ends after its job.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
from collections.abc import Callable, Sequence

import zmq

from nydusd import logs, points, proctitle
from nydusd.errors import NydusError, ScarceError, comes_of_want
from nydusd.ipc.messages import DONE, HELLO, JOB, PROTOCOL, Json, decode, encode
from nydusd.ipc.spec import read_spec, supervisor_gone
from workers.blobs import OpenBlobs
from workers.failure import failure, for_want

Handler = Callable[[OpenBlobs, Json], Json]


def _handlers(role: str) -> dict[str, Handler]:
    """The jobs of a role. Imported here so that a process loads only what its role needs."""
    if role == "fetch":
        from workers.checkpoint import checkpoint, forget_deleted
        from workers.cookie import copy_bootstrap, cull
        from workers.evict import evict, survey
        from workers.fetch import fetch
        from workers.inspect import compare_tables, find_folder, inspect_image
        from workers.prepare import prepare
        from workers.resolve import resolve
        from workers.split import list_image, split_image

        return {
            "fetch": fetch,
            "prepare": prepare,
            "checkpoint": checkpoint,
            "forget_deleted": forget_deleted,
            "resolve": resolve,
            "inspect": inspect_image,
            "compare_tables": compare_tables,
            "find_folder": find_folder,
            "survey": survey,
            "evict": evict,
            "copy_bootstrap": copy_bootstrap,
            "cull": cull,
            "split_image": split_image,
            "list_image": list_image,
        }
    from workers.fill import fill

    return {"fill": fill}


def main(argv: Sequence[str]) -> int:
    spec = read_spec(argv)
    role = str(spec["role"])
    title = f"{role} {spec['index']}"
    proctitle.set_title(title)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logs.setup_child(spec["log"], title)
    log = logging.getLogger(__name__)
    handlers = _handlers(role)
    blobs = OpenBlobs(int(spec.get("shared_fd", -1)))
    lifeline = int(spec["lifeline_fd"])
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, str(spec["identity"]).encode())
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(str(spec["work"]))
    socket.send_multipart([HELLO, encode({"role": role, "pid": os.getpid(), "protocol": PROTOCOL})])
    poller = zmq.Poller()
    poller.register(socket, zmq.POLLIN)
    poller.register(lifeline, zmq.POLLIN)
    lacking = False
    while True:
        events = dict(poller.poll())
        if socket in events:
            kind, body = socket.recv_multipart()
            if kind == JOB:
                job = decode(body)
                points.reach("worker: job taken")
                answer = _run(handlers, blobs, job, log.exception)
                if not _is_for_want(answer):
                    lacking = False
                else:
                    if not lacking:  # readers may try again and again: it is said once
                        log.warning(
                            "no file descriptor is left, or no memory: letting go of what was kept open, and doing the job"
                            " again"
                        )
                    lacking = True
                    blobs.let_go()
                    answer = _run(handlers, blobs, job, log.exception)
                    if _is_for_want(answer) and "retry_after" not in answer:
                        answer |= for_want(str(answer.get("error") or answer["failed"][0][2]))
                if connections := blobs.connections():
                    answer["connections"] = connections
                if routes := blobs.take_routes():
                    answer["routes"] = routes
                points.reach("worker: job done")
                socket.send_multipart([DONE, encode(answer | {"id": job["id"]})])
                points.reach("worker: job reported")
        elif supervisor_gone(lifeline):
            return 0


def _is_for_want(answer: Json) -> bool:
    """Whether a job has failed, wholly or in part, for want of file descriptors or memory. Libraries do not always say so."""
    failed = "error" in answer or answer.get("failed")
    return bool(failed) and (answer.get("type") == ScarceError.__name__ or _no_fd_left())


def _no_fd_left() -> bool:
    """Whether this process, or the machine, can open nothing more (EMFILE, ENFILE)."""
    try:
        os.close(os.dup(0))
    except OSError as e:
        return e.errno in (errno.EMFILE, errno.ENFILE)
    return False


def _run(handlers: dict[str, Handler], blobs: OpenBlobs, job: Json, complain: Callable[[str], None]) -> Json:
    """Do one job. This is the border where an unexpected exception becomes an answer, with its traceback logged."""
    try:
        blobs.learn(job)
        return handlers[job["kind"]](blobs, job)
    except NydusError as e:
        if e.traceback:
            complain(f"job {job['kind']} of blob {job.get('handle')} failed by a bug of ours")
        return failure(e)
    except Exception as e:
        if comes_of_want(e):
            return for_want(str(e) or type(e).__name__)
        complain(f"job {job['kind']} of blob {job.get('handle')} failed by a bug of ours")
        return {"error": f"internal error: {e!r}", "errno": NydusError.errno, "type": "InternalError"}
