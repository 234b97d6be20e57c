"""Several processes reach for the same job: exactly one gets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from detour.jobs.store import Store
from queueing import farm, job_text

CLAIMANT = """
import json, sys, time
from pathlib import Path
from detour.jobs.processes import this_process
from detour.jobs.states import Verdict
from detour.jobs.store import Store

root, rounds = Path(sys.argv[1]), int(sys.argv[2])
store, me, got = Store(root / "queue"), this_process(), []
Path(root, f"ready-{me.pid}").touch()
while not Path(root, "go").exists():
    time.sleep(0.001)
while store.has_work():
    job = store.claim("cpu", me)
    if job is not None:
        got.append(job.id)
        assert store.give_up(job, "enough")
        time.sleep(0.02)  # so that one alone cannot take them all
print(json.dumps(got))
"""


@pytest.mark.parametrize(("processes", "jobs"), [(2, 40), pytest.param(8, 400, marks=pytest.mark.slow)])
def test_each_job_is_claimed_once(tmp_path, processes, jobs):
    store = Store(tmp_path / "queue", create=True)
    added = [store.add(job_text(tmp_path, f"job {number}"), cwd=tmp_path).id for number in range(jobs)]
    command = [sys.executable, "-c", CLAIMANT, str(tmp_path), str(jobs)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(processes)]
    while len(list(tmp_path.glob("ready-*"))) < processes:
        assert all(child.poll() is None for child in children)
    (tmp_path / "go").touch()
    got = [json.loads(child.communicate()[0]) for child in children]
    assert all(child.returncode == 0 for child in children)
    assert sorted(job for mine in got for job in mine) == added
    assert sum(bool(mine) for mine in got) > 1  # they did contend
    assert {job.attempts for job in store.jobs()} == {1}
    store.close()


def test_two_workers_on_one_folder(tmp_path):
    """The second finds the first and leaves; every job runs once."""
    with farm(tmp_path) as here:
        jobs = [here.add(f"job{number}") for number in range(4)]
        first = here.worker()
        command = [sys.executable, "-P", "-m", "detour.jobs.worker", str(here.folder)]
        second = subprocess.run(command, check=False, capture_output=True, timeout=60)
        assert (second.returncode, second.stderr) == (0, b"")
        for job in jobs:
            assert here.wait(job, "finished").attempts == 1
        assert first.poll() is None
        assert sorted(here.ledger()) == sorted((job.name, what) for job in jobs for what in ("begin", "finished"))
        assert Path(here.folder, "worker.log").read_text().count("starts on cpu") == 4
