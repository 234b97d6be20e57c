"""What making a training adapter takes from the architecture: how the distilled model draws its own pictures."""

from __future__ import annotations

from math import lcm
from typing import TYPE_CHECKING

from detour import UserError
from detour.config.adapter import SizeConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    from detour.archs.base import ArchSpec, Variant
    from detour.config.adapter import AdapterConfig
    from detour.config.job import AdapterProcess


def resolved(process: AdapterProcess, facts: ArchSpec, name: str, variant: Variant) -> AdapterConfig:
    """The section `adapter` with every default visible. UserError for what cannot be drawn."""
    chosen = process.adapter
    if chosen.sample_steps is None and not variant.distilled:
        raise UserError(
            f"adapter.sample_steps: {facts.title} {name} is not distilled, so there are no few steps to draw with and "
            f"nothing that a training adapter could undo. Name the distilled variant in model.arch; if these weights "
            f"are distilled all the same, say in how many steps they draw"
        )
    sizes = chosen.sizes or [SizeConfig(width=process.sample.width, height=process.sample.height)]
    full = chosen.model_copy(update={"sample_steps": chosen.sample_steps or variant.steps, "sizes": sizes})
    if problems := list(_problems(full, facts, "adapter.sizes" if chosen.sizes else "sample.width")):
        raise UserError("\n".join(problems))
    return full


def _problems(chosen: AdapterConfig, facts: ArchSpec, option: str) -> Iterator[str]:
    unit = lcm(facts.size_unit, facts.bucket_divisibility)
    for size in chosen.sizes:
        if size.width % unit or size.height % unit:
            fits = " x ".join(str(max(unit, round(side / unit) * unit)) for side in (size.width, size.height))
            yield (
                f"{option}: {size.width} x {size.height} pixels cannot be drawn and trained on: {facts.name} needs "
                f"sides divisible by {unit}; try {fits}"
            )
    if (problem := facts.frames_problem(chosen.num_frames)) is not None:
        yield f"adapter.num_frames: {problem}"
    if chosen.seed + chosen.pictures > 2**63:
        yield f"adapter.seed: {chosen.seed}: the last picture's seed would be above 2^63 - 1; take a smaller one"


def guidance(facts: ArchSpec, variant: Variant) -> float:
    """The guidance that its own pictures are drawn with: none, but the usual number where the model is told one."""
    return variant.guidance if facts.guidance_kind == "embedded" else 1.0


def advice(title: str, variant: Variant) -> list[str]:
    """Warnings about a job that makes an adapter for this model."""
    if variant.distilled:
        return []
    return [
        f"{title} is not distilled: a training adapter for it has nothing to undo; go on only if these weights are "
        f"distilled all the same"
    ]
