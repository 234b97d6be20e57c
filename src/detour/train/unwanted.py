"""What the untouched model draws for a training picture's caption: the one that `target: preference` does not want.

It is drawn when a picture is first seen with a caption, in the sampler's few steps, and kept for the rest of the run.
Its noise is a function of the seed, the picture's name and the caption, so that a run that goes on draws it again.

Shapes: C channels, H W latent height and width (of video: C F H W).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from detour.nn import lora
from detour.nn.rng import generator
from detour.seeds import seed_for
from detour.train.objective import evaluating

if TYPE_CHECKING:
    from torch import nn

    from detour.data.loader import Batch
    from detour.train.fewsteps import FewSteps


@dataclass
class Unwanted:
    """Pictures of the untouched model, in main memory: 1 MB each at 1024 pixels for Z-Image."""

    sampler: FewSteps
    denoiser: nn.Module
    seed: int
    _known: dict[tuple[int | str, ...], Tensor] = field(default_factory=dict)

    def of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """latents_BCHW and the noise_BCHW that they came from. To be asked while the training adapter is off."""
        pairs = [self._one(batch, i) for i in range(len(batch.names))]
        latents, noises = zip(*pairs, strict=True)
        return torch.cat(latents), torch.cat(noises)

    def _one(self, batch: Batch, i: int) -> tuple[Tensor, Tensor]:
        z0_CHW = batch.latents_BCHW[i]
        key: tuple[int | str, ...] = (self.seed, batch.names[i], batch.prompts[i], *z0_CHW.shape)
        noise = torch.randn(1, *z0_CHW.shape, generator=generator("unwanted", *key)).to(z0_CHW.device)
        if key not in self._known:
            with evaluating(self.denoiser), lora.disabled(self.denoiser):
                seed = seed_for("unwanted", *key)
                drawn = self.sampler.draw(self.denoiser, noise, batch.conditions[i : i + 1], seed)
            self._known[key] = drawn.float().cpu()
        return self._known[key].to(noise), noise
