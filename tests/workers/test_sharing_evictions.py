"""Chunks are not taken out of a cache file under others that use it."""

from __future__ import annotations

import os
import subprocess
import sys

from nydusd.storage.state.names import inode_of, remove
from tests.workers.harness import Jobs
from tests.workers.shared_file import job_to_evict, twin
from workers.evict import evict, survey


class TestEvictionBesideOthers:
    def test_segment_of_our_own_in_which_nothing_was_claimed_keeps_the_chunks(self, made: Jobs) -> None:
        """Another configuration's: its readers would read the hole."""
        with twin(made) as other:
            assert evict(made.open, job_to_evict(made))["kept"] == other.name
            assert evict(made.open, job_to_evict(made, other.name))["evicted"] == 1

    def test_segment_that_was_opened_anew_since_keeps_them(self, made: Jobs) -> None:
        with twin(made) as other:
            job = job_to_evict(made, other.name)
            remove(other.name)
            with twin(made) as fresh:
                assert evict(made.open, job)["kept"] == fresh.name

    def test_segment_that_an_earlier_life_left_does_not_and_ends(self, made: Jobs) -> None:
        with twin(made) as other:
            assert evict(made.open, job_to_evict(made, strays=(other.name,)))["evicted"] == 1
            assert inode_of(other.name) == 0

    def test_blob_mounted_since_the_survey_was_ordered_stays(self, made: Jobs) -> None:
        job = {"folder": str(made.work_dir), "limit": 1, "target": 0, "unused": True, "mounted": {}}
        answer = survey(made.open, job | {"now": 10**6, "keep": 0, "strays": {}, "pids": [os.getpid()]})
        assert answer["removed"] == [] and made.data.exists()

    def test_process_that_has_the_file_by_another_path_keeps_it(self, made: Jobs) -> None:
        link = made.work_dir / "link"
        os.link(made.data, link)
        code = "import sys; f = open(sys.argv[1]); print(flush=True); sys.stdin.read()"
        with subprocess.Popen(
            [sys.executable, "-c", code, str(link)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as strange:
            assert strange.stdout is not None
            strange.stdout.readline()
            answer = evict(made.open, job_to_evict(made))
            strange.communicate()
        assert answer["kept"] == f"process {strange.pid}"
