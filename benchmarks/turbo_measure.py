"""Draws with a LoRA on the trained miniature and judges: what was learnt, what was lost. Part of `turbo.py`.

Drawing goes through the recipes' batched forward, which equals the stock one to rounding (tests/nano/test_recipes.py).

Shapes: N pictures, H W cells.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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

    from turbo_arms import Scale

    from detour.nano.world import Pictures, Prompt

FEW, MANY = 8, 32
KEPT = ("strict", "as_told", "clean", "sharpness", "grain", "mud", "present", *world.ATTRIBUTES)


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
    scale: Scale

    @cached_property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """Of the transformer, float32."""
        return miniature.load_transformer(self.model)

    @cached_property
    def other_prompts(self) -> list[Prompt]:
        """Ordinary prompts that nobody trains, everything stated."""
        return world.prompts(self.scale.others, seed=7)

    @cached_property
    def concept_prompts(self) -> list[Prompt]:
        """Prompts for the concept that no training picture shows."""
        return concepts.prompts(self.concept, self.scale.told, seed=7)

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
        told = self._drawings(model, self.concept_prompts, way, self.scale.seeds)
        others = self._drawings(model, self.other_prompts, way, self.scale.seeds)
        of_concept, of_others = self._scores(told, self.concept_prompts), self._scores(others, self.other_prompts)
        found: dict[str, object] = {
            "concept": _summary(of_concept),
            "other": _summary(of_others),
            "other_strict": of_others.strict_N.astype(int).reshape(len(others), -1).tolist(),
            "drift": [
                [round(float(d), 5) for d in judge.drift(a, b)] for a, b in zip(others, self.before, strict=True)
            ],
            "leak": float(np.mean([shown == self.concept for shown in of_others.shows])),
            "diversity": judge.diversity(np.clip(np.stack(told, axis=1), 0, 1)),
        }
        if many:
            long = replace(way, steps=MANY)
            drawn = self._drawings(model, self.other_prompts, long, self.scale.seeds[:1])
            found["other_many"] = _summary(self._scores(drawn, self.other_prompts))
        return found

    def _scores(self, drawings: Sequence[Pictures], prompts: Sequence[Prompt]) -> judge.Scores:
        return judge.score(np.concatenate(drawings), list(prompts) * len(drawings))

    @cached_property
    def before(self) -> list[Pictures]:
        """What the untouched model draws for the other prompts, few steps, no guidance: what every way is held to."""
        return self._drawings(self.with_loras(()), self.other_prompts, Way(), self.scale.seeds)

    def _drawings(
        self, model: miniature.Miniature, prompts: Sequence[Prompt], way: Way, seeds: Sequence[int]
    ) -> list[Pictures]:
        texts = [prompt.text for prompt in prompts]
        every = miniature.draw_all(model, texts, seeds, steps=way.steps, guidance=way.guidance)
        return [np.clip(pictures, 0, 1) for pictures in every]


def _summary(scores: judge.Scores) -> dict[str, float]:
    """The judge's means."""
    summary = scores.summary()
    return {name: round(summary[name], 4) for name in KEPT if name in summary}
