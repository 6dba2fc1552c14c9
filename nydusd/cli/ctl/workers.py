"""`nydusctl workers`: the processes of the daemon; upgrade or scale its workers (/api/v1/nydusd/workers; ours only).

One line a process: its role and number, pid, generation (how many processes this place has had), which build it runs, what
it does, how many jobs it has done, and its memory: RSS, and PSS, in which shared pages count for their share only. Behind
what it does stands where it has connections open, as of the end of its last job. Where several daemons share the workers of
a node: how many there may be, how many there are, and, while this daemon waits for one, who has them.

`upgrade` starts new workers with the code that is on disk now, tries them, and gives them the jobs; those of before do the jobs
that they have and end. If the new ones are no good, nothing changes, the error says why, and the exit status is 1.

`scale ROLE=N` has N workers of a role (fetch, decompress) from now on, 1 to 128; 0 stands for as many as are configured. It
is kept until the daemon is stopped, also by a supervisor's successor.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping

from nydusd.cli.ctl.connection import Api, RequestFailed
from nydusd.cli.ctl.text import (
    MISSING,
    count_of_processes,
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
from nydusd.errors import ConfigError

PATH = "/api/v1/nydusd/workers"
HEAD = ("PROCESS", "PID", "GENERATION", "JOBS", "RSS", "PSS", "BUILD", "STATE")
ALONE = ("supervisor", "stub", "api")
"""Roles of which there is one process."""
_STOPPED = ("T", "t")
_UPGRADE_PATIENCE = 130.0
_WHY = re.compile(r'Other\((".*")\)', re.DOTALL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        nargs="?",
        choices=("upgrade", "scale"),
        help="upgrade: new workers with the code on disk; scale: more or fewer",
    )
    parser.add_argument("sizes", nargs="*", metavar="ROLE=N", help="with scale: how many workers of which role")


def run(api: Api, args: argparse.Namespace) -> Iterator[str]:
    if bool(args.sizes) != (args.action == "scale"):
        raise ConfigError("workers: `scale` takes ROLE=N, for instance decompress=4; nothing else does")
    if args.action is None:
        yield from _show(api, args)
        return
    try:
        answer = _upgrade(api) if args.action == "upgrade" else api.put(PATH, dict(map(_size, args.sizes)))
    except RequestFailed as e:
        why = _WHY.search(str(e))
        raise RequestFailed(json.loads(why[1]) if why else str(e)) from e
    if args.raw:
        yield one_line(answer)
    elif args.action == "upgrade":
        seconds, checked = number_at(answer, "seconds"), text_at(answer, "checked")
        yield f"{text_at(answer, 'workers')} workers of build {text_at(answer, 'from')} were replaced in {seconds:.1f} s"
        yield f"they are of build {text_at(answer, 'to')} now; tried: {checked}"
    else:
        for role, row in answer.items():
            yield f"{printable(role)}: {text_at(row, 'before')} workers, {text_at(row, 'wanted')} wanted"


def _upgrade(api: Api) -> dict[str, object]:
    return api.with_patience(_UPGRADE_PATIENCE).put(f"{PATH}/upgrade", None)


def _size(text: str) -> tuple[str, int]:
    role, _, count = text.partition("=")
    if not role or not count.isdecimal():
        raise ConfigError(f"workers: scale: {text!r} is not ROLE=N, for instance decompress=4")
    return role, int(count)


def _show(api: Api, args: argparse.Namespace) -> Iterator[str]:
    answer = api.get(PATH)
    if args.raw:
        yield one_line(answer)
        return
    processes = list_at(answer, "processes")
    yield table(HEAD, [_row(process) for process in processes])
    pss = sum(number_at(process, "pss_bytes") for process in processes)
    yield f"\n{count_of_processes(processes)}, {size(pss)} PSS in all, up {duration(number_at(answer, 'uptime'))}"
    yield from _seats(table_at(answer, "seats"), number_at(answer, "supervisor"))


def _seats(seats: Mapping[str, object], own: float) -> Iterator[str]:
    """How the workers are shared out among the daemons of the node, if there are others."""
    node = table_at(seats, "node")
    for role, row in table_at(node, "roles").items():
        there, taken, waiting = (f"{number_at(row, key):.0f}" for key in ("seats", "taken", "waiting"))
        yield f"node: {printable(role)}: {taken} of {there} seats taken, {waiting} daemons wait for their first"
        if not number_at(table_at(table_at(seats, "roles"), role), "want"):
            continue
        held = [
            f"pid {text_at(daemon, 'pid')} ({number_at(part, 'have'):.0f}{', late' if text_at(part, 'late') == 'true' else ''})"
            for daemon in list_at(node, "active")
            if number_at(part := table_at(daemon, role), "have") and number_at(daemon, "pid") != own
        ]
        yield f"      this daemon waits for one; they are held by {', '.join(held) or 'nobody else'}"


def _row(process: object) -> list[str]:
    role = text_at(process, "role")
    return [
        role if role in ALONE else f"{role} {text_at(process, 'index')}",
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
    if state == "restarting" and (deaths := number_at(process, "deaths")):
        text += f" in {number_at(process, 'starts_in'):.1f} s, after {deaths:.0f} early deaths"
    open_now = table_at(process, "connections")
    hosts = [printable(host) + (f" ({number})" if number != 1 else "") for host, number in open_now.items()]
    return f"{text}, connected to {', '.join(hosts)}" if hosts else text


VERB = Verb(("workers",), "the processes of the daemon; upgrade or scale its workers", run, add_arguments)
