"""`nydusctl workers`: the processes of the daemon (GET /api/v1/nydusd/workers; this implementation only).

One line a process: its role and number, pid, generation (how many processes this place has had), which build it runs, what
it does, how many jobs it has done, and its memory: RSS, and PSS, in which shared pages count for their share only. Behind
what it does stands where it has connections open, as of the end of its last job.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from nydusd.cli.ctl.connection import Api
from nydusd.cli.ctl.text import (
    MISSING,
    duration,
    list_at,
    number_at,
    one_line,
    printable,
    size,
    table,
    table_at,
    text_at,
)
from nydusd.cli.ctl.verb import Verb

PATH = "/api/v1/nydusd/workers"
HEAD = ("PROCESS", "PID", "GENERATION", "JOBS", "RSS", "PSS", "BUILD", "STATE")
_STOPPED = ("T", "t")


def run(api: Api, args: argparse.Namespace) -> Iterator[str]:
    answer = api.get(PATH)
    if args.raw:
        yield one_line(answer)
        return
    processes = list_at(answer, "processes")
    yield table(HEAD, [_row(process) for process in processes])
    pss = sum(number_at(process, "pss_bytes") for process in processes)
    yield f"\n{len(processes)} processes, {size(pss)} PSS in all, up {duration(number_at(answer, 'uptime'))}"


def _row(process: object) -> list[str]:
    role = text_at(process, "role")
    return [
        role if role in ("supervisor", "api") else f"{role} {text_at(process, 'index')}",
        text_at(process, "pid"),
        text_at(process, "generation"),
        text_at(process, "jobs"),
        _size_at(process, "rss_bytes"),
        _size_at(process, "pss_bytes"),
        text_at(process, "commit"),
        state_of(process),
    ]


def _size_at(process: object, key: str) -> str:
    return MISSING if text_at(process, key) == MISSING else size(number_at(process, key))


def state_of(process: object) -> str:
    """What a process does, in words."""
    state, job = text_at(process, "state"), text_at(process, "busy")
    if text_at(process, "kernel_state") in _STOPPED:
        state = "stopped"
    text = state if job == MISSING else f"{state}: {job}"
    open_now = table_at(process, "connections")
    hosts = [printable(host) + (f" ({number})" if number != 1 else "") for host, number in open_now.items()]
    return f"{text}, connected to {', '.join(hosts)}" if hosts else text


VERB = Verb(("workers",), "the processes of the daemon, what they do and what memory they take", run)
