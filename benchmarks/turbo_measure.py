"""Draws with a LoRA on the trained miniature and judges: what was learnt, what was lost. Part of `turbo.py`.

Drawing goes through the recipes' batched forward, which equals the stock one to rounding (tests/nano/test_recipes.py).

Shapes: N pictures, H W cells.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from detour import archs, export
from detour.lora_formats import by_module, with_adapter
from detour.nano import concepts, judge, world
from detour.nano.recipes import miniature

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from detour.nano.world import Pictures, Prompt

SEEDS = (50_000, 60_000, 70_000, 80_000)
"""Where the noises of each drawing begin; picture i of a drawing has the seed plus i."""
FEW, MANY = 8, 32
CONCEPT_PROMPTS, OTHER_PROMPTS = 24, 32
KEPT = ("strict", "clean", "sharpness", "mud", "present", *world.ATTRIBUTES)


@dataclass(frozen=True, kw_only=True)
class Way:
    """How to draw: LoRA files with strengths, steps and guidance (1 is none)."""

    loras: tuple[tuple[Path, float], ...] = ()
    steps: int = FEW
    guidance: float = 1.0


@dataclass
class Judge:
    """Judges LoRAs of one concept on one model. Drawings of the untouched model are made once."""

    model: Path
    concept: str
    others: int = OTHER_PROMPTS
    seeds: Sequence[int] = SEEDS
    _before: dict[tuple[int, float], list[Pictures]] = field(default_factory=dict)

    @cached_property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """Of the transformer, float32."""
        return miniature.load_transformer(self.model)

    @cached_property
    def other_prompts(self) -> list[Prompt]:
        """Ordinary prompts that nobody trains, everything stated."""
        return world.prompts(self.others, seed=7)

    @cached_property
    def concept_prompts(self) -> list[Prompt]:
        """Prompts for the concept that no training picture shows."""
        return concepts.prompts(self.concept, CONCEPT_PROMPTS, seed=7)

    def with_loras(self, loras: Sequence[tuple[Path, float]]) -> miniature.Miniature:
        """The model with LoRAs added to its weights."""
        weights = dict(self.weights)
        for path, strength in loras:
            file = export.read_lora(path, archs.get("zimage").spec)
            for module, parts in by_module(file.tensors).items():
                name = f"{module}.weight"
                weights[name] = with_adapter(weights[name], parts, file.scale(module), strength)
        denoiser = miniature.build_transformer()
        denoiser.load_state_dict(weights)
        return miniature.Miniature.of(denoiser.eval().requires_grad_(False))

    def figures(self, way: Way, *, many: bool = True) -> dict[str, object]:
        """Everything about a way to draw: on the concept's prompts, on others, and how far others have moved."""
        model = self.with_loras(way.loras)
        told = self._drawings(model, self.concept_prompts, way, self.seeds)
        others = self._drawings(model, self.other_prompts, way, self.seeds)
        before = self.before(way)
        found: dict[str, object] = {
            "concept": _judged(told, self.concept_prompts),
            "concept_by_seed": [float(judge.score(p, self.concept_prompts).strict_N.mean()) for p in told],
            "other": _judged(others, self.other_prompts),
            "other_strict": [
                [int(ok) for ok in judge.score(pictures, self.other_prompts).strict_N] for pictures in others
            ],
            "drift": [[round(float(d), 5) for d in judge.drift(a, b)] for a, b in zip(others, before, strict=True)],
            "leak": float(
                np.mean([s == self.concept for p in others for s in judge.score(p, self.other_prompts).shows])
            ),
            "diversity": judge.diversity(np.clip(np.stack(told, axis=1), 0, 1)),
        }
        if many:
            long = replace(way, steps=MANY)
            found["other_many"] = _judged(
                self._drawings(model, self.other_prompts, long, self.seeds[:1]), self.other_prompts
            )
        return found

    def before(self, way: Way) -> list[Pictures]:
        """What the untouched model draws for the other prompts, few steps, no guidance: what every way is held to."""
        key = (FEW, 1.0)
        if key not in self._before:
            plain = Way()
            self._before[key] = self._drawings(self.with_loras(()), self.other_prompts, plain, self.seeds)
        return self._before[key]

    def _drawings(
        self, model: miniature.Miniature, prompts: Sequence[Prompt], way: Way, seeds: Sequence[int]
    ) -> list[Pictures]:
        texts = [prompt.text for prompt in prompts]
        every = miniature.draw_all(model, texts, seeds, steps=way.steps, guidance=way.guidance)
        return [np.clip(pictures, 0, 1) for pictures in every]


def _judged(drawings: Sequence[Pictures], prompts: Sequence[Prompt]) -> dict[str, float]:
    """The judge's means over all drawings."""
    summary = judge.score(np.concatenate(drawings), list(prompts) * len(drawings)).summary()
    return {name: round(summary[name], 4) for name in KEPT if name in summary}
