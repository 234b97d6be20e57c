"""Makes the objective of a run from its job: the terms, and what they are told besides the captions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detour import UserError, sample
from detour.config.preserve import PLAIN, strategy_terms
from detour.train.drift import SEEDS, DriftMeter, Schedule
from detour.train.preserve import Objective, Told

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from detour.archs.base import ArchSpec, Condition, Scheduler, Variant
    from detour.config.job import DatasetConfig, TrainProcess
    from detour.config.preserve import TermConfig
    from detour.data.order import Order
    from detour.data.scan import Picture
    from detour.train.objective import Task

NEUTRAL = (
    "a photo of a dog running on a beach", "a bowl of fruit on a wooden table", "a city street at night in the rain",
    "portrait of an old man with a beard", "a red car parked in front of a house", "a mountain lake at sunrise",
    "a cat sleeping on a sofa", "a woman reading a book in a cafe", "an oil painting of a sailing ship in a storm",
    "a close-up of a sunflower", "a modern kitchen with white cupboards", "a child flying a kite in a field",
    "a watercolour of a village in the hills", "a glass of water on a dark background", "a train crossing a bridge",
    "a group of friends around a campfire", "a snowy forest with a wooden cabin", "a bicycle leaning against a wall",
    "a plate of pasta with tomato sauce", "an owl on a branch at dusk", "a lighthouse on a cliff",
    "a desk with a laptop and a cup of coffee", "a market stall with vegetables", "an astronaut on the moon",
)  # fmt: skip
"""Everyday subjects for rollouts without a picture, where the job names none."""


def neutral_prompts(process: TrainProcess) -> list[str]:
    """The prompts of rollouts that are told no caption, and of the drift meter."""
    return list(process.preserve.prompts or NEUTRAL)


def control_prompts(process: TrainProcess) -> list[str]:
    """The prompts of the drift meter."""
    drift = process.preserve.drift
    return list(drift.prompts or neutral_prompts(process)[:2]) if drift.measure else []


def extra_prompts(process: TrainProcess) -> list[str]:
    """What must be embedded besides captions and previews. Long captions come from `rich_captions`."""
    terms = strategy_terms(process.preserve)
    wanted = control_prompts(process)
    if any(term.told == "neutral" for term in terms):
        wanted += neutral_prompts(process)
    if any(term.target == "contrast" for term in terms):
        wanted.append("")
    return wanted


def check(process: TrainProcess, spec: ArchSpec, variant: Variant) -> None:
    """Refuse what cannot work, before anything expensive."""
    terms = strategy_terms(process.preserve)
    drawn = [term for term in terms if term.states != "data"]
    _check_trigger(process)
    if spec.objective != "flow" and any(term.weighting != "velocity" or term.target == "path" for term in terms):
        raise UserError(
            f"preserve: {spec.name} is no flow model, which weightings other than velocity and target: path are for"
        )
    guidance = process.sample.guidance_scale or 1.0
    if spec.guidance_kind == "negative" and guidance > 1 and any(term.states == "rollout" for term in drawn):
        raise UserError(
            f"preserve: rollouts draw without guidance, as distilled models do, but sample.guidance_scale is "
            f"{guidance:g}; set it to 1, or take another strategy"
        )
    steps = _steps(process, variant)
    if drawn and steps > 1000:
        raise UserError(f"preserve.steps: {steps}; the sampler's grid has at most 1000 times")
    if process.train.timestep_type == "next_sample" and terms != [PLAIN]:
        raise UserError(
            "preserve: timestep_type: next_sample rehearses sampling by itself; take another, or strategy: none"
        )


def advice(process: TrainProcess, variant: Variant) -> list[str]:
    """Settings that are obeyed but seldom meant."""
    terms, steps = strategy_terms(process.preserve), _steps(process, variant)
    found: list[str] = []
    if terms != [PLAIN] and not variant.distilled:
        found.append("preserve: this model is not distilled; there are no few steps to keep")
    drawn = process.sample.sample_steps or variant.steps
    if any(term.states != "data" for term in terms) and drawn % steps and steps % drawn:
        found.append(
            f"preserve.steps: {steps} does not divide sample.sample_steps: {drawn}, so that the sampler visits other "
            f"times than are trained"
        )
    return found


def _check_trigger(process: TrainProcess) -> None:
    preserve = process.preserve
    words = {process.trigger_word, *(dataset.trigger_word for dataset in process.all_datasets)} - {None, ""}
    for option, prompts in (("preserve.prompts", preserve.prompts), ("preserve.drift.prompts", preserve.drift.prompts)):
        for prompt in prompts:
            if held := [word for word in words if word and word.lower() in prompt.lower()]:
                raise UserError(
                    f"{option}: {prompt!r} holds the trigger word {held[0]!r}; these prompts are for what must "
                    f"not change, so take it out"
                )


def _steps(process: TrainProcess, variant: Variant) -> int:
    return process.preserve.steps or process.sample.sample_steps or variant.steps


def rich_captions(process: TrainProcess, training: Order) -> dict[str, str]:
    """The long caption of each picture, by its name in batches; empty where no term asks for any.

    UserError naming every picture that has none.
    """
    if not any(term.teacher_told == "rich" for term in strategy_terms(process.preserve)):
        return {}
    found: dict[str, str] = {}
    missing: list[str] = []
    for item in training.items:
        picture, config = item.picture, training.datasets[item.picture.dataset]
        path = _beside(picture, config)
        if path is None or not path.is_file():
            missing.append(str(picture.path))
        else:
            found[f"{config.folder_path.name}/{picture.key}"] = path.read_text(encoding="utf-8").strip()
    if missing:
        names = ", ".join(dict.fromkeys(missing))
        raise UserError(
            f"preserve: the teacher is to be told a long caption (teacher_told: rich), but these have none: {names}. "
            f"Put one beside each picture and name its ending in datasets.rich_caption_ext (long.txt), or take a "
            f"strategy whose teacher needs none (prior_anchor, anchor)"
        )
    return found


def _beside(picture: Picture, config: DatasetConfig) -> Path | None:
    if config.rich_caption_ext is None:
        return None
    return picture.path.with_suffix(f".{config.rich_caption_ext}")


def objective(
    process: TrainProcess,
    task: Task,
    denoiser: nn.Module,
    scheduler: Scheduler,
    variant: Variant,
    condition: Callable[[str], Condition],
    rich: dict[str, str],
) -> Objective:
    """The objective of a run; `condition` gives that of a prompt. The adapter, the average and the type come later."""
    terms: Sequence[TermConfig] = strategy_terms(process.preserve)
    told = Told(
        neutral=[condition(p) for p in neutral_prompts(process)] if any(t.told == "neutral" for t in terms) else [],
        rich={name: condition(text) for name, text in rich.items()},
        empty=condition("") if any(term.target == "contrast" for term in terms) else {},
    )
    return Objective(
        task=task,
        denoiser=denoiser,
        config=process.train,
        terms=terms,
        told=told,
        scheduler=scheduler,
        steps=_steps(process, variant),
        guidance=process.sample.guidance_scale or variant.guidance,
    )


def drift_meter(
    process: TrainProcess,
    objective: Objective,
    condition: Callable[[str], Condition],
    pixels: Callable[[Tensor], Tensor],
) -> DriftMeter | None:
    """The drift meter of a run, if it has one."""
    drift, settings = process.preserve.drift, process.sample
    if not drift.measure:
        return None
    assert settings.sample_steps is not None  # resolved
    prompts = [prompt for prompt in control_prompts(process) for _ in range(SEEDS)]
    requests = [
        sample.Request(
            prompt=prompt,
            seed=drift.seed + index,
            width=settings.width,
            height=settings.height,
            steps=settings.sample_steps,
            guidance=settings.guidance_scale or 1.0,
        )
        for index, prompt in enumerate(prompts)
    ]
    return DriftMeter(
        task=objective.task,
        denoiser=objective.denoiser,
        scheduler=objective.scheduler,
        adapter=objective.adapter,
        requests=requests,
        conditions=[condition(prompt) for prompt in prompts],
        long_steps=drift.long_steps,
        pixels=pixels,
        alarm=drift.alarm,
    )


def drift_schedule(process: TrainProcess, steps: int) -> Schedule:
    """When a run of so many steps measures its drift."""
    drift, settings = process.preserve.drift, process.train
    pictures = len(control_prompts(process)) * SEEDS
    few = pictures * (process.sample.sample_steps or 1)
    return Schedule.within(
        drift.budget,
        drift.every or process.sample.sample_every or process.save.save_every or steps,
        steps,
        settings.batch_size * settings.gradient_accumulation,
        (few, pictures * drift.long_steps),
    )
