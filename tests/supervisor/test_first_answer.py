"""In which order a takeover does what it has to do: who waits for an answer comes before all that takes time. Nothing runs."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from nydusd.cli.arguments import parse_arguments
from nydusd.cli.options import FuseOptions
from nydusd.frontends.erofs.session import Fds
from nydusd.nursery import client
from nydusd.supervisor import fuse, left_by_erofs, main
from nydusd.supervisor.children import Child
from nydusd.supervisor.erofs import ErofsDaemon
from nydusd.supervisor.fuse import FuseDaemon
from nydusd.waits import Told

if TYPE_CHECKING:
    from nydusd.supervisor.adoption import Former
    from nydusd.supervisor.restore import Restore

WORKERS = {"fetch": 3, "decompress": 4}
LANES = 3


class Order:
    """Notes what is done, and gives functions that do nothing else."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def of(self, name: str, value: object = None) -> Any:
        def note(*_args: object, **_named: object) -> object:
            self.done.append(name)
            return value

        return note

    def add(self, child: Child) -> None:
        self.done.append(child.name)

    def family(self) -> Any:
        more = self.of("all fetch workers")
        return SimpleNamespace(
            add=self.add, count=WORKERS.__getitem__, session=None, add_fetch_workers=more, inherited=True, guarded=False
        )


class Successor(FuseDaemon):
    """One that takes over from a supervisor of which front end 0 lives. Its first workers are there after three turns."""

    def __init__(self, order: Order, waited: bool) -> None:
        options = parse_arguments(["fuse", "-B", "/b", "-C", "/c", "-M", "/m"])
        assert isinstance(options, FuseOptions)
        self.options, self.state, self.run_dir = options, "INIT", ""
        self._first_state = "RUNNING"
        self.config = cast(Any, SimpleNamespace(front_end_count=lambda _: LANES))
        self.images, self.coming, self._put_off = {}, {}, []
        self.errors = cast(Any, logging.NullHandler())
        self._former = cast("Former", SimpleNamespace(session=SimpleNamespace(lanes=range(LANES))))
        self.ending = cast(Any, SimpleNamespace(asked=False))
        self.told = Told("")
        self.handover = cast(Any, SimpleNamespace(waited=waited, leaving=True))
        self.fork_server = cast(Any, SimpleNamespace(waits=True))
        self._family = order.family()
        self._store = cast(Any, SimpleNamespace(keep=order.of("store")))
        self._status = cast(Any, SimpleNamespace(ready=order.of("READY")))
        staff = SimpleNamespace(recount=order.of("others one a turn"))
        pool = SimpleNamespace(job_of=lambda _: 0 if order.done.count("turn") < 3 else None)
        router = SimpleNamespace(checkpoints=SimpleNamespace(resume=order.of("syncs begun again")))
        self._engine = cast(Any, SimpleNamespace(pools=dict.fromkeys(WORKERS, pool), staff=staff, router=router))
        self._order = order

    def _begin(self, rows: int) -> None:
        assert rows == LANES

    def _go_on(self, former: Former, places: dict[str, list[Child]]) -> Restore:
        places["fuse"].pop(0)  # it was adopted
        self._restoring = True
        names = {"serve": "blobs opened", "end": "all known"}
        steps = {name: self._order.of(what) for name, what in names.items()}
        return cast("Restore", SimpleNamespace(step=self._order.of("one known", False), is_scarce=False, **steps))

    def open_api(self) -> None:
        self._order.done.append("API")

    def _timeout(self) -> float:
        return 0.0

    def _turn(self, timeout: float) -> None:
        self._order.done.append("turn")

    def stop(self) -> None:
        self._order.done.append("stop")


@pytest.mark.parametrize("waited", [False, True], ids=["of a killed one", "handed over"])
def test_who_waits_for_a_miss_is_served_before_the_api_ready_other_workers_and_the_nursery(
    monkeypatch: pytest.MonkeyPatch, waited: bool
) -> None:
    order = Order()
    successor = Successor(order, waited)

    def load_report() -> None:
        order.done.append("report")
        successor.ending.asked = True

    monkeypatch.setattr(left_by_erofs, "refuse", lambda *_: None)
    monkeypatch.setattr(fuse, "first_request", lambda *_: None)
    monkeypatch.setattr(fuse, "_FIRST_SECONDS", 60.0)
    monkeypatch.setattr(main, "_load_report", load_report)
    monkeypatch.setattr(client, "start_if_useful", order.of("nursery"))
    assert main._run(successor) == 0
    assert order.done == [
        *("fuse 1", "fetch 0", "decompress 0", "fuse 2", "blobs opened", "syncs begun again"),
        *([] if waited else ["turn"] * 3),  # where the API is asked already, it is told first what we are
        *("API", "others one a turn", "store", "READY"),
        *("one known", "all known", "blobs opened", "syncs begun again", "others one a turn"),
        *("turn", "nursery", "turn", "report", "stop"),
    ]
    assert successor.state == "RUNNING"


@pytest.mark.parametrize("takes_over", [False, True])
def test_a_front_end_of_the_kernels_is_there_before_most_workers_in_a_takeover(takes_over: bool) -> None:
    order = Order()
    successor = object.__new__(ErofsDaemon)
    successor._family, successor._store = order.family(), cast(Any, SimpleNamespace(hold=order.of("store")))
    successor._stored, successor._found, successor._restoring = "", None, takes_over
    successor._guard = Child("guard", 0, "")
    vars(successor)["open_api"] = order.of("API")
    successor._start_processes(Fds(*range(len(Fds._fields))))
    turns = range(1 if takes_over else max(WORKERS.values()))
    workers = [f"{role} {turn}" for turn in turns for role, count in WORKERS.items() if turn < count]
    assert order.done == ["store", "guard 0", "API", *workers]
