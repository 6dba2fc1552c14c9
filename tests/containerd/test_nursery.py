"""An unmodified nydus-snapshotter whose daemons come from a nursery: it notices no difference."""

from __future__ import annotations

import os
import signal

import pytest

from tests.containerd.conftest import Shop
from tests.containerd.images import SMALL
from tests.containerd.node import Node
from tests.containerd.test_recovery import api_pids, runs
from tests.support.discipline import cmdline, descendants, discipline, is_running, wait_until
from tests.support.nursery import Another, is_ready, nurseries, running_nursery


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


def test_the_one_shared_daemon_is_succeeded_from_a_nursery_of_its_own(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = shop.references[SMALL]
    monkeypatch.setenv("NYDUSD_NURSERY", "")
    with Node("shared", recover_policy="failover") as node:
        container = node.start_container(reference)
        wait_until(lambda: is_ready(discipline.runtime), "a nursery", 60.0)
        (nursery,) = nurseries()
        for _ in range(2):
            (pid,) = node.daemon_pids()
            os.kill(pid, signal.SIGKILL)
            assert node.exec_python(container, "import json; print(42)") == "42\n"
            wait_until(lambda pid=pid: node.daemon_pids() not in ([], [pid]), "the next daemon", 30.0)  # type: ignore[misc]
            wait_until(lambda: bool(api_pids(node)), "its start", 60.0)
            assert cmdline(*api_pids(node)) == "nydusd: supervisor"
            assert api_pids(node) != node.daemon_pids(), "it has a stub"
        assert nurseries() == [nursery]
        node.watch_daemon_logs()
        node.nerdctl("rm", "-f", container)
        node.nerdctl("rmi", reference)
    assert nurseries() == []
