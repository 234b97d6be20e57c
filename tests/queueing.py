"""Queues for tests: job files that a stand-in runs, real workers and supervisors, and waiting for what they do."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detour.jobs import processes, queue
from detour.jobs.store import Job, Store

STANDIN = [sys.executable, "-S", "-E", "-s", str(Path(__file__).parent / "jobs" / "standin.py")]
_LAST_PID = Path("/proc/sys/kernel/ns_last_pid")
PATIENCE = 60.0  # seconds, on a machine where much else is going on
SETTLED = 5.0  # seconds within which the states must be right


def job_text(folder: Path, name: str = "zig", device: str = "cpu", **meta: Any) -> str:
    """A job file in `folder` that is right for Detour and tells the stand-in what to do."""
    process = {
        "type": "train",
        "device": device,
        "model": {"arch": "zimage"},
        "datasets": [{"folder_path": str(folder / "pictures")}],
    }
    meta = {"steps": 3, "ledger": str(folder / "ledger")} | meta
    config = {"output_name": name, "output_folder": str(folder / "output"), "process": [process]}
    return json.dumps({"config": config, "meta": meta})


def until(there: Callable[[], Any], what: str = "it", within: float = PATIENCE) -> Any:
    """Wait for something; returns it."""
    began = time.monotonic()
    while not (found := there()):
        assert time.monotonic() - began < within, f"{what} did not come about in {within} s"
        time.sleep(0.02)
    return found


class Farm:
    """A queue in a folder, with everything that was started for it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "queue"
        self.store = Store(self.folder, create=True)
        self.children: list[subprocess.Popen[bytes]] = []

    def add(self, name: str = "zig", **meta: Any) -> Job:
        return self.store.add(job_text(self.root, name, **meta), cwd=self.root)

    def go(self) -> None:
        """Let runs that hold (`hold`) go on."""
        (self.root / "ledger.go").touch()

    def job(self, job: Job) -> Job:
        return self.store.job(job.id)

    def worker(self, *, idle: float = 60.0) -> subprocess.Popen[bytes]:
        """Start a worker and wait until it serves."""
        command = [
            sys.executable,
            "-P",
            "-m",
            "detour.jobs.worker",
            str(self.folder),
            "--idle",
            str(idle),
            "--",
            *STANDIN,
        ]
        with (self.folder / "worker.log").open("ab") as log:
            child = subprocess.Popen(command, stdout=log, stderr=log)
        self.children.append(child)
        until(lambda: self.serves(child), "a worker")
        return child

    def serve(self) -> None:
        """See that some worker serves."""
        queue.ensure_worker(self.store, options=("--", *STANDIN))

    def serves(self, child: subprocess.Popen[bytes]) -> bool:
        worker = self.store.worker()
        return worker is not None and worker.pid == child.pid and queue.worker_lives(self.store)

    def wait(self, job: Job, *states: str, within: float = PATIENCE) -> Job:
        """Wait until a job is in one of some states, without looking after it."""
        return until(lambda: now if (now := self.job(job)).state in states else None, f"{states} of {job}", within)

    def wait_step(self, job: Job, step: int) -> Job:
        until(lambda: (queue.last_step(job) or 0) >= step, f"step {step}")
        return self.job(job)

    def settled(self, job: Job, *states: str) -> Job:
        """What a server that starts now shows within the time that is promised."""

        def look() -> Job | None:
            queue.settle(self.store)
            now = self.job(job)
            return now if now.state in states else None

        return until(look, f"{states} of {self.job(job)}", SETTLED)

    def log(self, job: Job) -> str:
        return self.store.log_file(self.job(job)).read_text()

    def ledger(self) -> list[tuple[str, str]]:
        """(name, what happened) of all runs."""
        file = self.root / "ledger"
        lines = file.read_text().splitlines() if file.exists() else []
        return [(line.split()[0], line.split()[2]) for line in lines]

    def count(self, name: str, what: str) -> int:
        return Counter(self.ledger())[name, what]

    def close(self) -> None:
        """End what was started for this queue, and nothing else."""
        for _ in range(3):  # a supervisor that ends may start a worker
            for process in self.processes():
                if process.pid != os.getpid():
                    processes.send(process, signal.SIGKILL)
            for child in self.children:
                child.kill()
                child.wait()
            time.sleep(0.05)
        self.store.close()

    def processes(self) -> Iterator[processes.Process]:
        worker = self.store.worker()
        known = [worker] if worker else []
        for job in self.store.jobs(("queued", "starting")):
            self.store.ask_stop(job.id)  # nobody is to start it any more, nor a supervisor that is on its way
        for job in self.store.jobs():
            known += [process for process in (job.worker, job.supervisor, job.process) if process]
        yield from known


@contextmanager
def farm(root: Path) -> Iterator[Farm]:
    here = Farm(root)
    try:
        yield here
    finally:
        with contextlib.suppress(OSError):
            here.close()


def kill(process: processes.Process | None, number: signal.Signals = signal.SIGKILL) -> None:
    """Kill a process that is known to live, and wait until it does not."""
    assert process is not None
    assert processes.send(process, number)
    until(lambda: not processes._same(process), "its death")


def reborn(pid: int) -> subprocess.Popen[bytes] | None:
    """Another process with a number that was somebody's. The kernel gives the next one out after `ns_last_pid`."""
    for _ in range(200):
        try:
            _LAST_PID.write_text(str(pid - 1))
        except OSError:
            return None
        child = subprocess.Popen(["sleep", "100"])
        if child.pid == pid:
            return child
        child.kill()
        child.wait()
    return None
