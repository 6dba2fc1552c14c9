"""Taking over from a supervisor that was killed: its front ends go on serving, and the next one gets all that they need.

Runs in the supervisor, in its first moments. What it works from: `state.json` of the run-time folder (which front ends there
were, under which numbers they have the session's file descriptors), the table of mounts with its records, and the living front
ends, several of which hold the fds of each lane. Nothing is taken over of a mount that is over, that is another one's, or that
was made with other parameters: `take_over` says why not, and the daemon then ends what is left and mounts anew.

What holds after SIGKILL in the middle: nothing here changes what the next one needs. The record of the former supervisor
is replaced, at once, when the fds are ours.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import signal
import stat
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from nydusd import points
from nydusd.errors import MountError, NydusError
from nydusd.frontends.fuse import journal
from nydusd.frontends.fuse.session import Lane, Negotiated, Session, clone
from nydusd.ipc.borrow import memories_of
from nydusd.ipc.messages import Json
from nydusd.storage.state.lock import start_time
from nydusd.supervisor.ends import end_together
from nydusd.supervisor.handover import FUSE_DEVICE, READABLE_BY, VERSION, why_unknown
from nydusd.supervisor.mount_records import Recorded, readable
from nydusd.supervisor.mount_table import MountTable
from nydusd.supervisor.orphans import Orphan
from nydusd.waits import DEAF, EndedError, Told

if TYPE_CHECKING:
    from nydusd.cli.options import FuseOptions
    from nydusd.config import Config
    from nydusd.forkserver.client import ForkServer
    from nydusd.supervisor.children import Child
    from nydusd.supervisor.fd_store import FdStore
    from nydusd.supervisor.handover import Sent

log = logging.getLogger(__name__)

_KEEPER_SECONDS = 20.0
"""How long a fork server that was started in a supervisor's last moment may take to have what it was given."""
_LOOK_SECONDS = 0.01


class _Lane(msgspec.Struct, array_like=True):
    """The numbers of a lane's fds in one process, and the inode of its journal."""

    fd: int
    journal: int
    interrupt_in: int
    interrupt_out: int
    inode: int


class _Holder(msgspec.Struct):
    """A front end ("fuse"), or a fork server, which holds the fds of all lanes ("keeper") or is about to ("starting").

    Of the last it is known only that it must be ended: it may die with its supervisor and never have had them.
    """

    role: str
    index: int
    generation: int
    pid: int
    start: int
    commit: str
    lanes: list[_Lane]


class _Mounted(msgspec.Struct):
    device: str
    minor: int
    flags: int
    max_readahead: int


class _Record(msgspec.Struct):
    """What is read of `state.json`; `lanes` are the numbers in the supervisor, and so in each process that it started."""

    version: int
    term: int
    parameters: str
    session: _Mounted
    lanes: list[_Lane]
    holders: list[_Holder]


class FrontEnd(NamedTuple):
    """A front end that outlived its supervisor. `lanes`: its numbers of the fds, to be recorded again."""

    number: int
    generation: int
    commit: str
    process: Orphan
    lanes: list[_Lane]


class Former(NamedTuple):
    """What a killed supervisor has left. `term`: that of its successor; `keepers`: its fork servers, pid and start time."""

    term: int
    session: Session
    table: MountTable
    records: list[Recorded]
    frontends: list[FrontEnd]
    keepers: list[tuple[int, int]]
    record: _Record

    def end_keepers(self, ours: Sequence[int], told: Told) -> None:
        """What they hold is held by our processes, `ours`, too: end them, and what they made in their last moment.

        Raises EndedError when `told` to end while it waits: what was noted before names all who may have it, ours too.
        """
        end_together(self.keepers, told)
        _end_strangers(self.record, [*ours, *(frontend.process.pid for frontend in self.frontends)], told)


class NotThereError(NydusError):
    """There is nobody to take over from."""


def parameters(options: FuseOptions, config: Config) -> str:
    """What must be the same for a mount to be taken over: the image, and how it is read. Credentials and tuning may differ."""
    from nydusd.config import redacted

    shown = redacted(config)
    what = {
        "bootstrap": None if options.bootstrap is None else os.path.abspath(options.bootstrap),
        "place": options.virtual_mountpoint,
        "kind": type(options).__name__,
        "config": {key: value for key, value in shown.items() if key not in ("nydusd", "unknown_keys", "warnings")},
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def record_of(session: Session, what: str, children: Sequence[Child], fork_server: ForkServer) -> Json:
    """What a successor must know. `what` are the parameters; a fork server holds all fds under our numbers."""
    lanes = [[*lane, os.fstat(lane.journal).st_ino] for lane in session.lanes]
    holders = [
        {
            "role": child.role,
            "index": child.index,
            "generation": child.generation,
            "pid": child.pid,
            "start": start_time(child.pid) if child.adopted is None else child.adopted.process.start,
            "commit": child.commit,
            "lanes": lanes if child.adopted is None else msgspec.to_builtins(child.adopted.lanes),
        }
        for child in children
        if child.role == "fuse" and child.pid
    ]
    for keeper in fork_server.pids:
        role = "keeper" if keeper in fork_server.holders else "starting"
        row = {"role": role, "index": 0, "generation": 0, "pid": keeper, "start": start_time(keeper), "commit": ""}
        holders.append(row | {"lanes": lanes})
    return {
        "version": VERSION,
        "readable_by": READABLE_BY,
        "parameters": what,
        "session": session.negotiated._asdict() | {"device": session.device},
        "lanes": lanes,
        "holders": holders,
    }


def take_over(
    raw: Json,
    options: FuseOptions,
    config: Config,
    folder: Path,
    prefix: str,
    store: FdStore,
    sent: Sent | None = None,
    told: Told = DEAF,
) -> Former | None:
    """What the supervisor that wrote this record has left, None if that cannot be taken over; the log says why.

    `sent`: the session of a daemon of which no process may be left. Raises EndedError when `told` to end while it waits for
    whoever has it, or for the end of who must not have it: whoever else holds the session goes on to do so.
    """
    if "session" not in raw:
        return None
    with contextlib.ExitStack() as on_failure:
        try:
            former = _take_over(raw, options, config, folder, prefix, store, sent, told, on_failure)
        except NotThereError as e:
            log.info("%s: %s", options.mountpoint, e)
            return None
        except (NydusError, OSError, msgspec.ValidationError) as e:
            log.warning("%s: what is mounted here cannot be taken over: %s; mounting anew", options.mountpoint, e)
            return None
        on_failure.pop_all()
    return former


def _take_over(
    raw: Json,
    options: FuseOptions,
    config: Config,
    folder: Path,
    prefix: str,
    store: FdStore,
    sent: Sent | None,
    told: Told,
    on_failure: contextlib.ExitStack,
) -> Former:
    why = why_unknown(raw)
    if why is not None:
        # Those that it names are ended for it, but not whom its supervisor started in its last moment.
        with contextlib.suppress(msgspec.ValidationError):  # it may be of another form, too
            unread = msgspec.convert(raw, _Record)
            _end_strangers(unread, [row.pid for row in unread.holders], told)
        raise MountError(why)
    record = msgspec.convert(raw, _Record)
    holders: list[tuple[Orphan | FdStore, list[_Lane]]] = []
    frontends: list[FrontEnd] = []
    keepers: list[Orphan] = []
    for row in record.holders:
        with contextlib.suppress(OSError):
            process = Orphan(row.pid, row.start)
            on_failure.callback(process.close)
            holders.append((process, row.lanes))
            if row.role == "fuse":
                frontends.append(FrontEnd(row.index, row.generation, row.commit, process, row.lanes))
            else:
                keepers.append(process)
    known = [frontend.process.pid for frontend in frontends]

    def end_strangers(kind: type[BaseException] | None, *_: object) -> None:
        if kind is not EndedError:  # then they may be the last who hold the session
            _end_strangers(record, known, told)

    on_failure.push(end_strangers)
    holders += [(process, record.lanes) for process in _strangers(record, [process.pid for process, _ in holders])]
    stored = store.numbers(record.session.device, len(record.lanes))
    alone = not holders and all(-1 in fds for fds in stored)
    if alone and sent is None:
        raise NotThereError("nobody is left of a nydusd that was killed")
    holders.append(
        (
            store,
            [_Lane(fds[0], fds[1], fds[2], fds[3], lane.inode) for fds, lane in zip(stored, record.lanes, strict=True)],
        )
    )
    lanes = []
    until = time.monotonic() + _KEEPER_SECONDS
    for number in range(0 if alone else len(record.lanes)):
        lanes.append(_lane(holders, number, keepers, until, told))
        points.reach("takeover: one lane copied")
        for fd in lanes[-1]:
            on_failure.callback(os.close, fd)
    if record.parameters != parameters(options, config):
        raise MountError("it was mounted with other parameters")
    negotiated = Negotiated(record.session.minor, record.session.flags, record.session.max_readahead)
    # Each fd that we forgot would keep a mount alive that nobody serves, and its users waiting.
    fd = clone(lanes[0].fd if sent is None else sent.fd, options.mountpoint)
    on_failure.callback(os.close, fd)
    points.reach("takeover: session cloned")
    session = Session.adopt(options.mountpoint, fd, negotiated)
    if session.device != record.session.device or session.is_over():
        raise MountError("another file system is mounted here now")
    table = MountTable.take_over(folder / "mounts", f"{prefix}mounts")
    records = readable(table, config, None if options.bootstrap is None else options.virtual_mountpoint)
    _check_image(records)
    session.lanes = lanes
    if alone:
        # Requests that the dead had taken were failed by the kernel when the last of their fds was closed.
        for _ in record.lanes:
            for number in session.open_lanes(1)[0]:
                on_failure.callback(os.close, number)
            points.reach("takeover: one lane made")
    points.reach("takeover: all is ours")
    # But not what would be the last to hold all this if we were killed before it is noted whom we have started.
    _end_strangers(record, [*known, *(keeper.pid for keeper in keepers)], told)
    points.reach("takeover: strangers ended")
    for holder, _ in holders:
        if isinstance(holder, Orphan) and holder.pid not in known:
            holder.close()
    frontends = [frontend for frontend in frontends if 0 <= frontend.number < len(lanes)]
    ends = [(row.pid, row.start) for row in record.holders if row.role != "fuse"]
    return Former(table.next_term(record.term), session, table, records, frontends, ends, record)


def _check_image(records: Sequence[Recorded]) -> None:
    """Raises MountError when the image of the command line is not the one that is mounted. One that is gone may be it."""
    from nydusd.storage.api.image import identity_of

    for recorded in records:
        with contextlib.suppress(OSError):
            if recorded.given and identity_of(os.stat(recorded.source)) != recorded.facts.identity:
                raise MountError(f"{recorded.source} is another image than the one that is mounted")


def _strangers(record: _Record, known: Sequence[int]) -> list[Orphan]:
    """Processes of a daemon that hold what was ours, but for the known ones.

    Front ends that were started in the supervisor's last moment, before it could note them, or are about to be started.
    """
    inodes = {lane.inode for lane in record.lanes}
    found = []
    for name in os.listdir("/proc"):
        if not name.isdecimal() or int(name) in known or int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it has ended
            if Path(f"/proc/{name}/comm").read_bytes().startswith(b"nydusd: ") and _holds(int(name), inodes):
                found.append(Orphan(int(name), start_time(int(name))))
    return found


def _holds(pid: int, inodes: Collection[int]) -> bool:
    """Whether a process has one of these journals. Raises OSError when it has ended."""
    return any(memory.st_ino in inodes for memory in memories_of(pid, journal.NAME))


def _end_strangers(record: _Record, known: Sequence[int], told: Told) -> None:
    """End processes of which nobody knows how far they got: the journals of front ends are whole, others begin there.

    Again until there is none, for a fork server may just have made one.
    """
    while strangers := _strangers(record, known):
        end_together([(stranger.pid, stranger.start) for stranger in strangers], told)
        for stranger in strangers:
            stranger.close()


def _lane(
    holders: Sequence[tuple[Orphan | FdStore, list[_Lane]]],
    number: int,
    keepers: Sequence[Orphan],
    until: float,
    told: Told,
) -> Lane:
    """Copies of the fds of a lane, from the first who has them; a keeper may get them until then. Raises OSError."""
    since = time.monotonic()
    while True:
        why = OSError(errno.ESRCH, f"nobody has the file descriptors of lane {number}")
        for process, lanes in holders:
            if number >= len(lanes):
                continue
            with contextlib.ExitStack() as taken:
                try:
                    lane = _copy(process, lanes[number], taken)
                except OSError as e:
                    why = e
                else:
                    taken.pop_all()
                    return lane
        if time.monotonic() >= until or all(keeper.poll() is not None for keeper in keepers):
            raise why
        for keeper in keepers:
            keeper.send_signal(signal.SIGCONT)  # one that somebody has stopped takes nothing from its line
        told.wait(since, _LOOK_SECONDS)


def _copy(process: Orphan | FdStore, lane: _Lane, taken: contextlib.ExitStack) -> Lane:
    fds = []
    for number in (lane.fd, lane.journal, lane.interrupt_in, lane.interrupt_out):
        fds.append(process.get_fd(number))
        taken.callback(os.close, fds[-1])
    device, memory, *pipes = map(os.fstat, fds)
    if (
        device.st_rdev != FUSE_DEVICE
        or memory.st_ino != lane.inode
        or not all(stat.S_ISFIFO(pipe.st_mode) for pipe in pipes)
    ):
        raise OSError(errno.EBADF, f"process {process.pid} has other file descriptors than were recorded")
    return Lane(*fds)
