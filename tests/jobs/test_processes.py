"""Which process is meant, and whether it lives: real processes, real deaths, numbers really given out again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from detour.jobs import processes
from detour.jobs.processes import OomKills, Process, alive, identify, oom_kills, send, this_process
from queueing import reborn

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture
def sleeper():
    child = subprocess.Popen(["sleep", "100"])
    yield child
    child.kill()
    child.wait()


@pytest.fixture
def heart(tmp_path):
    return tmp_path / "heartbeat"


def test_a_process_lives_until_it_is_killed(sleeper, heart):
    known = identify(sleeper.pid)
    assert alive(known, heart)
    assert alive(this_process(), heart)
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has waited for it: a zombie
    assert processes._look(sleeper.pid)[0] == "Z"
    assert not alive(known, heart)
    sleeper.wait()
    assert not alive(known, heart)
    assert not send(known, signal.SIGTERM)


def test_a_number_that_belongs_to_somebody_else_now(sleeper, heart):
    """A recorded number whose process has another birth: it is not ours, and gets no signal."""
    known = identify(sleeper.pid)
    earlier = replace(known, started=str(int(known.started) - 1))
    assert not alive(earlier, heart)
    assert not send(earlier, signal.SIGKILL)
    time.sleep(0.1)
    assert sleeper.poll() is None
    assert send(known, signal.SIGKILL)
    assert sleeper.wait() == -signal.SIGKILL


def test_a_number_that_is_really_given_out_again(heart):
    first = subprocess.Popen(["sleep", "100"])
    known = identify(first.pid)
    first.kill()
    first.wait()
    time.sleep(0.05)  # a birth is known to 10 ms
    second = reborn(known.pid)
    if second is None:
        pytest.skip("only root may choose the next process number")
    try:
        assert second.pid == known.pid
        assert not alive(known, heart)
        assert not send(known, signal.SIGKILL)
        assert alive(identify(second.pid), heart)
        assert second.poll() is None
    finally:
        second.kill()
        second.wait()


def test_names_with_brackets_and_blanks(tmp_path, heart):
    """The name stands before the birth in /proc/PID/stat and may look like what follows it."""
    odd = tmp_path / "a) R 1 (b"
    odd.symlink_to("/bin/sleep")
    child = subprocess.Popen([str(odd), "100"])
    known = identify(child.pid)
    assert int(known.started) > 0
    assert alive(known, heart)
    child.kill()
    child.wait()


def test_nothing_of_an_earlier_boot_lives(heart):
    processes.beat(heart)
    before = replace(this_process(), boot="0a1b2c3d")
    assert not alive(before, heart)
    assert processes.is_of_an_earlier_boot(before)
    assert not processes.is_of_an_earlier_boot(this_process())
    assert not send(before, signal.SIGKILL)


def test_where_numbers_are_not_ours_the_heartbeat_counts(heart, monkeypatch):
    elsewhere = replace(this_process(), namespace="pid:[1]")
    assert not alive(elsewhere, heart)
    processes.beat(heart)
    assert alive(elsewhere, heart)
    assert not send(elsewhere, signal.SIGKILL)
    old = time.time() - processes.LEASE - 1
    os.utime(heart, (old, old))
    assert not alive(elsewhere, heart)
    processes.beat(heart)  # an existing file too
    assert alive(elsewhere, heart)
    processes.beat(heart / "in" / "no folder")  # says nothing


def test_a_process_in_another_container_is_seen_by_its_heartbeat(tmp_path):
    """Really in a namespace of its own, in which our number stands for nothing."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom detour.jobs import processes\n"
        "Path(sys.argv[1], 'who').write_text(processes.this_process().to_json())\n"
        "while True:\n    processes.beat(Path(sys.argv[1], 'heartbeat')); time.sleep(0.2)\n"
    )
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-c", code, str(tmp_path)]
    try:
        child = subprocess.Popen(command, stderr=subprocess.PIPE)
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    while not (tmp_path / "heartbeat").exists():
        if child.poll() is not None:
            pytest.skip(f"namespaces are not allowed here: {child.stderr.read()!r}")
        time.sleep(0.02)
    known = Process.from_json((tmp_path / "who").read_text())
    assert known.pid == 1
    assert alive(known, tmp_path / "heartbeat")
    assert not send(known, signal.SIGKILL)  # our number 1 is another one's
    child.kill()
    child.wait()
    assert alive(known, tmp_path / "heartbeat")  # for as long as its lease
    old = time.time() - processes.LEASE
    os.utime(tmp_path / "heartbeat", (old, old))
    assert not alive(known, tmp_path / "heartbeat")


def test_the_fallback_without_proc_agrees(sleeper):
    state, born = processes._ask_psutil(sleeper.pid)
    assert state == "R"
    assert processes._ask_psutil(sleeper.pid) == (state, born)
    assert processes._ask_psutil(os.getpid())[1] != born
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert processes._ask_psutil(sleeper.pid)[0] == "Z"
    sleeper.wait()
    assert processes._ask_psutil(sleeper.pid) is None


def test_json_there_and_back():
    assert Process.from_json(this_process().to_json()) == this_process()
    assert OomKills.from_json(OomKills(3, None).to_json()) == OomKills(3, None)


def test_the_kernels_counts():
    now = oom_kills()
    assert now.machine is not None  # Linux counts since 4.13
    assert now.since(now) is None
    assert OomKills(2, 5).since(OomKills(1, 4)) == "group"
    assert OomKills(1, 5).since(OomKills(1, 4)) == "machine"
    assert OomKills(None, 5).since(OomKills(None, 4)) == "machine"
    assert OomKills(None, None).since(OomKills(None, None)) is None
