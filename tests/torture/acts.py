"""What may happen to a daemon under torture. `ACTS` names each kind of act: another is a function more in there.

An act is given the round (`Round`): its daemon, its random choices, and its counts. It returns when it is done; what it has
killed may still be on its way back. It draws all its random numbers first, whatever it finds, from a generator of its own, by
the number of the act. So the same seed gives the same acts, though the machine is faster or slower.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta

from nydusd.storage.state.lock import start_time
from tests.support.daemon import Daemon
from tests.support.discipline import discipline, is_running, wait_until
from tests.support.haste import in_haste, not_in_haste
from tests.support.keeper import Keeper, succeed, upgrade
from tests.support.nursery import of_nursery
from tests.torture.copied import CopiedDaemon
from tests.torture.upgrades import Upgrades

_RECENT = timedelta(seconds=1)
"""What was done so long before a read began may have to do with it."""
PATIENCE = 2.0
"""`worker_patience` of the daemons: seconds after which a worker that shows no sign of life is killed."""
_LAST_PAGE = 4096


class Round:
    """One daemon. `keeper` keeps its session, as nydus-snapshotter does; without one the same command is started again."""

    def __init__(
        self,
        daemon: Daemon,
        keeper: Keeper | None,
        front_ends: Sequence[str],
        seed: str,
        counts: Counts,
        *,
        cached: bool,
    ) -> None:
        self.cached = cached
        self.daemon = daemon
        self.keeper = keeper
        self.front_ends = front_ends
        self._seed = seed
        self._acts = 0
        self.choose = random.Random(seed)
        """Of the act under way."""
        self.counts = counts
        self.upgrades = Upgrades(counts.upgrades)
        self.killed: set[tuple[int, int]] = set()
        """Whom we have killed, by pid and start time. Each may have a moment left to run."""
        self.history: list[tuple[datetime, str]] = []
        """What was done, and when."""
        self.stops: list[tuple[datetime, datetime]] = []
        """When a process was stopped, and when it was let go on."""

    def hurt(self) -> bool:
        """A pause, and one act of those that fit: whether something has to be loaded anew by it."""
        self._acts += 1
        self.choose = random.Random(f"{self._seed}/{self._acts}")
        pause = self.choose.random() ** 2 / 3
        kinds = [kind for kind, (_, fits) in ACTS.items() if fits(self)]
        kind = self.choose.choice([*kinds, *_OFTEN])
        if isinstance(self.daemon, CopiedDaemon):
            self.daemon.choose = self.choose
        time.sleep(pause)
        if kind not in _HARMLESS:
            self.upgrades.disturb()
        self.history.append((datetime.now(), kind))
        with in_haste():
            ACTS[kind][0](self)
        self.counts.acts[kind] += 1
        return kind in _LOADED_ANEW

    def around(self, began: datetime, seconds: float) -> list[str]:
        """What was done while a read waited: the act before it, if that was not long ago, and those until its end."""
        end = began + timedelta(seconds=seconds)
        before = [kind for when, kind in self.history if timedelta(0) <= began - when < _RECENT][-1:]
        return before + [kind for when, kind in self.history if began < when < end]

    def stalled(self, began: datetime, seconds: float) -> float:
        """Of the seconds that a read took, those in which something was stopped by us."""
        end = began + timedelta(seconds=seconds)
        return sum(max((min(end, until) - max(began, since)).total_seconds(), 0.0) for since, until in self.stops)

    def stop(self, pids: Sequence[int], share: float, seconds: float) -> None:
        """Stop one of these processes (which: `share` of 1) for a while. It may be killed meanwhile."""
        since = datetime.now()
        with contextlib.ExitStack() as done, contextlib.suppress(ProcessLookupError, IndexError):
            process = os.pidfd_open(pids[int(share * len(pids))])
            done.callback(os.close, process)
            signal.pidfd_send_signal(process, signal.SIGSTOP)
            time.sleep(seconds)
            signal.pidfd_send_signal(process, signal.SIGCONT)
        self.stops.append((since, datetime.now()))

    def kill(self, role: str, pids: Iterable[int]) -> None:
        for pid in pids:
            self.killed.add((pid, start_time(pid)))
            if send(pid, signal.SIGKILL):
                self.counts.kills[role] += 1

    def kill_supervisor(self) -> None:
        """Not before another process holds the mount: what is promised is that not all holders die at once."""
        wait_until(lambda: bool(self._holders()), "a process that holds the mount beside the supervisor", 60)
        self.daemon.kill_supervisor()
        self.counts.kills["supervisor"] += 1

    def keeper_of_the_mount(self) -> int:
        """A fork server of which a successor knows that it holds the mount, waited for if all were killed just now.

        Whoever kills supervisor and front ends must leave one.
        """
        wait_until(lambda: bool(self._noted("keeper")), "a fork server that holds the mount", 60)
        return self._noted("keeper")[0]

    def _holders(self) -> list[int]:
        if "fuse" in self.front_ends:
            return self._noted("keeper", "fuse")
        return [pid for role in self.front_ends for pid in self.alive(role)]

    def alive(self, role: str) -> list[int]:
        """Processes of this role that run on: not those that we have killed, and that have a moment left."""
        return [pid for pid in self.daemon.pids(role) if (pid, start_time(pid)) not in self.killed]

    def _noted(self, *roles: str) -> list[int]:
        """Processes of these roles that run on, and of which a successor knows that they hold the mount."""
        rows = [
            row
            for path in discipline.runtime.glob("*/state.json")
            for row in json.loads(path.read_bytes()).get("holders", ())
        ]
        return [
            row["pid"]
            for row in rows
            if row["role"] in roles and (row["pid"], row["start"]) not in self.killed and is_running(row["pid"])
        ]

    def succeed(self) -> None:
        """The next supervisor, as whoever looks after the daemon starts it."""
        if self.keeper is None:
            self.daemon.start()
        else:
            succeed(self.daemon, self.keeper)


class Counts:
    """Of a whole run."""

    def __init__(self) -> None:
        self.acts: Counter[str] = Counter()
        self.kills: Counter[str] = Counter()
        self.stops: Counter[str] = Counter()
        """Stops of more than `PATIENCE`."""
        self.upgrades: Counter[str] = Counter()
        """Of the workers, by how they ended."""


def send(pid: int, number: signal.Signals) -> bool:
    """Whether there was such a process."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


def one(role: str) -> Callable[[Round], None]:
    """One process of a role is killed."""

    def act(this: Round) -> None:
        share = this.choose.random()
        pids = this.daemon.pids(role)
        if pids:
            this.kill(role, [pids[int(share * len(pids))]])

    return act


def of_the_node(role: str) -> Callable[[Round], None]:
    """What serves all daemons of a node."""

    def act(this: Round) -> None:
        this.kill(role, of_nursery(role))

    return act


def one_front_end(this: Round) -> None:
    one(this.choose.choice(this.front_ends))(this)


def fork_servers(this: Round) -> None:
    """The fork server and its copy at the same time."""
    this.kill("fork server", this.daemon.pids("fork server"))


def stopped(this: Round) -> None:
    share, seconds = this.choose.random(), this.choose.random() * 0.3
    roles = [*this.front_ends, "fetch", "decompress"] + ["around"] * over_blobfs(this)
    pids = [pid for role in roles for pid in this.daemon.pids(role)]
    this.stop(pids, share, seconds)


def stopped_for_long(this: Round) -> None:
    """Longer than a worker has to show a sign of life: it is killed then, and its job done by another. Others go on later."""
    roles = [*this.front_ends, "fetch", "decompress", "api", "fork server", "supervisor"] + ["around"] * over_blobfs(
        this
    )
    role = this.choose.choice(roles + ["stub", "nursery", "seats"] * from_a_nursery(this))
    share, seconds = this.choose.random(), PATIENCE * (1.1 + this.choose.random() / 2)
    match role:
        case "stub":
            pids = [this.daemon.pid]
        case "supervisor":
            pids = this.daemon.supervisors() if isinstance(this.daemon, CopiedDaemon) else [this.daemon.pid]
        case "nursery" | "seats":
            pids = of_nursery(role)
        case _:
            pids = this.daemon.pids(role)
    this.counts.stops[role] += bool(pids)
    this.stop(pids, share, seconds)


def supervisor(this: Round) -> None:
    this.kill_supervisor()
    this.succeed()


def supervisor_and_front_ends(this: Round) -> None:
    # With fanotify two of the three that hold its group: it is what is promised.
    role = this.choose.choice(this.front_ends)
    if role == "fuse":
        this.keeper_of_the_mount()
    for other in set(this.front_ends) - {role}:
        wait_until(lambda other=other: bool(this.alive(other)), f"a {other} that is left", 60)  # type: ignore[misc]
    victims = this.daemon.pids(role)
    this.kill_supervisor()
    this.kill(role, victims)
    this.succeed()


def bunch(this: Round) -> None:
    """Supervisor, fork servers but one, front ends and workers.

    Which one is left is looked up when the supervisor is dead: until then an upgrade of the workers may end the former
    ones for those that we would kill.
    """
    daemon = this.daemon
    this.keeper_of_the_mount()
    victims = [(role, daemon.pids(role)) for role in ("fork server", "fuse", "decompress", "fetch")]
    this.kill_supervisor()
    spared = this.keeper_of_the_mount()
    for role, pids in victims:
        this.kill(role, [pid for pid in pids if pid != spared])
    this.succeed()


def supervisor_and_its_successor(this: Round) -> None:
    """The next one is killed while it takes over."""
    moment = this.choose.random() * 0.4
    this.kill_supervisor()
    with subprocess.Popen(this.daemon.command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as next_one:
        not_in_haste(next_one.pid)
        time.sleep(moment)
        next_one.kill()
    this.counts.kills["supervisor"] += 1
    this.succeed()


def upgraded(this: Round) -> None:
    """Another process of the same command takes over while this one serves."""
    assert this.keeper is not None
    upgrade(this.daemon, this.keeper)


def emptied(this: Round) -> None:
    """All that may be is taken out of the cache file; if whoever is asked is killed meanwhile, some of it."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        this.daemon.request("PUT", "/api/v1/nydusd/quota", b'{"target": 0}', seconds=5)


def from_a_nursery(this: Round) -> bool:
    return isinstance(this.daemon, CopiedDaemon)


def over_blobfs(this: Round) -> bool:
    return "blobfs" in this.daemon.command


def cut_off(this: Round) -> None:
    """Somebody makes the cache file shorter. In its last page: a worker that writes there at this moment writes all of that."""
    less = 1 + this.choose.randrange(_LAST_PAGE)
    for path in this.daemon.cache.glob("*.blob.data"):
        with contextlib.suppress(OSError):
            size = path.stat().st_size
            os.truncate(path, max(size - less, 0))


def deleted(this: Round) -> None:
    """Somebody removes the cache file."""
    for path in this.daemon.cache.glob("*.blob.data"):
        path.unlink(missing_ok=True)


def always(_this: Round) -> bool:
    return True


def of_a_file(this: Round) -> bool:
    """Where something may become of the cache file: the kernel reads it by itself in the other ways."""
    return this.cached and "fuse" in this.front_ends


ACTS: dict[str, tuple[Callable[[Round], None], Callable[[Round], bool]]] = {
    "front end": (one_front_end, always),
    "fetch": (one("fetch"), always),
    "decompress": (one("decompress"), always),
    "around": (one("around"), over_blobfs),
    "fork server": (one("fork server"), always),
    "fork server and its copy": (fork_servers, always),
    "api": (one("api"), always),
    "nursery": (of_the_node("nursery"), from_a_nursery),
    "seats": (of_the_node("seats"), from_a_nursery),
    "stopped for a moment": (stopped, always),
    "stopped for long": (stopped_for_long, always),
    "supervisor": (supervisor, always),
    "supervisor and front ends": (supervisor_and_front_ends, always),
    "all but a fork server": (bunch, lambda this: len(this.front_ends) == 1),
    "supervisor and its successor": (supervisor_and_its_successor, always),
    "cache emptied": (emptied, of_a_file),
    "cache file cut off": (cut_off, of_a_file),
    "cache file deleted": (deleted, of_a_file),
    "workers upgraded": (lambda this: this.upgrades.begin(this.daemon, this.choose), always),
    "workers scaled": (lambda this: this.upgrades.scale(this.daemon, this.choose), always),
    "upgraded": (upgraded, lambda this: this.keeper is not None),
}
"""By its name each kind of act, and in which rounds it may be."""
_OFTEN = ("workers upgraded",)
"""Acts that are done twice as often: half of the upgrades are disturbed, and 50 are wanted to come to their end."""
_LOADED_ANEW = (
    "fork server and its copy",
    "supervisor",
    "supervisor and front ends",
    "all but a fork server",
    "supervisor and its successor",
    "upgraded",
)
"""Acts after which something has to be loaded anew: another supervisor, or a fork server that has no copy."""
_HARMLESS = ("workers upgraded", "workers scaled")
"""Acts by which no upgrade of the workers may be disturbed."""
