"""Why a job ended, in plain words: from evidence made up for every case, and from runs that really end that way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from detour.jobs.outcome import Evidence, gather, judge, last_error, training_in
from detour.jobs.states import Verdict
from detour.jobs.store import KILL, NOW, SAVE, Job
from queueing import farm, job_text, until

CUDA = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.99 GiB"
NO_MEMORY = "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
NO_SPACE = "/x/step-1 cannot be written: no space (No space left on device, 0 MiB free)"
CRASH = "killed by signal 11 (SIGSEGV), a crash in native code such as a driver or a kernel"
PROBABLY = "probably killed by the kernel because main memory ran out"
MISTAKES = "job.yaml: 2 mistakes\n  job.yaml:3: a\n  job.yaml:4: b"
FATAL = "Fatal Python error: Segmentation fault\n\nCurrent thread"
CASES = [
    (Evidence(0, step=9), Verdict("finished", "finished at step 9", 0)),
    (Evidence(0), Verdict("finished", "finished", 0)),
    (Evidence(130, end="stop requested", step=9), Verdict("stopped", "stopped and saved at step 9", 130)),
    (
        Evidence(130, step=9, saved=4),
        Verdict("stopped", "stopped at once after step 9; it goes on from step 4 when started again", 130),
    ),
    (Evidence(130), Verdict("not_started", "stopped before the first step", 130)),
    (Evidence(2, "job.yaml:3: train.lr: wrong"), Verdict("bad_input", "job.yaml:3: train.lr: wrong", 2)),
    (Evidence(2), Verdict("bad_input", "the job file, an option or an input is wrong; its log tells", 2)),
    (Evidence(3, "too large"), Verdict("refused", "refused before it began: too large", 3)),
    (
        Evidence(3, "disk: no space (3 MiB free)"),
        Verdict("refused", "refused before it began: disk: no space (3 MiB free)", 3),
    ),
    (Evidence(1, CUDA), Verdict("out_of_memory", f"the card's memory ran out: {CUDA}", 1)),
    (Evidence(1, "MemoryError: "), Verdict("out_of_memory", "main memory ran out: MemoryError: ", 1)),
    (Evidence(1, NO_MEMORY), Verdict("out_of_memory", f"main memory ran out: {NO_MEMORY}", 1)),
    (Evidence(2, NO_SPACE), Verdict("disk_full", f"the disk is full: {NO_SPACE}", 2)),
    (Evidence(1, full=True), Verdict("disk_full", "probably the disk is full", 1)),
    (Evidence(1, "ValueError: odd"), Verdict("failed", "failed (exit code 1): ValueError: odd", 1)),
    (Evidence(7), Verdict("failed", "failed without a word (exit code 7)", 7)),
    (Evidence(-9), Verdict("killed", "killed by signal 9 (SIGKILL)", -9)),
    (
        Evidence(-9, oom="group", saved=4),
        Verdict(
            "killed_by_kernel",
            "killed by the kernel: main memory ran out (the limit of its container or group)"
            "; it goes on from step 4 when started again",
            -9,
        ),
    ),
    (Evidence(-9, oom="machine"), Verdict("killed_by_kernel", PROBABLY, -9)),
    (Evidence(-9, stops=KILL, oom="machine"), Verdict("not_started", "stopped before the first step", -9)),
    (Evidence(-9, stops=KILL, step=3), Verdict("stopped", "stopped at once after step 3", -9)),
    (Evidence(-9, stops=SAVE), Verdict("killed", "killed by signal 9 (SIGKILL)", -9)),
    (Evidence(-2, stops=SAVE), Verdict("not_started", "stopped before the first step", -2)),
    (Evidence(-2), Verdict("killed", "killed by signal 2 (SIGINT)", -2)),
    (Evidence(-11), Verdict("killed", CRASH, -11)),
    (Evidence(-25), Verdict("disk_full", "a file became larger than this user may make (ulimit -f)", -25)),
    (Evidence(-40), Verdict("killed", "killed by signal 40", -40)),
    # Nobody waited for it.
    (Evidence(None, end="finished", step=9), Verdict("finished", "finished at step 9")),
    (Evidence(None, end="stop requested", step=9, restarted=True), Verdict("stopped", "stopped and saved at step 9")),
    (Evidence(None, "x", restarted=True), Verdict("machine", "the machine went down or was restarted while it ran")),
    (Evidence(None, CUDA), Verdict("out_of_memory", f"the card's memory ran out: {CUDA}")),
    (Evidence(None, "it broke"), Verdict("failed", "failed: it broke")),
    (
        Evidence(None, oom="group"),
        Verdict("killed_by_kernel", "probably killed by the kernel because main memory ran out"),
    ),
    (Evidence(None, step=3, stops=NOW), Verdict("stopped", "stopped at once after step 3")),
    (Evidence(None), Verdict("killed", "killed together with its supervisor, by what is not known")),
]


@pytest.mark.parametrize(("found", "verdict"), CASES)
def test_verdicts(found, verdict):
    assert judge(found) == verdict


@pytest.mark.parametrize(
    ("log", "error"),
    [
        ("", ""),
        ("step 3\nerrors: none\n", ""),
        (f"error: the first\nstep 4\nerror: {MISTAKES}\n", MISTAKES),
        ("unexpected failure: KeyError: 'x'\n(--debug shows where)\n", "KeyError: 'x'"),
        ("Traceback (most recent call last):\n  File\nOSError: [Errno 28] No space\n", "OSError: [Errno 28] No space"),
        (FATAL, FATAL),
        ("error: " + "x" * 5000, "x" * 997 + "..."),
    ],
)  # fmt: skip
def test_the_last_error_of_a_log(log, error):
    assert last_error(log) == error


def test_the_end_of_one_process_is_not_the_end_of_the_job(tmp_path):
    """Killed with its supervisor between two processes; events of an earlier attempt count for nothing."""
    folders = (tmp_path / "zig", tmp_path / "zig_2")
    job = Job(
        id=1, name="zig", device="cpu", state="running", cwd=tmp_path, run_folders=folders, created=0, started=100.0
    )
    log = tmp_path / "log"

    def events(folder: Path, *found: tuple[str, float, str]) -> None:
        folder.mkdir()
        lines = [{"type": kind, "time": at, "step": 6, "reason": reason} for kind, at, reason in found]
        (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    assert gather(job, log, None, None) == Evidence(None)
    events(folders[0], ("start", 101.0, ""), ("end", 102.0, "finished"))
    assert gather(job, log, None, None) == Evidence(None, step=6)
    assert judge(gather(job, log, None, None)).cause == "killed"
    assert training_in(job) is None
    events(folders[1], ("start", 90.0, ""), ("end", 95.0, "finished"))
    assert judge(gather(job, log, None, None)).cause == "killed"
    with (folders[1] / "events.jsonl").open("a") as file:
        file.write('{"type": "start", "time": 103, "step": 0}\n{"type": "step", "time": 104, "step": 1}\n')
    assert training_in(job) == folders[1]
    assert gather(job, log, None, None) == Evidence(None, step=1)
    with (folders[1] / "events.jsonl").open("a") as file:
        file.write('{"type": "end", "time": 105, "step": 9, "reason": "finished"}\n')
    assert judge(gather(job, log, None, None)) == Verdict("finished", "finished at step 9")
    (folders[1] / "events.jsonl").write_bytes(b"\0 damaged\n")
    assert judge(gather(job, log, None, None)).cause == "killed"


def test_runs_that_really_end_that_way(tmp_path):
    """One after the other through worker and supervisor."""
    card = f"the card's memory ran out: {CUDA}"
    wrong, crashed = "job.yaml:7: train.lr: wrong", f"{CRASH}; it goes on from step 2 when started again"
    cases = {
        "good": ({}, "finished", "finished at step 3", 0),
        "wrong": ({"error": [2, f"error: {wrong}"]}, "bad_input", wrong, 2),
        "card": ({"error": [1, f"unexpected failure: {CUDA}"]}, "out_of_memory", card, 1),
        "crash": ({"signal": signal.SIGSEGV}, "killed", crashed, -11),
        "silent": ({"exit": 9}, "failed", "failed without a word (exit code 9)", 9),
    }
    with farm(tmp_path) as here:
        jobs = {name: here.add(name, at={"2": act}) for name, (act, *_) in cases.items()}
        here.worker()
        for name, (_, cause, reason, code) in cases.items():
            ended = here.wait(jobs[name], "finished", "failed")
            assert (ended.cause, ended.reason, ended.exit_code) == (cause, reason, code)
        assert here.log(jobs["wrong"]) == f"error: {wrong}\n"


def test_a_folder_that_is_gone_when_the_job_begins(tmp_path):
    with farm(tmp_path) as here:
        work = tmp_path / "work"
        work.mkdir()
        job = here.store.add(job_text(tmp_path), cwd=work)
        work.rmdir()
        here.worker()
        failed = here.wait(job, "failed")
        assert failed.cause == "bad_input"
        assert failed.reason == f"{work}, from which the job was queued: No such file or directory"


GROUPS = Path("/sys/fs/cgroup/memory")


@pytest.mark.slow
def test_the_kernel_really_kills_a_run_for_its_memory(tmp_path):
    """A worker in a group with a limit, and a run that takes more (cgroup version 1; needs root)."""
    group = GROUPS / f"detour-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(96 << 20))
    except OSError:
        pytest.skip("no group with a limit can be made here")
    hungry = tmp_path / "hungry.py"
    hungry.write_text("held = [bytearray(1 << 20) for _ in range(400)]\n")
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom detour.jobs import worker\n"
        "Path(sys.argv[1], 'tasks').write_text(str(os.getpid()))\nsys.exit(worker.main(sys.argv[2:]))\n"
    )
    try:
        with farm(tmp_path) as here:
            job = here.add()
            command = [sys.executable, "-c", code, str(group), str(here.folder), "--idle", "0.1", "--"]
            ran = subprocess.run([*command, sys.executable, str(hungry)], check=False, timeout=60)
            assert ran.returncode == 0
            ended = here.job(job)
            assert (ended.state, ended.cause, ended.exit_code) == ("failed", "killed_by_kernel", -9)
            assert ended.reason == "killed by the kernel: main memory ran out (the limit of its container or group)"
    finally:
        until(lambda: not (group / "tasks").read_text())
        time.sleep(0.1)
        group.rmdir()
