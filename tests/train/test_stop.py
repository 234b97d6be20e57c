"""Asking a run to stop: it ends its step, saves, and says so; asked again, it stops at once. No step is lost.

Signals go to processes of their own that run the command line; one test starts it as a user does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from command import detour
from detour import UserError
from detour.cli import STOPPED
from detour.events import Event, read_events
from detour.steering import request
from detour.train.control import Control
from detour.train.session import run_job
from miniature import NAME, Recorder, World, child_main, files_of, job, job_file, newest, run, start, state_of

STEPS = 40
PATIENCE = 120.0  # seconds


def long_job(world: World, folder: Path, **sections: Any) -> Path:
    return job_file(world, folder, train={"steps": STEPS}, **sections)


def seen(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Events of a type in a run's log."""
    log = folder / NAME / "events.jsonl"
    return [event for event in read_events(log) if event["type"] == kind] if log.exists() else []


def until(there: Callable[[], object], process: BaseProcess | subprocess.Popen[str] | None = None) -> None:
    """Wait for something that a process brings about."""
    began = time.monotonic()
    while not there():
        assert time.monotonic() - began < PATIENCE, "it did not come about in time"
        if process is not None:
            ended = process.poll() if isinstance(process, subprocess.Popen) else process.exitcode
            assert ended is None, f"the process ended with {ended}"
        time.sleep(0.01)


# --- in this process ------------------------------------------------------------------------------------------------


@pytest.fixture
def control() -> Any:
    """One that takes the signals of this process, which get their handlers back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    control = Control()
    control.install()
    yield control
    for number, handler in before.items():
        signal.signal(number, handler)


def at_step(step: int, act: Callable[[], None]) -> Callable[[Event], None]:
    return lambda event: act() if event.type == "step" and event.step == step else None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_saves_and_the_same_job_goes_on(world, tmp_path, control, number):
    sink = Recorder(at_step(3, lambda: os.kill(os.getpid(), number)))
    stopped = run_job(job(world, tmp_path), control, sink)[0]
    assert (stopped.reason, stopped.step, stopped.finished) == (f"{number.name} received", 3, False)
    assert newest(stopped.folder).step == 3
    kinds = [event.type for event in sink.events]
    assert kinds[-3:] == ["stop", "save", "end"]
    last = run(job(world, tmp_path))
    assert last.result.finished
    assert [event.step for event in last.seen.of("step")] == [4, 5, 6]
    whole = run(job(world, tmp_path / "whole"))
    assert last.state == whole.state


def test_a_second_signal_stops_at_once(world, tmp_path, control):
    """Here before it could save: what was saved earlier is whole, and the run goes on from it."""

    def act(event: Event) -> None:
        if event.type in ("step", "stop") and event.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="second request"):
        run_job(job(world, tmp_path, save={"save_every": 2}), control, Recorder(act))
    assert newest(tmp_path / NAME).step == 2
    last = run(job(world, tmp_path, save={"save_every": 2}))
    assert [event.step for event in last.seen.of("step")] == [3, 4, 5, 6]


def test_a_signal_before_the_first_step_stops_at_once(world, tmp_path, control):
    def act(event: Event) -> None:
        if event.type == "stage" and event.name == "model":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt, match="before the first step"):
        run_job(job(world, tmp_path), control, Recorder(act))
    assert run(job(world, tmp_path)).result.finished


def test_request_files(world, tmp_path):
    """`save` and `sample` act after the running step, `stop` saves; each file is taken away."""
    folder = tmp_path / NAME
    asked = {2: "save", 3: "sample", 4: "stop"}

    def act(event: Event) -> None:
        if event.type == "step" and event.step in asked:
            request(folder, asked[event.step])

    sample = {"disable_sampling": False, "skip_first_sample": True, "sample_steps": 1, "prompts": ["a zig"]}
    ran = run(job(world, tmp_path, sample=sample), on=act)
    assert (ran.result.reason, ran.result.step) == ("stop requested", 4)
    assert [event.step for event in ran.seen.of("save")] == [0, 2, 4]
    assert [event.step for event in ran.seen.of("sample")] == [3]
    assert all(Path(event.path).is_file() for event in ran.seen.of("sample"))
    assert (folder / f"{NAME}-000000002.safetensors").is_file()
    assert list((folder / "requests").iterdir()) == []


def test_requests_for_an_earlier_session_and_strange_files_are_left_out(world, tmp_path):
    folder = tmp_path / NAME
    run(job(world, tmp_path), stop_at=2)
    request(folder, "stop")
    (folder / "requests" / "pause").touch()
    ran = run(job(world, tmp_path))
    assert ran.result.finished
    assert [path.name for path in (folder / "requests").iterdir()] == ["pause"]


def test_a_second_run_in_a_folder_is_refused_and_disturbs_nothing(world, tmp_path):
    refused: list[str] = []

    def act(event: Event) -> None:
        if event.type == "step" and event.step == 2:
            for fresh in (False, True):
                with pytest.raises(UserError) as caught:
                    run(job(world, tmp_path), fresh=fresh)
                refused.append(str(caught.value))

    ran = run(job(world, tmp_path), on=act)
    assert len(refused) == 2
    assert all("another run is writing there" in text and str(tmp_path / NAME) in text for text in refused)
    assert ran.result.finished
    assert ran.state == run(job(world, tmp_path / "whole")).state
    assert not (tmp_path / f"{NAME}.old-1").exists()


# --- processes of their own -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_as_a_user_starts_and_interrupts_it(world, tmp_path):
    path = long_job(world, tmp_path)
    command = [sys.executable, "-m", "detour.cli", "run", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: seen(tmp_path, "step"), process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    steps = [event["step"] for event in seen(tmp_path, "step")]
    assert process.returncode == STOPPED == 130
    assert 0 < steps[-1] < STEPS
    assert newest(tmp_path / NAME).step == steps[-1]
    assert f"SIGINT received: saved at step {steps[-1]}" in out
    assert "SIGINT" in err
    assert "Traceback" not in out + err

    again = detour("run", path)  # in this process: it has its imports done
    assert again.code == 0
    assert f"finished at step {STEPS}" in again.out
    assert [event["step"] for event in seen(tmp_path, "step")] == list(range(1, STEPS + 1))


def interrupted(
    world: World, folder: Path, signals: tuple[signal.Signals, ...], apart: float, when: Callable[[], object]
) -> tuple[int, str]:
    """Exit code and output of a run that gets these signals one after the other, from a moment on."""
    process = start(child_main, ["run", str(long_job(world, folder))], folder / "out.txt")
    until(when, process)
    for number in signals:
        os.kill(process.pid, number)
        time.sleep(apart)
    process.join(PATIENCE)
    text = (folder / "out.txt").read_text()
    assert "Traceback" not in text
    return process.exitcode, text


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_signal_to_the_process_saves_the_last_step(world, tmp_path, number, steps):
    code, text = interrupted(world, tmp_path, (number,), 0, lambda: len(seen(tmp_path, "step")) >= steps)
    last = seen(tmp_path, "step")[-1]["step"]
    assert code == STOPPED
    assert f"{number.name} received: saved at step {last}" in text
    assert newest(tmp_path / NAME).step == last
    assert seen(tmp_path, "end")[-1]["reason"] == f"{number.name} received"


@pytest.mark.slow
@pytest.mark.parametrize("apart", [0.0, 0.002, 0.02, 0.1])
def test_two_signals_leave_a_run_that_goes_on(world, tmp_path, apart):
    """Whether the second comes during the step, the save, or too late to matter."""
    code, text = interrupted(
        world, tmp_path, (signal.SIGINT, signal.SIGINT), apart, lambda: len(seen(tmp_path, "step")) >= 3
    )
    assert code == STOPPED
    assert "stopped at once; what was saved before is intact" in text or "saved at step" in text
    held = newest(tmp_path / NAME)
    process = start(child_main, ["run", str(long_job(world, tmp_path))], tmp_path / "out.txt")
    process.join(PATIENCE)
    assert process.exitcode == 0
    assert seen(tmp_path, "start")[-1]["step"] == held.step
    stopped, written = state_of(tmp_path / NAME), files_of(tmp_path / NAME)
    run(job(world, tmp_path, train={"steps": STEPS}), fresh=True)
    assert state_of(tmp_path / NAME) == stopped
    assert written.items() >= files_of(tmp_path / NAME).items()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["pictures", "captions", "latents", "model"])
def test_a_signal_while_the_run_is_prepared(world, tmp_path, moment):
    """Ends at once, with its exit code and without a traceback; the run starts well afterwards."""
    path = long_job(world, tmp_path, sample={"disable_sampling": True})
    text = path.read_text().replace(str(world.cache), str(tmp_path / "cache"))
    path.write_text(text)
    process = start(child_main, ["run", str(path)], tmp_path / "out.txt")
    out = tmp_path / "out.txt"
    until(lambda: out.exists() and moment in out.read_text(), process)
    os.kill(process.pid, signal.SIGINT)
    process.join(PATIENCE)
    assert process.exitcode == STOPPED
    assert "Traceback" not in out.read_text()
    process = start(child_main, ["run", str(path)], out)
    process.join(PATIENCE)
    assert process.exitcode == 0


@pytest.mark.slow
def test_two_processes_in_one_folder(world, tmp_path):
    path = long_job(world, tmp_path)
    first = start(child_main, ["run", str(path)], tmp_path / "first.txt")
    until(lambda: seen(tmp_path, "step"), first)
    second = start(child_main, ["run", str(path)], tmp_path / "second.txt")
    second.join(PATIENCE)
    assert second.exitcode == 2
    text = (tmp_path / "second.txt").read_text()
    assert "another run is writing there" in text
    assert "Traceback" not in text
    request(tmp_path / NAME, "stop")
    first.join(PATIENCE)
    assert first.exitcode == STOPPED
    assert "stop requested: saved at step" in (tmp_path / "first.txt").read_text()


@pytest.mark.slow
def test_workers_do_not_stand_in_the_way_of_a_stop(world, tmp_path):
    """Ctrl-C in a terminal reaches every process of the group, workers included."""
    path = job_file(world, tmp_path, train={"steps": STEPS, "num_workers": 2})
    command = [sys.executable, "-m", "detour.cli", "run", str(path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        until(lambda: seen(tmp_path, "step"), process)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == STOPPED
    assert f"saved at step {seen(tmp_path, 'step')[-1]['step']}" in out
    assert "Traceback" not in out + err
