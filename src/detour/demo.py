"""`detour demo`: the main job on the embedded miniature, with a picture of before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from detour import files, nano
from detour.config.load import load_job
from detour.train.control import Control
from detour.train.session import run_job

if TYPE_CHECKING:
    from pathlib import Path

    from detour.events import Sink

CELL = 192  # pixels of a preview in the comparison
PROMPTS = (
    "a zig on a red background in the centre",
    "a zig on a green background at the left",
    "a red circle on a blue background",
)
JOB = """\
# Written by `detour demo`: Z-Image in miniature, trained with its training adapter. `detour run` goes on with it.
config:
  output_name: zig
  output_folder: '{folder}/output'
  process:
    - type: train
      trigger_word: zig
      model:
        arch: zimage
        name_or_path: '{folder}/miniature'
        assistant_lora_path: '{folder}/miniature/training_adapter.safetensors'
      datasets:
        - folder_path: '{folder}/miniature/dataset'
          resolution: 128
      train:
        steps: {steps}
        batch_size: 4
        lr: 5e-3
        lr_scheduler: cosine
        lr_warmup_steps: 10
        dtype: fp32
        timestep_type: sigmoid
        gradient_checkpointing: false
        cache_folder: '{folder}/cache'
      network: {{type: lora, linear: 16}}
      validation: {{validate_every: 50, holdout: 0.15}}
      save: {{save_every: 100, formats: [comfy, diffusers]}}
      sample:
        width: 128
        height: 128
        sample_every: 100
        prompts:
{prompts}
"""


def demo(out: Path, sink: Sink, steps: int = 200) -> list[str]:
    """Prepare the miniature in `out`, train, compare; lines that say where everything is."""
    folder = out.resolve()
    files.make_folder(folder)
    nano.write(folder / "miniature")
    job = folder / "job.yaml"
    prompts = "\n".join(f'          - "{prompt}"' for prompt in PROMPTS)
    files.write_bytes(job, JOB.format(folder=str(folder).replace("'", "''"), steps=steps, prompts=prompts))
    control = Control()
    control.install()
    result = run_job(load_job(job).job, control, sink, fresh=True)[0]
    if not result.finished:
        return [f"{result.reason}: saved at step {result.step}; `detour run {job}` goes on from there"]
    picture = folder / "before_after.png"
    _compare(result.folder / "samples", steps).save(picture)
    return [
        "",
        "Done. The miniature's weights are random, so this shows how things work and not how good they are.",
        f"  before and after   {picture}",
        f"  LoRA               {result.lora}  (ComfyUI keys; the diffusers format is beside it)",
        f"  previews           {result.folder / 'samples'}",
        f"  checkpoints        {result.folder / 'checkpoints'}",
        f"  every event        {result.folder / 'events.jsonl'}",
        f"  the job file       {job}",
        "Next: `detour check` and `detour run` on a job file of your own; examples/ has ready ones.",
    ]


def _compare(samples: Path, steps: int) -> Image.Image:
    """A row for each prompt: drawn before the first step, and after the last."""
    sheet = Image.new("RGB", (2 * CELL + 24, (CELL + 32) * len(PROMPTS) + 8), "white")
    pen = ImageDraw.Draw(sheet)
    for row, prompt in enumerate(PROMPTS):
        top = 8 + row * (CELL + 32)
        pen.text((8, top), f"{prompt}:  before / after", fill="black")
        for column, step in enumerate((0, steps)):
            with Image.open(samples / f"{step:09d}-{row:02d}.png") as preview:
                cell = preview.resize((CELL, CELL), Image.Resampling.NEAREST)
            sheet.paste(cell, (8 + column * (CELL + 8), top + 18))
    return sheet
