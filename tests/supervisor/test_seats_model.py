"""Any interleaving of daemons that come, work, stop, go on and die, of workers that are killed, of a nursery that hangs, dies
and comes back: no more workers than seats but for what somebody was late with, and all jobs are done in the end."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from nydusd.nursery.seats import ROLES
from nydusd.storage.cache.requests import Priority
from nydusd.supervisor.seats import _LONGEST
from tests.supervisor.seat_world import IDLE, SEATS, OneDaemon, World

DAEMONS_MOST = 5
picks = st.integers(0, 1 << 16)
roles = st.sampled_from(ROLES)
priorities = st.sampled_from(Priority)


class Machine(RuleBasedStateMachine):
    """`pick` chooses among the daemons, and what they have."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.world = World(self.patch)
        self.strict = True
        """Nobody has been late or without a nursery: then there are never more workers than seats."""

    def teardown(self) -> None:
        self.settle_down()
        self.world.close()
        self.patch.undo()

    @initialize(daemons=st.integers(1, 3))
    def begin(self, daemons: int) -> None:
        self.world.start_desk()
        for _ in range(daemons):
            self.add()

    def daemon(self, pick: int) -> OneDaemon:
        return self.world.daemons[pick % len(self.world.daemons)]

    @precondition(lambda self: len(self.world.daemons) < DAEMONS_MOST)
    @rule()
    def add(self) -> None:
        self.world.add(fetch=2, decompress=3)

    @precondition(lambda self: self.world.daemons)
    @rule(pick=picks, role=roles, priority=priorities, count=st.integers(1, 6))
    def want(self, pick: int, role: str, priority: Priority, count: int) -> None:
        for _ in range(count):
            self.daemon(pick).submit(role, priority)

    @precondition(lambda self: self.world.daemons)
    @rule(pick=picks)
    def turn(self, pick: int) -> None:
        self.daemon(pick).turn()

    @rule()
    def serve(self) -> None:
        self.world.serve()

    @rule(seconds=st.sampled_from([0.01, 0.1]))
    def all_go_on(self, seconds: float) -> None:
        """But no job is done."""
        self.world.run(seconds, working=())

    @precondition(lambda self: self.world.daemons)
    @rule(pick=picks, count=st.integers(1, 3))
    def finish(self, pick: int, count: int) -> None:
        daemon = self.daemon(pick)
        for _ in range(count):
            if daemon.sent and not daemon.stopped:
                daemon.finish(sorted(daemon.sent)[pick % len(daemon.sent)])

    @precondition(lambda self: self.world.daemons)
    @rule(pick=picks)
    def kill_worker(self, pick: int) -> None:
        there = [child for child in self.daemon(pick).family.children if child.process is not None]
        if there:
            self.daemon(pick).kill(there[pick % len(there)])

    @precondition(lambda self: self.world.daemons)
    @rule(pick=picks)
    def kill_daemon(self, pick: int) -> None:
        daemon = self.daemon(pick)
        self.world.daemons.remove(daemon)
        daemon.end()

    @invariant()
    def no_more_workers_than_seats(self) -> None:
        ledgers = [] if self.world.desk is None else self.world.desk._ledgers.values()
        late = any(member.late for ledger in ledgers for member in ledger._members.values())
        if late or not ledgers or not all(daemon.seats.counts for daemon in self.world.daemons):
            self.strict = False
        for role in ROLES if self.strict else ():
            assert self.world.processes(role) <= SEATS[role]

    def settle_down(self) -> None:
        """Everybody answers from now on."""
        self.world.hung = False
        self.world.start_desk()
        for daemon in self.world.daemons:
            daemon.stopped = False
        for _ in range(20):
            self.world.run(1.0, step=0.05)
            if not any(daemon.undone for daemon in self.world.daemons):
                break
        assert [daemon.undone for daemon in self.world.daemons] == [0] * len(self.world.daemons)
        self.world.run(1.5 * IDLE, step=0.25)  # as long as it takes them to join
        for daemon in self.world.daemons:
            assert daemon.seats.counts
            assert daemon.rest.seats.facts()["roles"]["fetch"]["want"] == 0
        self.world.run(2.0, step=0.1)
        for role in ROLES:
            assert self.world.processes(role) == 0
            assert self.world.desk is not None and self.world.desk._ledgers[role].taken == 0


class Wild(Machine):
    """Whoever may hang or die does."""

    @precondition(lambda self: self.world.daemons)
    @rule(pick=picks)
    def stop_or_go_on(self, pick: int) -> None:
        self.daemon(pick).stopped ^= True

    @rule()
    def hang_or_go_on(self) -> None:
        self.strict = False
        self.world.hung ^= True

    @rule()
    def kill_nursery(self) -> None:
        self.strict = False
        self.world.kill_desk()

    @rule()
    def start_nursery(self) -> None:
        self.world.start_desk()

    @rule(seconds=st.sampled_from([0.2, 0.6, 2.0, IDLE]))
    def wait(self, seconds: float) -> None:
        self.strict = False
        self.world.now += seconds

    @precondition(lambda self: self.world.daemons)
    @rule(pick=picks, role=roles)
    def a_reader_waits_for_nobody_else(self, pick: int, role: str) -> None:
        self.strict = False
        daemon = self.daemon(pick)
        if daemon.stopped:
            return
        daemon.submit(role, Priority.USER)
        self.world.run(_LONGEST + 0.5, step=0.02, working=[daemon])
        assert daemon.undone == 0


@pytest.mark.parametrize("machine", [Machine, Wild])
def test_any_order_of_events(machine: type[Machine]) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=25, stateful_step_count=40, deadline=None))
