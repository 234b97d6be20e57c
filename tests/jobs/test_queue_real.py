"""The real thing: `detour queue` in one program after another, the real worker, real training of the miniature."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from command import program, well
from detour.jobs import processes, queue
from detour.jobs.store import Store
from miniature import NAME, World, job_file, newest, write_world
from queueing import kill, until


@dataclass(frozen=True)
class Place:
    """A queue, and the folder of the only run that does some steps in it."""

    folder: Path
    run: Path

    def ask(self, *arguments: object) -> str:
        return well("queue", *arguments, "--folder", self.folder).out

    def job(self, number: int = 1) -> dict[str, Any]:
        """A job as `detour queue list` shows it."""
        return well("queue", "list", "--json", "--folder", self.folder).json["jobs"][number - 1]

    def wait(self, state: str) -> dict[str, Any]:
        return until(lambda: now if (now := self.job())["state"] == state else None, state)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def place(tmp_path) -> Iterator[Place]:
    yield Place(tmp_path / "queue", tmp_path / "job" / NAME)
    store = Store(tmp_path / "queue")
    for job in store.jobs(("queued", "starting")):
        store.ask_stop(job.id)
    for process in [store.worker(), *(job.process for job in store.jobs())]:
        if process is not None:
            processes.send(process, signal.SIGKILL)
    store.close()


def test_a_job_that_the_real_run_refuses(tmp_path, place):
    """Its exit code and its words arrive in the list."""
    job = job_file(World(tmp_path / "world"), tmp_path / "job")
    assert program("queue", "add", job, "--folder", place.folder).returncode == 0
    failed = place.wait("failed")
    assert (failed["cause"], failed["exit_code"]) == ("bad_input", 2)
    assert f"{tmp_path}/world/data does not exist" in failed["reason"]
    assert failed["reason"] in Path(failed["log"]).read_text()


@pytest.mark.slow
def test_a_job_is_queued_from_a_terminal_that_is_closed_and_stopped_from_another(world, tmp_path, place):
    job = job_file(world, tmp_path / "job", train={"steps": 1000})
    ran = program("queue", "add", job, "--folder", place.folder)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("job 1 (zig) is queued on cpu, place 1\n")
    job.write_text("this is not what was queued")
    until(lambda: place.job()["step"])
    assert "ends its step, saves and stops" in place.ask("stop", 1)
    stopped = place.wait("stopped")
    step = newest(place.run).step
    assert 0 < step < 1000
    assert (stopped["exit_code"], stopped["reason"]) == (130, f"stopped and saved at step {step}")
    assert "stopping (SIGINT received); saving first" in Path(stopped["log"]).read_text()


@pytest.mark.slow
def test_a_job_goes_on_after_a_stop_and_a_kill_to_its_lora(world, tmp_path, place):
    job = job_file(world, tmp_path / "job", train={"steps": 60}, save={"save_every": 2})
    place.ask("add", job)
    until((place.run / "checkpoints" / "step-000000004").exists)
    store = Store(place.folder)
    kill(store.job(1).process)
    killed, saved = place.wait("failed"), newest(place.run).step
    assert (killed["cause"], killed["exit_code"]) == ("killed", -9)
    assert killed["reason"] == f"killed by signal 9 (SIGKILL); it goes on from step {saved} when started again"
    place.ask("start", 1)
    until(lambda: store.job(1).state == "running" and (place.job()["step"] or 0) > saved)
    place.ask("stop", 1)
    stopped = place.wait("stopped")
    assert stopped["reason"] == f"stopped and saved at step {newest(place.run).step}"
    place.ask("start", 1)
    done = place.wait("finished")
    assert (done["reason"], done["attempts"], done["step"]) == ("finished at step 60", 3, 60)
    assert (place.run / f"{NAME}.safetensors").is_file()
    assert "finished at step 60" in Path(done["log"]).read_text()


@pytest.mark.slow
def test_a_job_is_stopped_while_it_is_prepared(world, tmp_path, place):
    place.ask("add", job_file(world, tmp_path / "job", train={"steps": 1000}))
    store = Store(place.folder)
    until(lambda: store.job(1).state == "running")
    time.sleep(1)  # it imports torch
    queue.stop(store, 1)
    until(lambda: store.job(1).state == "stopped")
    assert store.job(1).cause == "not_started"


@pytest.mark.slow
def test_save_now_and_sample_now(world, tmp_path, place):
    sample = {"disable_sampling": False, "skip_first_sample": True, "sample_steps": 1, "prompts": ["a zig"]}
    place.ask("add", job_file(world, tmp_path / "job", train={"steps": 1000}, sample=sample))
    until(lambda: place.job()["step"])
    store = Store(place.folder)
    queue.request(store, 1, "save")
    queue.request(store, 1, "sample")
    until(lambda: list((place.run / "samples").glob("*.png")))
    until(lambda: len(list((place.run / "checkpoints").glob("step-?????????"))) >= 2)
    place.ask("stop", 1, "--kill")
    assert place.wait("stopped")["exit_code"] == -9
