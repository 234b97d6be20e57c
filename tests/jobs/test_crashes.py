"""Real kills of trainer, supervisor and worker in every state: afterwards what is shown is true, and nothing is lost.

The trainer is a stand-in; worker and supervisor are the real ones. `settled` is what a server that starts then shows
within five seconds.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import pytest

from detour import UserError
from detour.jobs import processes, queue
from detour.jobs.processes import OomKills, Process, this_process
from detour.jobs.states import ACTIVE, ENDED
from detour.jobs.store import Job, Store
from faults import fork, wait
from queueing import STANDIN, Farm, farm, kill, reborn, until


def slow(*values: object) -> list[Any]:
    """Cases that the default tests leave out."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.fixture
def here(tmp_path):
    with farm(tmp_path) as here:
        yield here


def under_way(here: Farm, **meta) -> tuple[Job, subprocess.Popen[bytes]]:
    """A job that has done five of eight steps and holds until it may go on, and its worker."""
    job, worker = here.add(**({"steps": 8, "hold": 5} | meta)), here.worker()
    return here.wait_step(job, 5), worker


def end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()


def goes_on(here: Farm, job: Job) -> None:
    """Started again, the job goes on from where it was saved and comes to its end."""
    saved = int((job.run_folders[0] / "saved").read_text())
    here.go()
    here.store.start(job.id)
    here.serve()
    assert here.wait(job, "finished").attempts == job.attempts + 1
    starts = [line for line in (job.run_folders[0] / "events.jsonl").read_text().splitlines() if '"start"' in line]
    assert f'"step": {saved},' in starts[-1]
    assert saved >= 4
    assert (here.count("zig", "OVERLAP"), here.count("zig", "finished")) == (0, 1)


# --- running ----------------------------------------------------------------------------------------------------------


def test_the_trainer_is_killed(here):
    job, _ = under_way(here)
    kill(job.process)
    ended = here.wait(job, *ENDED, within=5)  # nobody needs to look
    assert (ended.state, ended.cause, ended.exit_code) == ("failed", "killed", -9)
    assert ended.reason.startswith("killed by signal 9 (SIGKILL); it goes on from step ")
    goes_on(here, ended)


def test_the_worker_is_killed_and_its_job_goes_on(here):
    job, worker = under_way(here)
    end(worker)
    assert here.settled(job, "running").process == job.process
    assert not queue.worker_lives(here.store)
    here.go()
    done = here.wait(job, "finished")
    assert (done.exit_code, done.reason, done.attempts) == (0, "finished at step 8", 1)


@pytest.mark.parametrize("code", [3, *slow(0, 1, 2, 7, 130)])
def test_the_exit_code_survives_the_worker(here, code):
    """The worker dies before its run does; nobody else looks."""
    job, worker = under_way(here, at={"6": {"exit": code}})
    end(worker)
    here.go()
    assert here.wait(job, *ENDED).exit_code == code


def test_the_worker_is_killed_and_the_queue_goes_on(here):
    """The supervisor of a job that ends sees to it that somebody serves those who wait."""
    job, worker = under_way(here)
    other = here.add("other")
    end(worker)
    here.go()
    assert here.wait(other, "finished").attempts == 1
    assert here.job(job).state == "finished"
    assert here.store.worker().pid != worker.pid


def test_the_supervisor_is_killed_and_the_run_goes_on(here):
    """Nobody knows its exit code then; what it wrote itself says how it ended."""
    job, _ = under_way(here)
    kill(job.supervisor)
    assert here.settled(job, "running").process == job.process
    here.go()
    done = here.wait(job, "finished")
    assert (done.exit_code, done.reason) == (None, "finished at step 8")


def test_the_supervisor_is_killed_and_then_the_run_fails(here):
    job, _ = under_way(here, at={"6": {"error": [1, "unexpected failure: RuntimeError: it broke"]}})
    kill(job.supervisor)
    here.go()
    failed = here.wait(job, "failed")
    assert (failed.cause, failed.exit_code, failed.reason) == ("failed", None, "failed: RuntimeError: it broke")


def test_supervisor_and_trainer_are_killed(here):
    job, _ = under_way(here)
    kill(job.supervisor)
    kill(job.process)
    ended = here.wait(job, "failed", within=5)  # the worker sees to it
    assert (ended.cause, ended.exit_code) == ("killed", None)
    assert ended.reason.startswith("killed together with its supervisor, by what is not known; it goes on from step")
    goes_on(here, ended)


def test_everything_is_killed(here):
    job, worker = under_way(here)
    end(worker)
    kill(job.supervisor)
    kill(job.process)
    assert here.job(job).state == "running"  # the dead say nothing
    ended = here.settled(job, "failed")
    assert ended.cause == "killed"
    goes_on(here, ended)


def test_worker_and_supervisor_are_killed_and_a_new_worker_takes_over(here):
    job, worker = under_way(here)
    waiting = here.add("waiting")
    end(worker)
    kill(job.supervisor)
    here.worker()
    time.sleep(0.5)
    assert (here.job(job).state, here.job(waiting).state) == ("running", "queued")  # the device is not free
    here.go()
    assert here.wait(job, "finished").attempts == 1
    assert here.wait(waiting, "finished").attempts == 1
    assert here.count("waiting", "OVERLAP") == 0


# --- stopping ---------------------------------------------------------------------------------------------------------


def stopping(here: Farm) -> tuple[Job, subprocess.Popen[bytes]]:
    """A job that has been asked to stop and is held before it can hear that."""
    job, worker = under_way(here)
    assert processes.send(job.process, signal.SIGSTOP)
    assert queue.stop(here.store, job.id).state == "stopping"
    return here.job(job), worker


@pytest.mark.parametrize("victims", ["w", "ws", *slow("", "s")])
def test_a_job_that_stops_saves_whoever_else_is_killed(here, victims):
    job, worker = stopping(here)
    if "w" in victims:
        end(worker)
    if "s" in victims:
        kill(job.supervisor)
    assert here.settled(job, "stopping").process == job.process
    assert processes.send(job.process, signal.SIGCONT)
    ended = here.settled(job, "stopped")
    step = int((job.run_folders[0] / "saved").read_text())
    assert ended.reason == f"stopped and saved at step {step}"
    assert ended.exit_code == (None if "s" in victims else 130)
    goes_on(here, ended)


@pytest.mark.parametrize("victims", ["t", "tws", *slow("tw", "ts")])
def test_a_job_is_killed_while_it_stops(here, victims):
    job, worker = stopping(here)
    if "w" in victims:
        end(worker)
    if "s" in victims:
        kill(job.supervisor)
    kill(job.process)
    ended = here.settled(job, "failed", "stopped")
    assert "it goes on from step" in ended.reason
    assert ended.exit_code == (None if "s" in victims else -9)
    goes_on(here, ended)


def test_whoever_asks_for_a_stop_is_killed_before_the_signal(here):
    """The request is in the store; the worker passes it on."""
    job, _ = under_way(here)
    here.store.ask_stop(job.id)
    assert here.wait(job, "stopped", within=10).reason.startswith("stopped and saved")


# --- starting ---------------------------------------------------------------------------------------------------------


def claimed(here: Farm) -> tuple[Job, Process]:
    """A job whose worker was killed between claiming it and starting its supervisor."""
    job = here.add()
    reader, writer = os.pipe()

    def worker() -> None:
        me = this_process()
        assert Store(here.folder).claim("cpu", me)
        os.write(writer, me.to_json().encode())
        time.sleep(100)

    pid = fork(worker)
    known = Process.from_json(os.read(reader, 1000).decode())
    assert here.settled(job, "starting").worker == known  # as long as it lives, it may still start it
    os.kill(pid, signal.SIGKILL)
    wait(pid)
    os.close(reader)
    os.close(writer)
    return here.job(job), known


def test_the_worker_is_killed_before_it_started_the_supervisor(here):
    job, _ = claimed(here)
    back = here.settled(job, "queued")
    assert (back.position, back.reason) == (1, "queued again: its worker ended before it could begin")
    here.worker()
    assert here.wait(job, "finished").attempts == 2


def supervise(here: Farm, job: Job, patch: str = "", token: str | None = None) -> int:
    """A supervisor of its own, with something happening at a moment that a test cannot hit otherwise."""
    code = (
        "import os, signal, sys\nfrom detour.jobs import supervisor\nfrom detour.jobs.store import Store\n"
        "supervisor.queue.ensure_worker = lambda *all, **more: None\n"  # nobody else is to take the job up
        f"die = lambda: os.kill(os.getpid(), signal.SIGKILL)\nbegin = Store.begin\n{patch}\n"
        "sys.exit(supervisor.main(sys.argv[1:]))\n"
    )
    arguments = [str(here.folder), str(job.id), str(token or job.token), "--", *STANDIN]
    ran = subprocess.run([sys.executable, "-c", code, *arguments], check=False, capture_output=True, timeout=60)
    time.sleep(0.2)  # a run that was let go would have begun by now
    return ran.returncode


def test_a_supervisor_that_comes_late_runs_nothing(here):
    job, _ = claimed(here)
    here.settled(job, "queued")
    assert supervise(here, job) == 0
    assert here.ledger() == []


def test_a_late_supervisor_does_not_take_the_place_of_the_right_one(here):
    """The job was claimed again meanwhile: its attempt has another name."""
    job, _ = claimed(here)
    here.settled(job, "queued")
    assert here.store.claim("cpu", this_process())
    assert supervise(here, job, token=job.token) == 0
    assert here.ledger() == []
    assert here.job(job).state == "starting"


def test_a_stop_reaches_a_run_that_is_about_to_begin(here):
    job, _ = claimed(here)
    patch = (
        "Store.begin = lambda store, job, me, run, oom: begin(store, job, me, run, oom) "
        "and store.ask_stop(job.id) and (os.kill(run.pid, signal.SIGINT) or True)"
    )
    assert supervise(here, job, patch) == 0
    assert here.ledger() == []
    ended = here.job(job)
    assert (ended.state, ended.cause, ended.exit_code) == ("stopped", "not_started", -2)


def test_a_job_that_is_taken_back_while_its_supervisor_begins_does_not_run(here):
    job, _ = claimed(here)
    patch = "Store.begin = lambda store, job, *rest: store.hand_back(job) and begin(store, job, *rest)"
    assert supervise(here, job, patch) == 0
    assert here.ledger() == []
    assert here.job(job).state == "queued"


def test_the_supervisor_is_killed_before_the_run_is_recorded(here):
    job, _ = claimed(here)
    assert supervise(here, job, "Store.begin = lambda *all: die()") == -9
    assert here.ledger() == []
    assert here.settled(job, "queued").position == 1


def test_the_supervisor_is_killed_after_the_run_is_recorded_and_before_it_begins(here):
    job, _ = claimed(here)
    assert supervise(here, job, "Store.begin = lambda *all: begin(*all) and die()") == -9
    assert here.ledger() == []
    assert here.settled(job, "failed").cause == "killed"


def test_the_supervisor_is_killed_before_it_writes_the_end_down(here):
    job, _ = claimed(here)
    assert supervise(here, job, "Store.conclude = lambda *all: die()") == -9
    done = here.settled(job, "finished")
    assert (done.reason, done.exit_code) == ("finished at step 3", None)


def test_a_supervisor_that_cannot_begin_says_why(here):
    job = here.add()
    here.store.job_folder(job.id).parent.mkdir()
    here.store.job_folder(job.id).write_text("a file where its folder should be")
    here.worker()
    failed = here.wait(job, "failed")
    assert "could not be started" in failed.reason
    assert "is a file where a folder is needed" in failed.reason


def test_a_job_is_stopped_while_it_starts(here):
    job, _ = claimed(here)
    assert queue.stop(here.store, job.id).state == "stopped"
    assert supervise(here, job) == 0
    assert here.ledger() == []
    assert here.job(job).cause == "not_started"


# --- the machine, and numbers that belong to others -------------------------------------------------------------------


def rewrite(here: Farm, job: Job, **values: str | None) -> None:
    """Change what the store remembers of a job's processes."""
    db = sqlite3.connect(here.folder / "queue.db")
    for column, value in values.items():
        db.execute(f"UPDATE job SET {column} = ? WHERE id = ?", (value, job.id))
    db.commit()
    db.close()


def recorded(here: Farm, process: Process) -> Job:
    """A job that is running, says the store, as that process."""
    job = here.store.claim("cpu", process) if here.add() else None
    assert job is not None
    assert here.store.begin(job, process, process, OomKills())
    return here.job(job)


@pytest.mark.parametrize("state", ACTIVE)
def test_the_machine_is_restarted(here, state):
    """The numbers are those of living processes, and the boot is another."""
    before = replace(this_process(), boot="an earlier one")
    if state == "starting":
        here.add()
        job = here.store.claim("cpu", before)
        assert here.settled(job, "queued").position == 1
        return
    job = recorded(here, before)
    processes.beat(here.store.heartbeat(job.id))
    if state == "stopping":
        here.store.ask_stop(job.id)
    ended = here.settled(job, "failed")
    assert (ended.cause, ended.reason) == ("machine", "the machine went down or was restarted while it ran")


def test_the_number_of_a_dead_run_belongs_to_another_process(here):
    """An honest number, a living process, another birth: not ours, and no signal for it."""
    bystander = subprocess.Popen(["sleep", "100"])
    try:
        known = processes.identify(bystander.pid)
        job = recorded(here, replace(known, started=str(int(known.started) - 100)))
        queue.stop(here.store, job.id, kill=True)
        assert here.settled(job, "stopped", "failed").exit_code is None
        time.sleep(0.1)
        assert bystander.poll() is None
    finally:
        end(bystander)


def gone(pid: int) -> bool:
    """Whether a number becomes free in a while."""
    for _ in range(100):
        if processes._look(pid) is None:
            return True
        time.sleep(0.02)
    return False


def test_the_number_of_a_dead_run_is_really_given_out_again(here):
    job, worker = under_way(here)
    end(worker)
    kill(job.supervisor)
    kill(job.process)
    if not gone(job.process.pid):
        pytest.skip("nobody buries orphans here, so that their numbers stay in use")
    other = reborn(job.process.pid)
    if other is None:
        pytest.skip("only root may choose the next process number")
    try:
        queue.stop(here.store, job.id, kill=True)
        here.settled(job, "stopped", "failed")
        assert other.poll() is None
    finally:
        end(other)


def test_a_run_in_another_container_counts_as_long_as_its_heart_beats(here):
    job = recorded(here, replace(this_process(), namespace="pid:[1]"))
    heartbeat = here.store.heartbeat(job.id)
    heartbeat.parent.mkdir(parents=True)
    processes.beat(heartbeat)
    queue.settle(here.store)
    assert here.job(job).state == "running"
    old = time.time() - processes.LEASE
    os.utime(heartbeat, (old, old))
    assert here.settled(job, "failed").cause == "killed"


# --- trouble ----------------------------------------------------------------------------------------------------------


def test_the_folder_vanishes_and_comes_back(here):
    """The run goes on, the worker leaves and says why; when the folder is back, the state is right."""
    job, worker = under_way(here)
    here.folder.rename(here.root / "elsewhere")
    assert worker.wait(10) == 1
    assert not here.folder.exists()  # nobody made an empty queue in its place
    here.go()
    until(lambda: not processes._same(job.supervisor))
    (here.root / "elsewhere").rename(here.folder)
    assert "the queue's folder was moved, removed or replaced" in (here.folder / "worker.log").read_text()
    assert "The job ended: finished at step 8" in here.log(job)
    assert here.settled(job, "finished").reason == "finished at step 8"


@pytest.mark.slow
def test_the_disk_is_full_when_a_job_ends(tmp_path):
    """On a real file system without space: nobody can add, nobody can write the end down; with space, all is right."""
    disk = tmp_path / "queue"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=False, capture_output=True
    ).returncode:
        pytest.skip("only root may mount")
    try:
        with farm(tmp_path) as here:
            job, worker = under_way(here)
            with pytest.raises(OSError, match="No space"):
                (disk / "filler").write_bytes(b"x" * (1 << 21))
            with (disk / "filler").open("ab") as filler, pytest.raises(OSError, match="No space"):
                while True:
                    os.write(filler.fileno(), b"x")
            with pytest.raises(UserError, match="no space"):
                for number in range(200):
                    here.add(f"large{number}", note="x" * 5000)
            before = here.store.jobs()
            here.go()
            until(lambda: here.count("zig", "finished"))
            time.sleep(2)
            assert here.store.jobs() == before
            assert worker.poll() is None
            (disk / "filler").unlink()
            done = here.wait(job, "finished")
            assert (done.exit_code, done.reason) == (0, "finished at step 8")
            assert here.add("one more").position
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


# --- at any moment ----------------------------------------------------------------------------------------------------


def kill_at_random(here: Farm, jobs: int, rounds: int, seed: int) -> None:
    """Kill whatever is at work, again and again. What is shown must be true each time, and in the end all is done."""
    rng = random.Random(seed)
    added = [here.add(f"job{number}", steps=rng.randrange(4, 12), pause=0.01) for number in range(jobs)]
    for _ in range(rounds):
        here.serve()
        time.sleep(rng.uniform(0, 0.4))
        worker = here.store.worker()
        victims = [worker] if worker and rng.random() < 0.6 else []
        for job in here.store.jobs(ACTIVE):
            victims += [process for process in (job.supervisor, job.process) if process and rng.random() < 0.4]
        for victim in victims:
            processes.send(victim, signal.SIGKILL)
        until(lambda: all_true(here), "true states", within=5)
        for job in here.store.jobs(("failed",)):
            here.store.start(job.id)
    until(lambda: finished(here), within=120)
    assert {here.job(job).state for job in added} == {"finished"}
    happened = here.ledger()
    assert not [line for line in happened if "OVERLAP" in line]
    for job in added:
        begun, ended = (happened.count((job.name, what)) for what in ("begin", "finished"))
        assert 1 <= ended <= begun <= here.job(job).attempts


def all_true(here: Farm) -> bool:
    """Does everything that counts as at work live?"""
    queue.settle(here.store)
    for job in here.store.jobs(ACTIVE):
        known = [job.worker] if job.state == "starting" else [job.supervisor, job.process]
        if not any(processes.alive(process, here.store.heartbeat(job.id)) for process in known if process):
            return False
    return True


def finished(here: Farm) -> bool:
    here.serve()
    for job in here.store.jobs(("failed",)):
        here.store.start(job.id)
    return not here.store.has_work()


def test_kills_at_random_moments(here):
    kill_at_random(here, jobs=3, rounds=6, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_more_kills_at_random_moments(here, seed):
    kill_at_random(here, jobs=25, rounds=120, seed=seed)
