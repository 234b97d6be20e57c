"""Real kills: a child saves and prunes in a loop and gets SIGKILL, at random moments and around every system call.

Afterwards the newest whole checkpoint must load, hold one step only, and be at least as new as the last one that was
reported as saved; and the next save must work.
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from detour import files
from detour.train.checkpoint import Snapshot, newest_valid, prune, save
from faults import (
    PowerCut,
    Trap,
    die,
    folder_in_memory,
    fork,
    kill_after,
    kill_at_each_call,
    leftovers,
    names,
    trapped,
    wait,
)


@pytest.fixture
def tmp_path(tmp_path):
    with folder_in_memory(tmp_path) as folder:
        yield folder


def snapshot(step: int, size: int = 16, mark: int = 0) -> Snapshot:
    """A state in which every number tells the step (and `mark`, to tell two states of one step apart)."""
    value = float(step * 10 + mark)
    tensors = {
        "weights": {"a": torch.full((size,), value), "b": torch.full((size // 2,), value, dtype=torch.float64)},
        "ema": {"a": torch.full((size,), value)},
        "optimizer": {"0.exp_avg": torch.full((size,), value), "0.step": torch.tensor(value)},
    }
    return Snapshot(step, tensors, {"value": value}, f"value: {value}\n")


def value_of(snap: Snapshot) -> float:
    """The one value in all parts of a state; fails if they disagree."""
    values = {snap.state["value"], float(snap.job_yaml.split()[1])}
    for tensors in snap.tensors.values():
        for tensor in tensors.values():
            values |= set(tensor.double().reshape(-1).tolist())
    assert len(values) == 1, values
    return values.pop()


def fail(message: str) -> None:
    pytest.fail(message)


def train(folder: Path, size: int, report: int) -> None:
    """As a training run does: go on from the newest, save each step, prune, report the step that is safe."""
    files.remove_stale(folder)
    begin = newest_valid(folder, fail)
    step = begin.step if begin else 0
    while True:
        step += 1
        path = save(folder, snapshot(step, size))
        os.write(report, f"{step}\n".encode())
        prune(folder, 2, verified=path if step % 2 else None)


def seconds_to_the_first_save(folder: Path, size: int) -> float:
    """From the birth of a child until it reports a checkpoint, so that a busy machine gets as far as an idle one."""
    started = time.monotonic()
    for _ in range(5):
        reader, writer = os.pipe()
        pid = fork(lambda writer=writer: train(folder, size, writer))
        os.read(reader, 1)
        kill_after(pid, 0)
        os.close(writer)
        os.close(reader)
    return (time.monotonic() - started) / 5


def kill_often(folder: Path, rounds: int, size: int) -> None:
    rng = random.Random(size)
    longest = 3 * seconds_to_the_first_save(folder.with_name("clock"), size)
    safe = 0
    for _ in range(rounds):
        reader, writer = os.pipe()
        pid = fork(lambda writer=writer: train(folder, size, writer))
        os.close(writer)
        kill_after(pid, rng.uniform(0.0, longest))
        with os.fdopen(reader) as reported:
            safe = max([safe, *map(int, reported.read().split())])
        newest = newest_valid(folder, fail)
        if newest is None:
            assert safe == 0
        else:
            assert newest.step >= safe
            assert value_of(newest) == newest.step * 10
            assert len([name for name in names(folder) if ".tmp-" not in name]) <= 4
    assert safe > rounds / 10
    save(folder, snapshot(safe + 10))
    assert newest_valid(folder, fail).step == safe + 10
    assert leftovers(folder) == []


@pytest.mark.slow  # those at every call are not
def test_100_kills_at_random_moments(tmp_path):
    kill_often(tmp_path / "checkpoints", 100, 16)


@pytest.mark.slow
@pytest.mark.parametrize(("rounds", "size"), [(300, 16), (150, 3000), (80, 1_000_000)])
def test_more_kills_at_random_moments(tmp_path, rounds, size):
    kill_often(tmp_path / "checkpoints", rounds, size)


def reset(folder: Path, *present: Snapshot) -> None:
    if folder.exists():
        files.remove_directory(folder)
    for snap in present:
        save(folder, snap)


def goes_on(folder: Path) -> None:
    """The next process can save, prune, and finds nothing left over."""
    path = save(folder, small(9))
    prune(folder, 1, verified=path)
    assert value_of(newest_valid(folder, fail)) == 90
    assert names(folder) == ["step-000000009"]


def small(step: int, mark: int = 0) -> Snapshot:
    """As few files as there can be: the default run kills after each system call of a small save."""
    whole = snapshot(step, mark=mark)
    return Snapshot(step, {"weights": whole.tensors["weights"]}, whole.state, whole.job_yaml)


quick = pytest.param(small, ("after",), 40, id="small")
full = pytest.param(snapshot, ("before", "after"), 120, id="full", marks=pytest.mark.slow)
only_slow = pytest.param(small, ("before", "after"), 80, id="small", marks=pytest.mark.slow)


@pytest.mark.parametrize(("state", "moments", "least"), [only_slow, full])
def test_killed_at_every_call_of_the_first_save(tmp_path, state, moments, least):
    folder = tmp_path / "checkpoints"

    def check(where: str) -> None:
        newest = newest_valid(folder, fail)
        assert newest is None or value_of(newest) == 10, where
        goes_on(folder)

    assert kill_at_each_call(lambda: reset(folder), lambda: save(folder, state(1)), check, moments) > least


@pytest.mark.slow
@pytest.mark.parametrize(("state", "moments", "least"), [quick, full])
def test_killed_at_every_call_of_save_and_prune(tmp_path, state, moments, least):
    folder = tmp_path / "checkpoints"
    seen = []

    def work() -> None:
        prune(folder, 1, verified=save(folder, state(3)))

    def check(where: str) -> None:
        seen.append(value_of(newest_valid(folder, fail)))
        for name in names(folder):  # what prune had begun to delete does not look like a checkpoint
            if not files.is_temporary(folder / name):
                files.verify_directory(folder / name)
        goes_on(folder)

    assert kill_at_each_call(lambda: reset(folder, state(1), state(2)), work, check, moments) > least
    assert set(seen) == {20, 30}
    assert seen == sorted(seen)  # the old one up to some call, and the new one from there on


@pytest.mark.slow
@pytest.mark.parametrize(("state", "moments", "least"), [quick, full])
def test_killed_at_every_call_of_replacing_the_only_checkpoint(tmp_path, state, moments, least):
    folder = tmp_path / "checkpoints"
    seen = []

    def check(where: str) -> None:
        seen.append(value_of(newest_valid(folder, fail)))
        goes_on(folder)

    def work() -> None:
        save(folder, state(1, mark=5))

    assert kill_at_each_call(lambda: reset(folder, state(1)), work, check, moments) > least
    assert set(seen) == {10, 15}
    assert seen == sorted(seen)


def interrupted(folder: Path) -> None:
    """Leaves the folder as a kill in the middle of replacing the only checkpoint does: moved aside, no successor."""
    reset(folder, small(1))
    with trapped(Trap()) as dry:
        save(folder, small(1, mark=5))
    final = str(folder / "step-000000001")
    reset(folder, small(1))

    def child() -> None:
        with trapped(Trap(dry.calls.index(("_rename", final)), "after", die)):
            save(folder, small(1, mark=5))

    assert wait(fork(child)) == -signal.SIGKILL
    assert len(leftovers(folder)) == len(names(folder)) == 2


@pytest.mark.slow
def test_killed_again_at_every_call_of_the_clearing_up_and_the_next_save(tmp_path):
    folder = tmp_path / "checkpoints"
    seen = set()

    def work() -> None:
        files.remove_stale(folder)
        assert value_of(newest_valid(folder, fail)) == 10
        save(folder, small(2))

    def check(where: str) -> None:
        seen.add(value_of(newest_valid(folder, fail)))
        goes_on(folder)

    assert kill_at_each_call(lambda: interrupted(folder), work, check) > 90
    assert seen == {10, 20}


@pytest.mark.parametrize("latest", [(), ("top",), ("below",), ("top", "below")], ids=str)
def test_a_power_cut_at_any_call_leaves_a_whole_checkpoint(tmp_path, latest):
    """What was not synced may be lost, folder by folder: the newest that was reported must be there all the same."""
    folder, found = tmp_path / "checkpoints", tmp_path / "found"
    folder.mkdir()
    cut = PowerCut(folder)
    safe = []

    def look() -> None:
        cut.rebuild(found, latest)
        newest = newest_valid(found, lambda text: None)
        assert newest is not None or not safe
        if newest is not None:
            assert value_of(newest) in (safe[-1:] + going)
        for path in found.iterdir():  # what has a checkpoint's name is whole, the newest or not
            if ".tmp-" not in path.name:
                files.verify_directory(path)
        shutil.rmtree(found)

    class Watch(Trap):
        def wrap(self, name, original):
            def call(argument, *rest):
                result = original(argument, *rest)
                if name == "_fsync":
                    cut.sync(argument)
                looks.append(look())
                return result

            return call

    looks = []
    with trapped(Watch()):
        for state in (small(1), small(2), small(2, mark=5), small(3)):
            going = [value_of(state)]
            path = save(folder, state)
            safe.append(value_of(state))
            look()
            prune(folder, 1, verified=path)
    cut.close()
    assert len(looks) > 180
