"""An unmodified nydus-snapshotter in dedicated mode, where its daemons come from a nursery: it notices no difference."""

from __future__ import annotations

import os
import signal

from tests.containerd.conftest import Shop
from tests.containerd.images import SMALL
from tests.containerd.node import Node
from tests.containerd.test_recovery import runs
from tests.support.discipline import cmdline, descendants, is_running, wait_until
from tests.support.nursery import Another, running_nursery


def test_containers_run_from_daemons_of_a_nursery_also_after_one_was_killed(shop: Shop) -> None:
    reference = shop.references[SMALL]
    with Another(bootstrap=None), running_nursery() as nursery, Node("dedicated", recover_policy="restart") as node:
        assert node.run_python(reference, "print(42)") == "42\n"
        (pid,) = node.daemon_pids()
        (supervisor,) = [child for child in descendants(nursery) if cmdline(child) == "nydusd: supervisor"]
        assert descendants(pid) == []
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_running(supervisor), "the end of its supervisor")
        wait_until(lambda: node.daemon_pids() not in ([], [pid]), "the next daemon", 30.0)
        wait_until(lambda: runs(node, reference), "a container to run again", 60.0)
        node.watch_daemon_logs()
        node.nerdctl("rmi", reference)
        wait_until(lambda: node.daemons() == [], "the end of the daemon")
        wait_until(
            lambda: {cmdline(child) for child in descendants(nursery)} <= {"nydusd: seats"},
            "the end of all of its processes",
            60.0,
        )
