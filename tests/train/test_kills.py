"""Whole runs killed with SIGKILL, over and over, at any moment: each ends as if nothing had happened.

A run of 30 steps with checkpoints, LoRA files, previews and an average is started as a process of its own, killed after
a random time, started again, killed again, until it gets to its end. After every kill the newest checkpoint must load,
no older than the one before, and no file under a final name may be damaged. At the end every tensor, every number and
every file must be those of the run that nobody killed.
"""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from detour.config.load import load_job
from detour.events import read_events
from detour.train import checkpoint
from faults import leftovers
from miniature import NAME, World, child_run, files_of, job_file, run, start, state_of

pytestmark = pytest.mark.slow
KILLS = 45  # in each of three tests
STEPS = 30


def job(world: World, folder: Path, save_every: int) -> Path:
    return job_file(
        world,
        folder,
        train={"steps": STEPS, "ema_config": {"use_ema": True}, "lr_scheduler": "cosine"},
        network={"dropout": 0.1},
        dataset={"caption_dropout_rate": 0.2},
        save={"save_every": save_every, "formats": ["comfy", "diffusers"], "max_step_saves_to_keep": 3},
        sample={"disable_sampling": False, "sample_every": 5, "sample_steps": 1, "prompts": ["a zig", "a red circle"]},
    )


def finish(path: Path) -> float:
    """Run to the end in a process of its own; the seconds it took."""
    began = time.monotonic()
    process = start(child_run, path)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - began


def life(path: Path, seconds: float) -> bool:
    """Run for so long at most; False if it was killed."""
    process = start(child_run, path)
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode in (0, -9)
    return process.exitcode == 0


def place_of_death(folder: Path) -> str:
    """What the process was at when it was killed, as far as its traces tell."""
    if left := leftovers(folder):
        return "writing a checkpoint" if any(name.startswith("step-") for name in left) else "writing another file"
    log = folder / "events.jsonl"
    kinds = [event["type"] for event in read_events(log)] if log.exists() else []
    return "training" if kinds and kinds[-1] not in ("stage", "warning") else "preparing or resuming"


def check(folder: Path, last: int) -> int:
    """After a kill: nothing is damaged. Returns the step of the newest checkpoint, at least `last`; -1 without any."""
    if not folder.exists():
        assert last == -1
        return -1
    found = checkpoint.newest_valid(folder / "checkpoints", pytest.fail)
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert len(list(file.keys())) == (48 if ".diffusers." in path.name else 72)  # comfy's have alphas
    for path in folder.glob("samples/*.png"):
        with Image.open(path) as picture:
            picture.load()
    if (folder / "events.jsonl").exists():
        list(read_events(folder / "events.jsonl"))
    step = -1 if found is None else found.step
    assert step >= last
    return step


@pytest.mark.parametrize("save_every", [1, 2, 3])
def test_killed_at_any_moment_a_run_ends_as_if_it_had_not_been(world, tmp_path, save_every):
    path, folder = job(world, tmp_path, save_every), tmp_path / NAME
    finish(path)  # fills the caches
    shutil.rmtree(folder)
    whole = finish(path)
    state, written = state_of(folder), files_of(folder)
    assert len(written) == 1 + 2 + 3 + 2 * 7  # job, LoRA in two formats, three numbered ones, previews
    shutil.rmtree(folder)

    rng, kills, ends, deaths = random.Random(save_every), 0, 0, Counter()
    while kills < KILLS:
        finished, step = False, -1
        while not finished:
            # Half of the lives are so short that they end while the run is prepared or takes up a checkpoint.
            finished = life(path, rng.uniform(0, whole * rng.choice([0.12, 0.5])))
            if not finished:
                kills += 1
                step = check(folder, step)
                deaths[place_of_death(folder)] += 1
        ends += 1
        assert state_of(folder) == state
        assert files_of(folder) == written
        shutil.rmtree(folder)
    print(f"\nsave_every {save_every}, {whole:.1f} s uninterrupted: {kills} kills, {ends} runs ended, each the same")
    print(f"killed while {dict(deaths)}")


def test_killed_while_resuming(world, tmp_path):
    """However often it does not get to its next step, a run loses nothing and leaves nothing behind."""
    path, folder = job(world, tmp_path, 30), tmp_path / NAME
    whole = finish(path)
    state, written = state_of(folder), files_of(folder)
    shutil.rmtree(folder)
    run(load_job(path).job, stop_at=9)
    held, rng, kills = state_of(folder), random.Random(0), 0
    for _ in range(20):
        kills += not life(path, rng.uniform(0, 0.2 * whole))
        assert state_of(folder) == held  # the next checkpoint would be the last
    assert kills == 20
    finish(path)
    assert state_of(folder) == state
    assert files_of(folder) == written | {name: files_of(folder)[name] for name in (f"{NAME}-000000009.safetensors",)}
