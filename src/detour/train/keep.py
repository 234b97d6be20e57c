"""Makes what keeps the few steps of a run from its job: the objective, the drift meter, the teacher gate."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from detour import UserError, sample
from detour.config.preserve import strategy_terms
from detour.data.loader import Source, load_batch
from detour.train.checks import control_prompts, grid_steps, neutral_prompts
from detour.train.drift import SEEDS, DriftMeter, Schedule
from detour.train.fewsteps import FewSteps
from detour.train.gate import PICTURES, TeacherGate
from detour.train.preserve import Objective
from detour.train.teachers import Told

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from detour.archs.base import Arch, Condition, Variant
    from detour.config.job import TrainProcess
    from detour.data.order import BatchPlan, Order
    from detour.train.deployment import Deployment
    from detour.train.objective import Task
    from detour.weights import ModelSource


def check_grid(process: TrainProcess, arch: Arch, source: ModelSource, variant: Variant) -> None:
    """Refuse a grid that the model's scheduler does not have, where some term needs one."""
    terms = strategy_terms(process.preserve)
    if all(term.states == "data" and term.target != "preference" for term in terms):
        return
    sampler = FewSteps(arch, arch.load_scheduler(source, variant.scheduler), grid_steps(process, variant))
    spec = arch.spec
    latent_HW = (process.sample.height // spec.spatial_factor, process.sample.width // spec.spatial_factor)
    sampler.check(latent_HW, torch.device("cpu"))
    grid = sampler.grid(latent_HW, torch.device("cpu"))
    for term in terms:
        if not sampler.below(grid, term.below):
            raise UserError(
                f"preserve.terms: below: {term.below:g}; the grid of {sampler.steps} steps ends at "
                f"{grid[-2]:.3g}, so that no state is left"
            )


def objective(
    process: TrainProcess,
    task: Task,
    denoiser: nn.Module,
    variant: Variant,
    condition: Callable[[str], Condition],
    rich: dict[str, str],
    picture_tokens: int,
) -> Objective:
    """The objective of a run; `condition` gives that of a prompt. What stands beside the model comes later.

    `rich` are long captions by the pictures' names, `picture_tokens` how many tokens a picture is for its teacher.
    """
    terms = strategy_terms(process.preserve)
    told = Told(
        neutral=[condition(p) for p in neutral_prompts(process)] if any(t.told == "neutral" for t in terms) else [],
        rich={name: condition(text) for name, text in rich.items()},
        empty=condition("") if any(term.target == "contrast" for term in terms) else {},
        picture_tokens=picture_tokens,
    )
    return Objective(
        task=task,
        denoiser=denoiser,
        config=process.train,
        terms=terms,
        told=told,
        steps=grid_steps(process, variant),
        guidance=process.sample.guidance_scale or variant.guidance,
    )


def teacher_gate(
    process: TrainProcess, objective: Objective, training: Order, source: Source, pixels: Callable[[Tensor], Tensor]
) -> TeacherGate | None:
    """The gate of a run, if it has a teacher that is told more. Looks at the first pictures that have a caption."""
    term = next((term for term in objective.terms if term.teacher_told != "same"), None)
    if term is None or process.preserve.gate == "off":
        return None
    found: dict[str, BatchPlan] = {}
    for plan in training.epoch(0):
        for draw in plan.draws:
            if draw.prompt and draw.item.picture.key not in found and len(found) < PICTURES:
                found[draw.item.picture.key] = replace(plan, draws=(draw,))
    if not found:
        raise UserError("preserve.gate: no picture has a caption to tell the teacher; give captions, or set gate: off")
    device = next(objective.denoiser.parameters()).device
    pictures = [load_batch(source, plan).to(device) for plan in found.values()]
    return TeacherGate(objective, term, pictures, pixels)


def drift_meter(
    process: TrainProcess,
    arch: Arch,
    model: Deployment,
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
        arch=arch,
        model=model,
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
