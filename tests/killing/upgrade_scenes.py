"""Scenes of upgrades: of the workers; of the daemon, by the protocol of nydus-snapshotter; and a session that was sent."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from nydusd.storage.state.names import names
from nydusd.supervisor.runtime import TRIAL
from tests.killing.scene import SECONDS
from tests.killing.scenes import HalfRead
from tests.support.discipline import discipline, wait_until
from tests.support.keeper import Keeper, put, state_of
from tests.support.mounted import Tree

WORKERS = "/api/v1/nydusd/workers"
PATIENCE = 150.0
"""Seconds: more than the API takes to say that nobody has answered."""
MORE = 5
"""Decompress workers: more than are configured on any machine that this is tested on, for a moment."""


class Upgraded(HalfRead):
    """The workers are upgraded; then there are more of them, and then as many as before."""

    def before(self) -> None:
        super().before()
        self.usual = self.workers()

    def work(self) -> None:
        self.order(f"{WORKERS}/upgrade")
        self.read_all(self.place)
        for wanted, there in ((MORE, MORE), (0, self.usual)):
            self.order(WORKERS, {"decompress": wanted})
            wait_until(lambda there=there: self.workers() == there, f"{there} workers", SECONDS)  # type: ignore[misc]
        self.end()

    def order(self, path: str, what: object = None) -> None:
        """As nydusctl does; what was cut short is ordered once more, as an operator would."""
        body = None if what is None else json.dumps(what).encode()
        try:
            status, told = self.daemon.request("PUT", path, body, PATIENCE)
        except OSError as e:
            status, told = 0, str(e).encode()
        if status != 200:
            assert self.plan.killed(), told
            wait_until(self.daemon.serves, "the daemon to serve", SECONDS)
            assert self.of_a_trial() == []
            status, told = self.daemon.request("PUT", path, body, PATIENCE)
        assert status == 200, told

    def of_a_trial(self) -> list[str]:
        """What one of new workers has left."""
        prefix = self.instance()
        folder = discipline.runtime / prefix.split(".")[1]
        return [name for name in names(prefix) if TRIAL in name] + [str(path) for path in folder.glob(TRIAL)]

    def workers(self) -> int:
        """How many decompress workers there are to be; 0 while nobody can be asked."""
        try:
            answer = self.daemon.get(WORKERS)
        except (OSError, AssertionError):
            return 0
        assert isinstance(answer, dict)
        return sum(row["role"] == "decompress" and row["state"] != "leaving" for row in answer["processes"])


class Kept(HalfRead):
    """The daemon's session is kept, and a daemon that was killed is succeeded, as by nydus-snapshotter."""

    handing_over = False
    """Who is killed now is looked after by the scene itself."""

    def __init__(self, tree: Tree, folder: Path, **tuning: object) -> None:
        self.keeper = Keeper(folder)
        super().__init__(tree, folder, **tuning)

    def args(self) -> tuple[str, ...]:
        return (*super().args(), *self.keeper.args)

    def open(self, stack: ExitStack) -> None:
        stack.callback(self.keeper.close)
        super().open(stack)

    def before(self) -> None:
        super().before()
        self.keeper.save(self.daemon)

    def keep(self) -> None:
        process = self.daemon._process
        if process is not None and process.poll() == -signal.SIGKILL and not self.handing_over:
            self.fail_over()

    def fail_over(self) -> None:
        """The same command once more, or twice if the first is killed: it is to take over, and to start."""
        self.daemon.launch()
        while not (self.comes("INIT") and self.is_given_the_session() and self.starts()):
            self.daemon.launch()

    def comes(self, *states: str) -> bool:
        """Whether what was started comes to one of these states: it may be killed before."""
        return self.is_done(lambda: state_of(self.daemon) in states, " or ".join(states))

    def is_given_the_session(self) -> bool:
        """Whether it takes what is kept. If the answer is lost, it has or has not."""

        def given() -> bool:
            try:
                self.keeper.give(self.daemon)
            except (OSError, AssertionError):
                return state_of(self.daemon) in ("READY", "RUNNING")
            return True

        return self.is_done(given, "a takeover")

    def starts(self) -> bool:
        return self.is_done(lambda: self.does("start") or state_of(self.daemon) == "RUNNING", "a start") and self.comes(
            "RUNNING"
        )

    def does(self, what: str) -> bool:
        try:
            return put(self.daemon, what) == 204
        except OSError:
            return False

    def is_done(self, condition: Callable[[], bool], what: str) -> bool:
        """Whether this becomes true before what was started is killed."""
        process = self.daemon._process
        assert process is not None
        done = False

        def over() -> bool:
            nonlocal done
            done = condition()
            return done or process.poll() is not None

        wait_until(over, what, SECONDS)
        assert done or (process.poll() == -signal.SIGKILL and self.plan.killed()), f"{what}: it has ended"
        return done


class Handover(Kept):
    """Another process of the same command takes over while this one serves. Who of the two is killed is started again."""

    sockets = 0

    def work(self) -> None:
        self.handing_over = True
        while not self.hand_over():
            pass
        self.handing_over = False
        self.read_all(self.place)
        self.end()

    def hand_over(self) -> bool:
        """Once; False if somebody was killed and all is as before."""
        daemon = self.daemon
        if not self.is_saved():
            return False
        old, socket = daemon._process, daemon.apisock
        assert old is not None
        self.sockets += 1
        self.have_socket(new := daemon.folder / f"api{self.sockets}.sock")
        daemon.command.append("--upgrade")
        daemon.launch()
        daemon.command.pop()
        if not (self.comes("INIT") and self.is_given_the_session() and self.comes("READY")):
            daemon._process = old
            self.have_socket(socket)
            new.unlink(missing_ok=True)
            wait_until(lambda: state_of(daemon) == "RUNNING", "the old one, which nobody has touched", SECONDS)
            return False
        daemon.apisock = socket
        wait_until(lambda: old.poll() is not None or self.does("exit"), "an answer of the old one", SECONDS)
        assert old.wait(SECONDS) == 0 or self.plan.killed()
        assert not (socket.exists() and old.returncode == 0), "its socket was left"
        daemon.apisock = new
        if not self.starts():
            self.fail_over()
        while not self.is_saved():
            pass
        return True

    def have_socket(self, path: Path) -> None:
        """Where the daemon is asked, and what is started next is to be."""
        self.daemon.command[self.daemon.command.index("-A") + 1] = str(path)
        self.daemon.apisock = path

    def is_saved(self) -> bool:
        """Whether the session is kept anew; if who was to send it was killed, the next one serves."""
        try:
            self.keeper.save(self.daemon)
        except (OSError, AssertionError):
            assert self.plan.killed()
            process = self.daemon._process
            assert process is not None
            assert process.wait(SECONDS) == -signal.SIGKILL
            self.fail_over()
            return False
        return True

    def after(self) -> None:
        super().after()
        assert list(discipline.runtime.glob("*.next*")) == []


class SentSession(Kept):
    """All processes of the daemon are dead; what is kept is all that is left of its session. Who waits for bytes waits on."""

    def before(self) -> None:
        super().before()
        self.daemon.kill_all()

    def work(self) -> None:
        self.read_all(self.place)
        self.end()
