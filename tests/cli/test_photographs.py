"""A run on real photographs as a program of its own, killed half-way and resumed by the same command; then the LoRA is
put on plain diffusers in each format, which must draw the picture that the last preview shows."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
from PIL import Image

from command import PROGRAM, events, program
from detour import files
from photographs import CAPTIONS, write_photographs

pytestmark = pytest.mark.slow

NAME, STEPS, SIZE, SEED = "photographs", 60, 128, 11
KILL_AT = 35  # between two saves, so that some steps are done twice
FORMATS = ["comfy", "diffusers", "kohya"]
PROMPT = CAPTIONS["chelsea.png"]
SECTIONS = {
    "train": {
        "steps": STEPS,
        "batch_size": 2,
        "lr": 5e-3,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 5,
        "timestep_type": "linear",
        "num_workers": 2,
        "gradient_checkpointing": True,
    },
    "network": {"linear": 8},
    "validation": {"validate_every": 15, "holdout": 0.3},
    "save": {
        "save_every": 10,
        "max_step_saves_to_keep": 2,
        "dtype": "fp32",
        "formats": FORMATS,
    },
    "sample": {
        "disable_sampling": False,
        "width": SIZE,
        "height": SIZE,
        "sample_every": 30,
        "sample_steps": 8,
        "seed": SEED,
        "prompts": [PROMPT],
    },
}


@pytest.fixture(scope="module")
def job(tmp_path_factory, write_job) -> Path:
    home = tmp_path_factory.mktemp("photographs")
    pictures = write_photographs(home / "pictures")
    assert len(pictures) == len(CAPTIONS) >= 6
    dataset = {"folder_path": str(home / "pictures"), "resolution": [128, 192]}
    return write_job(home, NAME, dataset=dataset, **SECTIONS)


@pytest.fixture(scope="module")
def finished(job) -> Iterator[Path]:
    """The run's folder after a SIGKILL half-way and the same command again."""
    folder = job.parent / "output" / NAME
    with (job.parent / "first.log").open("w") as log:
        # A group of its own: the processes that read the caches must go, too.
        first = subprocess.Popen([str(PROGRAM), "run", str(job)], stdout=log, stderr=log, start_new_session=True)
        reached = wait_for_step(folder / "events.jsonl", KILL_AT, first)
        os.killpg(first.pid, signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
    assert KILL_AT <= reached < STEPS
    assert not (folder / f"{NAME}.safetensors").exists()

    again = program("run", job)
    assert again.returncode == 0, again.stderr
    assert again.stdout == f"finished at step {STEPS}: {folder / NAME}.safetensors\n"
    assert "goes on at step " in again.stderr
    yield folder


def wait_for_step(log: Path, step: int, process: subprocess.Popen[bytes]) -> int:
    """Until a step is in the log; which it is."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be killed"
        steps = [event["step"] for event in events(log.parent, "step")] if log.exists() else []
        if steps and steps[-1] >= step:
            return steps[-1]
        time.sleep(0.01)
    pytest.fail(f"step {step} was not reached in 4 minutes")


def test_it_went_on_from_the_newest_checkpoint(finished):
    first, second = events(finished, "start")
    assert first["resumed_from"] is None
    every = events(finished)
    saved = [event["step"] for event in every[: every.index(second)] if event["type"] == "save"]
    assert second["step"] >= saved[-1] >= 30  # the kill may have come between a save and the line about it
    assert second["resumed_from"] == str(finished / "checkpoints" / f"step-{second['step']:09d}")
    steps = [event["step"] for event in events(finished, "step")]
    assert steps.index(STEPS) == len(steps) - 1
    assert set(steps) == set(range(1, STEPS + 1))
    kept = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert kept == [f"step-{STEPS - 10:09d}", f"step-{STEPS:09d}"]
    for name in kept:
        files.verify_directory(finished / "checkpoints" / name)


def test_steps_that_were_done_twice_gave_the_same_loss(finished):
    """Those after the checkpoint were done before the kill and again after it, bit for bit alike."""
    seen: dict[int, list[float]] = {}
    for event in events(finished, "step"):
        seen.setdefault(event["step"], []).append(event["loss"])
    twice = [losses for losses in seen.values() if len(losses) == 2]
    assert twice
    assert all(before == after for before, after in twice)


def test_both_losses_fall(finished):
    """Measured: validation 1.43 -> 1.16, training 1.29 -> 1.09. The margins are for other processors."""
    validation = {event["step"]: event["loss"] for event in events(finished, "validation")}
    assert sorted(validation) == [0, 15, 30, 45, 60]
    assert validation[STEPS] < 0.9 * validation[0]
    losses = {event["step"]: event["loss"] for event in events(finished, "step")}
    early, late = (mean(losses[step] for step in steps) for steps in (range(1, 16), range(STEPS - 14, STEPS + 1)))
    assert late < 0.95 * early


def test_both_resolutions_and_all_shapes_were_trained(finished, job):
    sizes = set()
    for name in CAPTIONS:
        with Image.open(job.parent / "pictures" / name) as picture:
            sizes.add(picture.size)
    assert len(sizes) >= 5  # photographs of many shapes
    assert {event["total"] for event in events(finished, "stage") if event["name"] == "latents"} == {2 * len(CAPTIONS)}


@pytest.mark.parametrize("fmt", FORMATS)
def test_plain_diffusers_draws_the_last_preview(finished, world, fmt):
    from diffusers import ZImagePipeline

    with Image.open(finished / "samples" / f"{STEPS:09d}-00.png") as picture:
        ours, text = np.asarray(picture).astype(int), picture.text
    pipeline = ZImagePipeline.from_pretrained(world.model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> np.ndarray:
        drawn = pipeline(
            prompt=text["detour:prompt"],
            width=SIZE,
            height=SIZE,
            num_inference_steps=int(text["detour:steps"]),
            guidance_scale=float(text["detour:guidance_diffusers"]),
            generator=torch.Generator("cpu").manual_seed(int(text["detour:seed"])),
        )
        return np.asarray(drawn.images[0]).astype(int)

    plain = draw()
    pipeline.load_lora_weights(
        str(finished / (f"{NAME}.safetensors" if fmt == "comfy" else f"{NAME}.{fmt}.safetensors"))
    )
    theirs = draw()
    assert np.array_equal(theirs, ours)
    assert np.abs(theirs - plain).mean() > 5  # it was the LoRA that was drawn


def test_the_first_preview_is_the_untouched_turbo(finished, world):
    """Before the first step the LoRA adds nothing, and the training adapter is gone while drawing."""
    from diffusers import ZImagePipeline

    pipeline = ZImagePipeline.from_pretrained(world.model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(SEED)
    drawn = pipeline(
        prompt=PROMPT, width=SIZE, height=SIZE, num_inference_steps=8, guidance_scale=0, generator=generator
    )
    with Image.open(finished / "samples" / "000000000-00.png") as picture:
        assert np.array_equal(np.asarray(drawn.images[0]), np.asarray(picture))
