"""`make torture`: processes of a daemon are killed at random while 16 readers compare every byte.

TORTURE_MINUTES (10) says how long, TORTURE_SEED repeats the choices of a run, TORTURE_ROUND begins it with that round,
TORTURE_WAY (fuse) is how the image is read: fuse, fanotify or blobfs. After an act by which another supervisor
takes over, or a fork server has to be loaded, nothing more is done until each reader has been answered what it asked for
meanwhile: so the longest read is what one such act costs, and what else was killed while it was made good.
With TORTURE_PACE=storm that is not waited for, with TORTURE_PACE=calm after all other acts as well.
TORTURE_NURSERY=1 or 0: with all daemons, or none, successors come from a nursery (else with half of them). With
TORTURE_LONGEST=N a read of more than N seconds is a failure, too; those in which we had stopped a process do not count.

A round is one daemon: with a cache folder that
is empty at first, or with none (all data comes through shared memory); its blob in a folder or a registry; looked after as
by nydus-snapshotter, or by the same command started again. What may happen to it is in `acts.py`. After each round the
daemon is told to end, and what it leaves behind is looked for. At the end come counts: of acts by their kind, and of killed
processes by theirs. The exit status is 0 if no read failed, was wrong, or took too long, and nothing was left.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sys
import time
from datetime import datetime
from pathlib import Path

from bench.image import Built, build
from tests.support.daemon import Daemon, image_config, wait_for_role
from tests.support.discipline import discipline
from tests.support.faulty_server import Faulty, faulty, part_of
from tests.support.keeper import Keeper
from tests.support.mounted import REPO
from tests.support.nursery import wait_for_end
from tests.support.readers import bytes_read, longest_reads, pieces_read
from tests.support.trees import half_random_tree
from tests.support.verifying import Verifying
from tests.torture.acts import PATIENCE, Counts, Round
from tests.torture.copied import CopiedDaemon

READERS = 16
FILES, FILE_SIZE, CHUNK = 64, 1 << 20, 1 << 16
ROUND_SECONDS = 30.0
_LOG_SHOWN = 64 * 1024
WAY = os.environ.get("TORTURE_WAY", "fuse")
NURSERY = {"": None, "0": False, "1": True}[os.environ.get("TORTURE_NURSERY", "")]
PACE = os.environ.get("TORTURE_PACE", "usual")
FRONT_ENDS = ("erofs", "guard") if WAY == "fanotify" else ("fuse",)
_EXPECTED = ("workers died", "fetching it again")
"""Errors in a log that are no problem here: by kills, and by what becomes of a cache file."""


class Registry:
    """One that has the blob, in this process."""

    def __init__(self, blob: Path, server: Faulty) -> None:
        data = blob.read_bytes()
        server.handlers[f"/v2/{REPO}/blobs/sha256:{blob.name}"] = lambda request: part_of(data, request)
        self._host = server.host

    def backend(self) -> dict[str, object]:
        return {"type": "registry", "config": {"scheme": "http", "host": self._host, "repo": REPO}}


class Trial:
    """A round, and the readers of its daemon."""

    def __init__(self, built: Built, tree: Path, folder: Path, seed: str, counts: Counts, registry: Registry) -> None:
        choose = random.Random(seed)
        self.folder = folder
        self.tree = tree
        self.problems: list[str] = []
        self.cached = WAY != "fuse" or choose.random() < 0.6
        config = image_config(built.blob.parent, folder / "cache") | {"amplify_io": choose.choice((0, 1 << 20))}
        config["nydusd"] = {"front_ends": choose.choice((1, 2)), "worker_patience": PATIENCE, "cache_keep": 0}
        device = config["device"]
        assert isinstance(device, dict)
        if not self.cached:
            device["cache"]["type"] = ""
        self.remote = choose.random() < 0.5
        if self.remote:
            device["backend"] = registry.backend()
        self.keeper = Keeper(folder) if WAY == "fuse" and choose.random() < 0.5 else None
        self.copied = NURSERY if NURSERY is not None else choose.random() < 0.5
        self.daemon = (CopiedDaemon if self.copied else Daemon)(
            built.bootstrap,
            built.blob.parent,
            cache=folder / "cache",
            config=config,
            verb="fuse" if WAY == "fuse" else "erofs",
            args=("--driver", WAY) if WAY != "fuse" else self.keeper.args if self.keeper is not None else (),
            environment={"NYDUSD_NURSERY": "always" if self.copied else "off"},
        )
        self.round = Round(self.daemon, self.keeper, FRONT_ENDS, seed, counts, cached=self.cached)
        self._seed = choose.randrange(1 << 32)
        self.progress = folder / "progress"

    def run(self, until: float) -> None:
        with self.daemon as daemon, contextlib.closing(self.keeper) if self.keeper else contextlib.nullcontext():
            if self.keeper is not None:
                self.keeper.save(daemon)
            readers = Verifying(daemon.mountpoint, self.tree, self.folder, READERS, seed=self._seed)
            readers.start()
            try:
                while time.monotonic() < until and not readers.have_ended():
                    loads = self.round.hurt()
                    if PACE == "calm" or (PACE == "usual" and loads):
                        readers.all_go_on()
            finally:
                self.problems += readers.stop()
                self.round.upgrades.wait()
                self.problems += self.round.upgrades.problems
            wait_for_role(daemon, "api", 1)
            if self.problems:
                self.tell()
        if self.copied:
            wait_for_end()
        self.problems += [line for line in discipline.logs.problems() if not any(each in line for each in _EXPECTED)]

    def longest(self) -> tuple[float, list[str]]:
        """Seconds of the longest read, less those in which we had stopped something, and what was done around it."""
        reads = longest_reads(self.progress)
        took, began, all_of_it = max(
            ((took - self.round.stalled(began, took), began, took) for began, took in reads),
            default=(0.0, datetime.now(), 0.0),
        )
        return took, self.round.around(began, all_of_it)

    def tell(self) -> None:
        """How it came to that."""
        for when, kind in self.round.history:
            print(f"{when:%H:%M:%S.%f} {kind}", file=sys.stderr)
        print(self.daemon.log.read_text(errors="replace")[-_LOG_SHOWN:], file=sys.stderr)


def main() -> int:
    minutes = float(os.environ.get("TORTURE_MINUTES", "10"))
    seed = int(os.environ.get("TORTURE_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
    print(f"seed {seed} (TORTURE_SEED repeats its choices), {minutes:g} minutes", flush=True)
    discipline.start()
    rooms = contextlib.ExitStack()
    counts = Counts()
    problems: list[str] = []
    first = int(os.environ.get("TORTURE_ROUND", "1")) - 1
    most = float(os.environ.get("TORTURE_LONGEST") or "inf")
    pieces, content, longest, rounds = 0, 0, (0.0, list[str]()), first
    try:
        tree = discipline.folder / "tree"
        tree.mkdir()
        half_random_tree(tree, FILES, FILE_SIZE, CHUNK)
        built = build(tree, discipline.folder / "image", CHUNK)
        registry = Registry(built.blob, rooms.enter_context(faulty()))
        end = time.monotonic() + minutes * 60
        while time.monotonic() < end and not problems:
            folder = discipline.folder / f"round{rounds}"
            folder.mkdir()
            before = discipline.snapshot()
            acts, kills = counts.acts.total(), counts.kills.total()
            this = Trial(built, tree, folder, f"{seed}/{rounds}", counts, registry)
            this.run(min(end, time.monotonic() + ROUND_SECONDS))
            problems += this.problems + [f"left behind: {what}" for what in discipline.leftovers(before)]
            pieces += pieces_read(this.progress)
            content += bytes_read(this.progress)
            took, around = this.longest()
            longest = max(longest, (took, around))
            if took > most:
                if not this.problems:
                    this.tell()
                problems.append(
                    f"a read took {took:.2f} s, around {', '.join(around) or 'nothing'}: more than {most:g} s"
                )
            rounds += 1
            print(
                f"round {rounds}: {'cache' if this.cached else 'no cache'}, {'registry' if this.remote else 'folder'},"
                f" {'kept' if this.keeper else 'restarted'}, {'from a nursery' if this.copied else 'by itself'},"
                f" {counts.acts.total() - acts} acts, {counts.kills.total() - kills} kills,"
                f" {pieces_read(this.progress):,} reads, longest {took:.2f} s (around: {', '.join(around) or 'nothing'})",
                flush=True,
            )
            shutil.rmtree(folder)
    finally:
        rooms.close()
        discipline.finish()
    print("acts:", json.dumps(dict(sorted(counts.acts.items()))))
    print("kills:", json.dumps(dict(sorted(counts.kills.items()))))
    print("upgrades of the workers:", json.dumps(dict(sorted(counts.upgrades.items()))))
    print("stops for long:", json.dumps(dict(sorted(counts.stops.items()))))
    print(
        f"{counts.acts.total()} acts, {counts.kills.total()} kills, {pieces:,} reads ({content / 2**30:.1f} GiB),"
        f" longest {longest[0]:.2f} s around {len(longest[1])} acts, {len(problems)} problems (of reads, in logs, left behind)"
    )
    for problem in problems[:50]:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
