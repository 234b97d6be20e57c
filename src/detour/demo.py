"""`detour demo`: the main job on the embedded miniature turbo, beside plain training of the same concept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from detour import files, nano
from detour.config.load import load_job
from detour.events import DriftEvent, read_events
from detour.nano import concepts, world
from detour.train.control import Control
from detour.train.session import run_job

if TYPE_CHECKING:
    from pathlib import Path

    from detour.events import Sink
    from detour.train.session import Result

STEPS = 300
CELL = 128  # pixels of a drawing in the comparison
CONCEPT = (
    "a large mip on a green background in the centre",
    "a small mip on a white background at the right",
)
"""Of the character `mip`; no picture of the set shows these."""
OTHERS = (
    "a large plain blue circle on a yellow background in the centre",
    "a small plain white square on a red background at the right",
    "a large striped green triangle on a black background at the bottom",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """A way to train in the comparison."""

    name: str
    title: str
    model: str
    """Lines of the section `model` besides the model itself."""
    strategy: str
    """The section `preserve`, in one line."""


WAYS = (
    Way(name="mip_plain", title="trained plainly", model="", strategy="strategy: none"),
    Way(
        name="mip",
        title="trained around it",
        model="        assistant_lora_path: '{folder}/miniature/training_adapter.safetensors'\n",
        strategy="strategy: prior_anchor, every: 2, prompts: {neutral}",
    ),
)
JOB = """\
# Written by `detour demo`: Z-Image Turbo in miniature, {title}. `detour run` goes on with it.
config:
  output_name: {name}
  output_folder: '{folder}/output'
  process:
    - type: train
      trigger_word: mip
      model:
        arch: zimage
        name_or_path: '{folder}/miniature'
{model}      datasets:
        - folder_path: '{folder}/pictures'
          resolution: 128
      train:
        steps: {steps}
        batch_size: 4
        lr: 2e-3
        dtype: fp32
        timestep_type: sigmoid
        gradient_checkpointing: false
        cache_folder: '{folder}/cache'
      network: {{type: lora, linear: 16}}
      preserve: {{{strategy}, drift: {{measure: true, every: {steps}, prompts: {others}}}}}
      save: {{save_every: 100, formats: [comfy, diffusers]}}
      sample:
        width: 128
        height: 128
        prompts: {prompts}
"""


def demo(out: Path, sink: Sink, steps: int = STEPS) -> list[str]:
    """Prepare the miniature in `out`, train both ways, compare; lines that say what came out and where it is."""
    folder = out.resolve()
    files.make_folder(folder)
    nano.write(folder / "miniature")
    concepts.write_dataset(folder / "pictures", "mip")
    control = Control()
    control.install()
    results: list[Result] = []
    for way in WAYS:
        job = folder / f"{way.name}.yaml"
        files.write_bytes(job, _job(way, folder, steps))
        results.append(run_job(load_job(job).job, control, sink, fresh=True)[0])
        if not results[-1].finished:
            return [f"{results[-1].reason}: saved at step {results[-1].step}; `detour run {job}` goes on from there"]
    picture = folder / "comparison.png"
    _compare([result.folder / "samples" for result in results], steps).save(picture)
    return ["", *_drifts(results), "", *_places(picture, results[-1], folder)]


def _job(way: Way, folder: Path, steps: int) -> str:
    quoted = str(folder).replace("'", "''")
    return JOB.format(
        folder=quoted,
        title=way.title,
        name=way.name,
        model=way.model.format(folder=quoted),
        strategy=way.strategy.format(neutral=[prompt.text for prompt in world.prompts(24, seed=11)]),
        steps=steps,
        prompts=list(CONCEPT + OTHERS),
        others=list(OTHERS),
    )


def _drifts(results: list[Result]) -> list[str]:
    """How far pictures of other prompts have moved, for each way."""
    lines = ["How far the 8-step pictures of prompts without a mip have moved (0: not at all):"]
    for way, result in zip(WAYS, results, strict=True):
        events = read_events(result.folder / "events.jsonl")
        last = [event["drift"] for event in events if event["type"] == DriftEvent.type][-1]
        lines.append(f"  {way.title:<24} {last:.3f}")
    return lines


def _places(picture: Path, result: Result, folder: Path) -> list[str]:
    return [
        f"  the comparison     {picture}",
        f"  LoRA               {result.lora}  (ComfyUI keys; the diffusers format is beside it)",
        f"  report             {result.folder / 'report.html'}",
        f"  checkpoints        {result.folder / 'checkpoints'}",
        f"  the job files      {', '.join(str(folder / f'{way.name}.yaml') for way in WAYS)}",
        "Next: `detour check` and `detour run` on a job file of your own; examples/ has ready ones.",
    ]


def _compare(samples: list[Path], steps: int) -> Image.Image:
    """A row for each prompt; in columns the untouched model and each way of training, drawn in the same few steps."""
    titles = ("untouched", *(way.title for way in WAYS))
    drawn = [(samples[0], 0), *((folder, steps) for folder in samples)]
    prompts = CONCEPT + OTHERS
    width, height = CELL + 48, CELL + 26
    sheet = Image.new("RGB", (8 + width * len(titles), 28 + height * len(prompts)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((8 + column * width, 6), title, fill="black")
    for row, prompt in enumerate(prompts):
        top = 28 + row * height
        pen.text((8, top), prompt, fill="black")
        for column, (folder, step) in enumerate(drawn):
            with Image.open(folder / f"{step:09d}-{row:02d}.png") as preview:
                sheet.paste(preview.resize((CELL, CELL), Image.Resampling.NEAREST), (8 + column * width, top + 14))
    return sheet
