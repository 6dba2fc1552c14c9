"""`nydusd erofs`: images mounted by the kernel's EROFS over the cache files, which are filled when the kernel asks.

Runs in the supervisor. Beside the processes that any daemon has there are one front end, which answers the kernel for all
mounts, and a guard, which holds what must not be closed while anybody reads (`frontends/erofs/guard.py`). How a mount is
made is in `kernel_mounts.py`.

What holds after SIGKILL: readers of what is cached go on, others wait. The next daemon on this mount point takes the mounts
over as they are; under systemd also if nothing of ours was left alive, for systemd's fd store holds what the guard holds.
A stop unmounts first; if somebody uses a file system still, front end and guard stay until nobody does.
"""

from __future__ import annotations

import logging
import math
import os
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nydusd import points, priority
from nydusd.cli.options import FuseOptions
from nydusd.errors import MountError, NydusError
from nydusd.frontends.erofs import left, table
from nydusd.frontends.erofs.session import Fds, detach, is_seen, top_is_erofs
from nydusd.frontends.fuse.session import clear_stale_mount
from nydusd.ipc.messages import Json
from nydusd.storage.api.image import identity_of
from nydusd.supervisor import control_ops, left_by_erofs
from nydusd.supervisor.children import Child
from nydusd.supervisor.daemon import Supervisor
from nydusd.supervisor.kernel_mounts import KernelMounts
from nydusd.supervisor.kernel_places import is_inside
from nydusd.supervisor.mount_records import Recorded, readable
from nydusd.supervisor.mount_request import first_request
from nydusd.supervisor.mount_table import MountTable
from nydusd.supervisor.restore import Restore

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nydusd.cli.options import Options
    from nydusd.config import Config
    from nydusd.forkserver.client import ForkServer
    from nydusd.supervisor.images import Image

log = logging.getLogger(__name__)

_OWN = ("erofs", "guard")
"""Roles of those that outlive the supervisor."""
_PAUSE = 0.5
"""Seconds between tries to start a guard that is waited for."""
_GUARD_PATIENCE = 10.0
"""Seconds after which it is done without, if the front end lives."""


class ErofsDaemon(Supervisor):
    """A daemon whose images the kernel reads by itself. `why` is what made it this one, for whoever asks."""

    def __init__(self, options: Options, config: Config, fork_server: ForkServer, why: str) -> None:
        super().__init__(options, config, fork_server)
        self.front_end = ("EROFS with fanotify", why)
        self._kernel: KernelMounts | None = None
        self._found: left.Left | None = None
        """What a killed supervisor has left."""
        self._former: tuple[MountTable, list[Recorded]] | None = None
        """Its table of images, until that is served again."""
        self._front_end = Child("erofs", 0, "nydusd.frontends.erofs")
        self._guard = Child("guard", 0, "nydusd.frontends.erofs.guard", ("nydusd.frontends.erofs.main",))
        self._left = Path(self.run_dir).with_suffix(left_by_erofs.FANOTIFY)
        self._stored = f"nydusd-erofs-{self._runtime.instance}-"
        """What the names of our fds in systemd's store begin with."""
        self._family.own_spec, self._family.started = self._own_spec, self._started

    # --- start ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Everything up to RUNNING: the image of the command line is mounted then. Raises NydusError."""
        options = self.options
        assert isinstance(options, FuseOptions)
        left_by_erofs.refuse(self.run_dir, options.mountpoint, left_by_erofs.FANOTIFY)
        self._begin(1)
        clear_stale_mount(options.mountpoint)
        if self._found is None:
            self._clear_dead_mounts(options.mountpoint)
        first = first_request(options, self.config)
        self._bind()
        restore = self._take_up() if self._former is not None else None
        image = None if first is None or restore is not None else self.mounts.mount_first(first)
        fds = Fds.make() if self._found is None else self._found.fds
        self._kernel = KernelMounts(
            options.mountpoint, fds, self.engine.fetch, self.mounts, self.engine.router.renew, self._lost, self._note
        )
        self.mounts.kernel = self._kernel
        self._start_processes(fds)
        if self.coming:
            self._ready(f"{self._shown()} mounted at {options.mountpoint}")
        if restore is not None:
            self._know_all(restore)
            if self.coming and (self.handover.leaving or not self.ending.unmounts):
                return  # all stays as it is: what is mounted and not known again yet is the next one's
            if first is not None and first.place not in self.images:
                image = self.mounts.mount_first(first)
        missing = self._kernel.go_on(list(self.images.values()))
        self._add_front_end()
        if self._found is not None:
            points.reach("takeover: before the holders of the former end")
            self._have_guard()
            found, self._found = self._found, self._found._replace(holders=[])
            left.end(found, self.told)
            points.reach("takeover: holders of the former ended")
            self._found = self._found._replace(noted=[])
        if restore is not None:
            self._all_known(restore)
        if first is not None and image is not None:
            self.mounts.serve(image, first.files)
        self._show(missing)
        if not self.stopping and self.state == "INIT":
            self._ready(f"{self._shown()} mounted at {options.mountpoint}")

    def _show(self, images: Sequence[Image]) -> None:
        """Until these are mounted. Raises NydusError when one cannot be; in a takeover it is let go, with what is in it."""
        ended: dict[str, NydusError | None] = {}
        for image in images:
            self.mounts.show_again(image, partial(ended.__setitem__, image.place))
        self._answer_put_off()  # who wants one of these mounted, or unmounted, finds that it is under way
        while len(ended) < len(images) and not self.stopping:
            self._turn(self._timeout())
        for image in images:
            error = ended.get(image.place)
            if error is None:
                continue
            if self._found is None:
                raise error
            log.error("%s cannot be mounted at %s again: %s", image.source, image.place, error)
            inside = [place for place in self.images if place == image.place or is_inside(place, image.place)]
            for place in sorted(inside, key=len, reverse=True):
                try:
                    self.mounts.umount(place)
                except NydusError as e:
                    log.error("%s: %s", place, e)

    def _start_processes(self, fds: Fds) -> None:
        """All but the front end, which reads in the table how blobs are called; in a takeover what that needs of the others."""
        self._store.hold(self._stored, fds._asdict())
        if self._found is not None:
            # Its ZeroMQ identity must be no former one's: what that asked for may be under way still.
            self._front_end.generation = self._found.generation
        self._family.add(self._guard)
        self.open_api()
        counts = {role: self._family.count(role) for role in ("fetch", "decompress")}
        if self._restoring:  # then the front end, which somebody may be waiting for; the others come one a turn
            counts = dict.fromkeys(counts, 1)
        for turn in range(max(counts.values())):
            for role, count in counts.items():
                if turn < count:
                    self._family.add(Child(role, turn, "workers"))

    def _clear_dead_mounts(self, mountpoint: str) -> None:
        """Detach what a daemon has mounted all of whose processes were killed: it reads holes. Raises MountError for others."""
        for place, device in left.mounted(self._left):
            if is_seen(place, device):
                log.warning(
                    "%s: all processes of a daemon were killed; its mount, which reads holes, is detached", place
                )
                detach(place)
        if top_is_erofs(mountpoint):
            raise MountError(f"{mountpoint}: an EROFS is mounted here already: unmount it first")

    # --- a takeover -------------------------------------------------------------------------------------------

    def _take(self, record: Json) -> list[int] | None:
        try:
            return self._take_found(record)
        except NydusError:
            self.handover.leaving = True  # what is there must stay as it is
            raise

    def _take_found(self, record: Json) -> list[int] | None:
        """What outlived a killed supervisor, if its table of images can be had."""
        found = left.take(self._left)
        if found is None:
            found = left.stored(self._left, self._store.given(self._stored))
        if found is None:
            return None
        try:
            known = table.read(found.fds.table)
            if known.ended:  # it was stopped, and those who use it still are served to their end
                raise MountError("its daemon was stopped")
            images = MountTable.take_over(self._runtime.folder / "mounts", f"{self._runtime.prefix}mounts")
            options = self.options
            assert isinstance(options, FuseOptions)
            records = readable(images, self.config, None if options.bootstrap is None else options.virtual_mountpoint)
            self._check_image(records)
            self._runtime.term = images.next_term(int(record.get("term", 0)))
        except NydusError as e:
            log.warning("what a killed daemon has mounted cannot be taken over: %s; mounting anew", e)
            self._abandon(found)
            return None
        self._found, self._former = found, (images, records)
        self._family.inherited = True
        return []

    def _check_image(self, records: Sequence[Recorded]) -> None:
        """Raises MountError when the image of the command line is not the one that is mounted. One that is gone may be it."""
        assert isinstance(self.options, FuseOptions)
        wanted = self.options.bootstrap
        for recorded in records:
            if not recorded.given:
                continue
            if wanted is None or os.path.abspath(wanted) != os.path.abspath(recorded.source):
                raise MountError(f"{recorded.source} is mounted, not {wanted}")
            with suppress(OSError):
                if identity_of(os.stat(wanted)) != recorded.facts.identity:
                    raise MountError(f"{wanted} is another image than the one that is mounted")

    def _abandon(self, found: left.Left) -> None:
        """Take out of sight what is mounted. Its guard and its front end serve those who use it still.

        Where neither lives, and only systemd has the fds, which it is about to let go: a guard of its own, before that.
        """
        self._front_end.generation = found.generation
        ended = table.read(found.fds.table)
        table.write(found.fds.table, replace(ended, ended=True))
        for place, device in left.mounted(self._left):
            if is_seen(place, device):
                detach(place)
        if not found.holders:
            self._leave_to_guard(found.fds)
        found.fds.close()
        left.let_be(found.holders)

    def _leave_to_guard(self, fds: Fds) -> None:
        """Have a guard that is nobody's hold these: it refuses what is not cached, and ends with the file systems."""
        guard = Child("guard", 1, "nydusd.frontends.erofs.guard", ("nydusd.frontends.erofs.main",))
        spec = self._guard_spec(self._front_spec(fds, 0, crashed=False))
        guard.start(self.fork_server, spec | {"log": self._family.log_spec()}, list(fds))
        if guard.process is None:
            raise MountError(f"{guard.name} cannot be started")
        priority.release(guard.process.pid)
        guard.process.close()

    def _know_mounts(self, rows: int, table: MountTable | None = None) -> None:
        super()._know_mounts(rows, None if self._former is None else self._former[0])

    def _take_up(self) -> Restore:
        """Begin to know again what was mounted."""
        assert self._former is not None and self._found is not None
        known, records = self._former
        # Also what says which chunks there are of what was unmounted and is used still: the front end looks there.
        kept = {file.segment for mounted in table.read(self._found.fds.table).mounts for file in mounted.files}
        restore = Restore(self.mounts, self.engine.router, records, control_ops.recall(self), kept)
        self._restoring = True
        restore.begin()
        known.begin_term(self._runtime.term)
        self._former = None
        return restore

    # --- children ---------------------------------------------------------------------------------------------

    def _own_spec(self, child: Child) -> tuple[list[int], Json] | None:
        """The fds and the spec of the front end and of the guard."""
        if child.role not in _OWN or self._kernel is None:
            return None
        fds = self._kernel.fds
        if child.role == "guard":
            return list(fds), self._guard_spec(self._front_spec(fds, self.pid, crashed=False))
        board = {"inflight": self.mounts.memory.board_name}
        return list(fds), self._front_spec(fds, self.pid, crashed=child.crashed) | board

    def _front_spec(self, fds: Fds, supervisor: int, *, crashed: bool) -> Json:
        return fds._asdict() | {
            "front": self._runtime.front,
            "read_deadline": self.config.nydusd.read_deadline,
            "supervisor": supervisor,
            "crashed": crashed,
        }

    def _guard_spec(self, front: Json) -> Json:
        """`front`: the spec of the front end that a copy of it may become."""
        return {name: front[name] for name in (*Fds._fields, "supervisor")} | {
            "left": str(self._left),
            "patience": self.config.nydusd.read_deadline,
            "successor": front | {"log": self._family.log_spec(), "index": 0},
        }

    def _add_front_end(self) -> None:
        """Start the front end. It holds the group, and serves as soon as no former one does that lives still (`Journal`).

        In a takeover that is waited for also where the fork server is loading. Raises NydusError when there is no room for it;
        those who hold the group before us go on then.
        """
        with self.fork_server.waited_for():
            self._family.add(self._front_end)

    def _have_guard(self) -> None:
        """See to it that a guard of ours is there, whatever its back-off: what else holds the group is about to end.

        It is waited for as long as there is no room for one: without it readers would read holes. Not for long if our front
        end is there, which holds the same. Raises EndedError when a start is told to end meanwhile.
        """
        since = time.monotonic()
        self._reap()
        until = math.inf if self._front_end.process is None else since + _GUARD_PATIENCE
        if self._guard not in self.children:  # a start that has failed
            self._family.prepare(self._guard)
            self.children.append(self._guard)
        with self.fork_server.waited_for():
            while self._guard.process is None:
                try:
                    self._family.launch(self._guard)
                except NydusError as e:
                    log.error("%s; trying again: without it readers would read holes", e)
                    if time.monotonic() >= until:
                        break
                    self._notifier.alive(time.monotonic())
                    self.told.wait(since, _PAUSE)

    def _started(self, child: Child) -> None:
        """A guard or a front end is there: note it for a successor."""
        if child.role in _OWN:
            self._note()

    def _note(self) -> None:
        """Write down who holds what, and what is mounted."""
        if self._kernel is None:
            return
        holders = [each.pid for each in self.children if each.role in _OWN and each.pid]
        seen = [(each.mountpoint, each.device) for each in self._kernel.table.mounts if not each.gone]
        former = [] if self._found is None else self._found.noted
        left.write(self._left, holders, self._kernel.fds, self._front_end.generation, seen, former)

    # --- while it serves --------------------------------------------------------------------------------------

    def _timeout(self) -> float:
        return self._kernel.sooner(super()._timeout()) if self._kernel is not None else super()._timeout()

    def _turn(self, timeout: float) -> None:
        super()._turn(timeout)
        if self._kernel is not None:
            self._kernel.tick()

    def _lost(self, place: str) -> None:
        """Somebody else has unmounted an image."""
        assert isinstance(self.options, FuseOptions)
        if self.options.bootstrap is not None and list(self.images) == [self.options.virtual_mountpoint]:
            self.ending.ask()
            return
        with suppress(NydusError):  # something is mounted in it, of which is not known yet that it is gone, too
            self.mounts.umount(place)

    # --- stop -------------------------------------------------------------------------------------------------

    def _can_leave(self) -> bool:
        return self._kernel is not None or self._found is not None

    def _spared(self) -> set[str]:
        return set() if self._kernel is None else self._kernel.table.spared

    def stop(self) -> None:
        """Unmount before anything is closed; what somebody uses still, or all in a restart, is left to front end and guard."""
        self.told.end()
        self.ending.ask()
        self._calm()  # front end and guard may be none of our children any more in a moment
        kernel = self._kernel
        gone = not self.handover.leaving
        if kernel is not None:
            gone = gone and self.ending.unmounts and kernel.hide_all()
            if not gone:
                if not self.handover.leaving:
                    log.warning("%s is used still; front end and guard stay until it is not", self.options.serves)
                    kernel.table.spare()
                if self._found is None or not self._found.holders:  # else those of the former hold it on
                    self._have_guard()
                self.children[:] = [child for child in self.children if child.role not in _OWN]
        super().stop()
        if kernel is not None:
            kernel.fds.close()
            if gone:
                self._store.drop()
                self._left.unlink(missing_ok=True)
