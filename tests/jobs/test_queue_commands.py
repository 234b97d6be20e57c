"""`detour queue`: what it prints and does. Jobs are run by a stand-in; test_queue_real.py has real ones."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from command import detour, well
from detour import __version__
from detour.jobs import queue
from queueing import Farm, farm, kill


@pytest.fixture
def here(tmp_path):
    with farm(tmp_path) as here:
        yield here


def listed(here: Farm) -> dict:
    return well("queue", "list", "--json", "--folder", here.folder).json


# --- words ------------------------------------------------------------------------------------------------------------


def test_python_m_detour_is_the_command(tmp_path):
    (tmp_path / "detour.py").write_text("raise SystemExit('not this one')")
    command = [*queue.RUN[:-1], "--version"]
    assert command[0] == sys.executable
    ran = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert ran.stdout == f"detour {__version__}\n"


def test_no_queue_yet(tmp_path):
    folder = tmp_path / "none"
    assert well("queue", "list", "--folder", folder).out == "no jobs\nthere is no queue yet\n"
    assert well("queue", "list", "--json", "--folder", folder).json == {
        "folder": str(folder), "worker": False, "note": "there is no queue yet", "jobs": []
    }  # fmt: skip
    assert not folder.exists()
    for command in (("stop", 1), ("start", 1), ("start",)):
        ran = detour("queue", *command, "--folder", folder)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.startswith(f"error: there is no job queue in {folder}; `detour queue add JOB.yaml` makes one")


def test_a_wrong_job_file_is_not_queued(tmp_path):
    (tmp_path / "job.yaml").write_text("config:\n  output_name: zig\n  process:\n  - type: train\n    stepz: 3\n")
    ran = detour("queue", "add", tmp_path / "job.yaml", "--folder", tmp_path / "queue")
    assert ran.code == 2
    assert f"{tmp_path}/job.yaml:5" in ran.err
    assert "stepz" in ran.err
    assert not (tmp_path / "queue").exists()
    assert detour("queue", "add", tmp_path / "none.yaml", "--folder", tmp_path / "queue").code == 2


def test_the_list(here):
    done, broken, later = here.add("done"), here.add("broken", at={"1": {"exit": 9}}), here.add("later")
    assert listed(here)["worker"] is False
    table = well("queue", "list", "--folder", here.folder).out
    assert table.endswith("nobody works at the queue; `detour queue start` sees to that\n")
    here.store.ask_stop(later.id)
    here.worker()
    here.wait(broken, "failed")
    found = listed(here)
    assert found["worker"] is True
    assert [(job["id"], job["state"], job["cause"], job["exit_code"], job["step"]) for job in found["jobs"]] == [
        (done.id, "finished", "finished", 0, 3), (broken.id, "failed", "failed", 9, 1),
        (later.id, "stopped", "not_started", None, None),
    ]  # fmt: skip
    assert found["jobs"][0]["run_folders"] == [str(here.root / "output" / "done")]
    assert Path(found["jobs"][1]["log"]).is_file()
    assert well("queue", "list", "--folder", here.folder).out.splitlines() == [
        "  id  state     device  place     step  name",
        f"{done.id:>4}  finished  cpu                  3  done",
        "      finished at step 3",
        f"{broken.id:>4}  failed    cpu                  1  broken",
        "      failed without a word (exit code 9)",
        f"{later.id:>4}  stopped   cpu                     later",
        "      stopped before it began",
    ]


def test_stop_and_start(here):
    job, other = here.add(steps=8, hold=5), here.add("other")
    here.worker()
    here.wait_step(job, 5)
    assert well("queue", "stop", job.id, "--folder", here.folder).out == (
        f"job {job.id} ends its step, saves and stops; asked once more it stops at once\n"
    )
    here.wait(job, "stopped")
    ran = detour("queue", "stop", job.id, "--folder", here.folder)
    assert (ran.code, ran.err) == (2, f"error: job {job.id} is not running: it is stopped\n")
    here.go()
    out = well("queue", "start", job.id, "--folder", here.folder).out
    assert out.startswith(f"job {job.id} (zig) is queued on cpu, place ")
    assert f"`detour queue list --folder {here.folder}` shows how far it is" in out
    here.wait(job, "finished")
    here.wait(other, "finished")
    ran = detour("queue", "start", "--folder", here.folder)
    assert (ran.code, ran.err.split(";")[0]) == (2, f"error: no job waits in {here.folder}")
    assert detour("queue", "stop", 99, "--folder", here.folder).code == 2
    assert detour("queue", "stop", "x", "--folder", here.folder).code == 2
    assert detour("queue", "stop", 10**30, "--folder", here.folder).code == 2
    assert detour("queue").code == 2


def test_stop_kills_if_asked_to(here):
    job = here.add(steps=8, hold=5)
    here.worker()
    here.wait_step(job, 5)
    out = well("queue", "stop", job.id, "--kill", "--folder", here.folder).out
    assert out == f"job {job.id} is being killed; what was saved before is intact\n"
    assert here.wait(job, "stopped").exit_code == -9


def test_the_list_puts_right_what_a_crash_left(here):
    job = here.add(steps=8, hold=5)
    worker = here.worker()
    job = here.wait_step(job, 5)
    worker.kill()
    worker.wait()
    kill(job.supervisor)
    kill(job.process)
    began = time.monotonic()
    found = listed(here)["jobs"][0]
    assert time.monotonic() - began < 5
    assert (found["state"], found["cause"]) == ("failed", "killed")
