"""Asking jobs to stop, save and sample, the comings and goings of workers, and what is promised to those who wait."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from detour import UserError
from detour.jobs import processes, queue
from detour.jobs.states import StateError
from detour.jobs.worker import Worker
from queueing import STANDIN, Farm, farm, until


@pytest.fixture
def here(tmp_path):
    with farm(tmp_path) as here:
        yield here


def held(here: Farm, **meta):
    """A job that has done five of eight steps and holds there."""
    job = here.add(**({"steps": 8, "hold": 5} | meta))
    here.worker()
    return here.wait_step(job, 5)


def saved(job) -> int:
    return int((job.run_folders[0] / "saved").read_text())


def test_stop_saves_first_and_start_goes_on(here):
    job = held(here, save=100)
    assert queue.stop(here.store, job.id).state == "stopping"
    stopped = here.wait(job, "stopped")
    assert (stopped.reason, stopped.exit_code, saved(job)) == ("stopped and saved at step 5", 130, 5)
    with pytest.raises(StateError, match="is not running: it is stopped"):
        queue.stop(here.store, job.id)
    here.go()
    assert here.store.start(job.id).state == "queued"
    assert here.wait(job, "finished").attempts == 2
    assert steps(job) == list(range(1, 9))  # none twice, none left out


def steps(job) -> list[int]:
    lines = (job.run_folders[0] / "events.jsonl").read_text().splitlines()
    return [event["step"] for event in map(json.loads, lines) if event["type"] == "step"]


def test_stop_during_a_long_step_and_again(here):
    """The first one waits for the end of the step, the second does not."""
    job = here.add(steps=8, pause=100, save=100)
    here.worker()
    until((job.run_folders[0] / "saved").exists)
    assert queue.stop(here.store, job.id).stops == 1
    time.sleep(0.5)
    assert here.job(job).state == "stopping"
    assert queue.stop(here.store, job.id).stops == 2
    ended = here.wait(job, "stopped", within=5)
    assert (ended.reason, ended.exit_code) == (
        "stopped at once after step 0; it goes on from step 0 when started again",
        130,
    )


def test_stop_while_it_is_being_prepared(here):
    job = here.add(prepare=100)
    here.worker()
    until(lambda: here.count("zig", "begin"))
    queue.stop(here.store, job.id)
    ended = here.wait(job, "stopped", within=5)
    assert (ended.cause, ended.reason) == ("not_started", "stopped before the first step")


def test_a_stop_signal_that_is_swallowed_is_asked_for_again(here):
    """The request file was taken away during preparation; the worker puts it there again."""
    job = held(here)
    here.store.ask_stop(job.id)
    assert here.wait(job, "stopped", within=5).exit_code == 130


def test_kill(here):
    job = held(here)
    assert processes.send(job.process, signal.SIGSTOP)  # it can do nothing at all
    assert queue.stop(here.store, job.id, kill=True).state == "stopping"
    ended = here.wait(job, "stopped", within=5)
    assert ended.reason == "stopped at once after step 5; it goes on from step 5 when started again"
    assert ended.exit_code == -9


def test_a_queued_job_is_taken_out_and_put_back(here):
    job, other = here.add("a"), here.add("b")
    assert queue.stop(here.store, job.id).reason == "stopped before it began"
    assert here.job(other).position == 1
    assert here.store.start(job.id).position == 2


def test_save_now_and_sample_now(here):
    job = held(here, save=100)
    queue.request(here.store, job.id, "sample")
    log = job.run_folders[0] / "events.jsonl"
    until(lambda: '"sample"' in log.read_text())
    queue.request(here.store, job.id, "save")
    until(lambda: not (job.run_folders[0] / "requests" / "save").exists())
    here.go()
    here.wait(job, "finished")
    for what in ("save", "sample"):
        with pytest.raises(StateError, match=f"is finished: only a running job can {what}"):
            queue.request(here.store, job.id, what)


def test_nothing_to_save_while_it_is_being_prepared(here):
    job = here.add(prepare=100)
    here.worker()
    until(lambda: here.count("zig", "begin"))
    with pytest.raises(StateError, match="is still being prepared: there is nothing to save yet"):
        queue.request(here.store, job.id, "save")


def test_a_request_is_not_lost_while_a_job_that_goes_on_is_being_prepared(here):
    """Its folder is there from the last time, and what lies in it is taken for old."""
    job = held(here)
    queue.stop(here.store, job.id)
    stopped = here.wait(job, "stopped")
    here.store.edit(job.id, here.store.text(job.id).replace('"steps": 8', '"steps": 8, "prepare": 100'))
    here.store.start(job.id)
    until(lambda: here.count("zig", "begin") == 2)
    with pytest.raises(StateError, match="is still being prepared: there is nothing to sample yet"):
        queue.request(here.store, stopped.id, "sample")


def test_run_and_supervisor_belong_to_no_terminal(here):
    """Ctrl-C and a closed window reach neither; what is sent to the supervisor does not end its run unrecorded."""
    job = held(here)
    assert len({os.getsid(process.pid) for process in (job.process, job.supervisor, job.worker)} | {os.getsid(0)}) == 3
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        assert processes.send(job.supervisor, number)
    time.sleep(0.2)
    here.go()
    assert here.wait(job, "finished").exit_code == 0


def test_a_worker_started_where_signals_are_ignored_can_stop_its_jobs(here):
    """As after `nohup`, or in the background of a script."""
    job = here.add(steps=8, pause=0.05, hold=5)
    script = 'trap "" INT TERM HUP; exec "$@"'
    command = [sys.executable, "-P", "-m", "detour.jobs.worker", str(here.folder), "--", *STANDIN]
    here.children.append(subprocess.Popen(["sh", "-c", script, "sh", *command]))
    here.wait_step(job, 3)
    queue.stop(here.store, job.id)
    assert here.wait(job, "stopped", within=10).exit_code == 130


# --- devices, order, frozen files -------------------------------------------------------------------------------------


def test_one_job_at_a_time_on_each_device(here):
    jobs = [here.add(f"{device[-1]}{number}", device=device, steps=30, pause=0.05)
            for number in range(2) for device in ("cpu", "cuda:0", "cuda:1")]  # fmt: skip
    here.worker()
    for job in jobs:
        assert here.wait(job, "finished").attempts == 1
    assert not [line for line in here.ledger() if "OVERLAP" in line]
    began = {name: place for place, (name, what) in enumerate(here.ledger()) if what == "begin"}
    ended = {name: place for place, (name, what) in enumerate(here.ledger()) if what == "finished"}
    assert max(began[f"{device}0"] for device in "u01") < min(ended[f"{device}0"] for device in "u01")  # side by side
    assert all(ended[f"{device}0"] < began[f"{device}1"] for device in "u01")


def test_jobs_run_in_the_order_of_the_queue_as_they_were_when_queued(here):
    jobs = [here.add(name) for name in "abc"]
    here.store.move(jobs[2].id, 1)
    here.store.edit(jobs[1].id, here.store.text(jobs[1].id).replace('"b"', '"B"'))
    here.worker()
    for job in jobs:
        here.wait(job, "finished")
    assert [name for name, what in here.ledger() if what == "begin"] == ["c", "a", "B"]
    assert here.store.job_file(jobs[1].id).read_text() == here.store.text(jobs[1].id)


# --- workers ----------------------------------------------------------------------------------------------------------


def test_an_idle_worker_leaves_and_no_job_is_forgotten(here):
    """Jobs are added at the very moment in which the worker leaves."""
    options = ("--idle", "0", "--", *STANDIN)
    queue.ensure_worker(here.store, options=options)
    until(lambda: here.store.worker() is None)
    for number in range(4):
        job = here.add(f"job{number}", steps=0)
        queue.ensure_worker(here.store, options=options)
        if number % 2:
            here.wait(job, "finished", within=20)
    for job in here.store.jobs():
        here.wait(job, "finished", within=20)


def test_many_who_want_a_worker_get_one(here):
    here.add(hold=1)
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom detour.jobs import queue\nfrom detour.jobs.store import Store\n"
        "store = Store(Path(sys.argv[1]))\nqueue.ensure_worker(store, options=['--', *sys.argv[2:]])\n"
        "print(store.worker().pid, os.getsid(store.worker().pid))\n"
    )
    command = [sys.executable, "-c", code, str(here.folder), *STANDIN]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
    said = {child.communicate()[0] for child in children}
    assert len(said) == 1
    pid, session = said.pop().split()
    assert pid == session  # closing the terminal of whoever started it does not end it


def test_a_worker_that_is_asked_to_end_leaves_its_jobs_alone(here):
    job = held(here)
    worker = here.children[0]
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(5) == 0
    assert here.store.worker() is None
    assert here.settled(job, "running").process == job.process


def test_a_worker_that_cannot_come_up_says_why(here):
    (here.folder / "worker.lock").mkdir()
    with pytest.raises(UserError, match="the queue's worker did not come up") as caught:
        queue.ensure_worker(here.store)
    assert "worker.lock" in str(caught.value)


def test_a_supervisor_that_cannot_be_started(here, monkeypatch):
    """No process to be had (as when their number is limited): the job says so and the queue goes on."""
    jobs = [here.add("a"), here.add("b")]

    def no_process(*args, **more):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    worker = Worker(here.store, STANDIN)
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", no_process)
        worker.tick()
        worker.tick()
    failed = here.job(jobs[0])
    assert (failed.state, failed.reason) == (
        "failed", "could not be started: [Errno 11] Resource temporarily unavailable"
    )  # fmt: skip
    worker.tick()
    worker.tick()
    assert here.wait(here.job(jobs[1]), "finished", "failed")


def test_the_queue_is_not_torch_business(here):
    """Worker and supervisor stay small beside what they look after."""
    held(here)
    sizes = [resident(process) for process in (here.store.worker(), here.store.jobs()[0].supervisor)]
    assert max(sizes) < 40 << 20


def resident(process) -> int:
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * 4096
