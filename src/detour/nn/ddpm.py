"""The mathematics of diffusion models that predict noise or velocity at 1000 discrete noise levels, as pure functions.

Shapes: B batch, K noise levels; states have any axes after the first. Level k is at time t = k / 1000 (docs/design.md
§3). At level k: z = a_k z_0 + s_k eps with a_k^2 + s_k^2 = 1. Targets: eps, or v = a_k eps - s_k z_0 (Salimans and Ho,
2022, "Progressive distillation for fast sampling of diffusion models").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from detour.nn.flow import over


@dataclass(frozen=True, slots=True)
class Diffusion:
    """The noise levels of a model and what it predicts at them."""

    alphas_cumprod_K: Tensor
    """a_k^2, float32, falling."""
    prediction: Literal["epsilon", "v_prediction"]
    min_snr_gamma: float | None = None
    """Limit of the signal-to-noise ratio in the loss's weight (Hang et al., 2023, "Efficient diffusion training via
    min-SNR weighting strategy"); None for no weighting."""

    @classmethod
    def of(cls, scheduler: Any, min_snr_gamma: float | None = None) -> Diffusion:  # noqa: ANN401  diffusers' schedulers
        """As a diffusers scheduler has it. ValueError for one that predicts something else."""
        prediction = scheduler.config.prediction_type
        if prediction not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"prediction_type {prediction!r} of the scheduler; epsilon and v_prediction can be trained"
            )
        return cls(scheduler.alphas_cumprod.float().cpu(), prediction, min_snr_gamma)

    def times(self, t_B: Tensor) -> Tensor:
        """The level at or below each time, as a time."""
        return self._levels(t_B) / len(self.alphas_cumprod_K)

    def noisy(self, z0: Tensor, eps: Tensor, t_B: Tensor) -> Tensor:
        """The state z = a z_0 + s eps."""
        signal, noise = self._scales(t_B, z0)
        return signal * z0 + noise * eps

    def target(self, z0: Tensor, eps: Tensor, t_B: Tensor) -> Tensor:
        """What the model should predict."""
        if self.prediction == "epsilon":
            return eps
        signal, noise = self._scales(t_B, z0)
        return signal * eps - noise * z0

    def weights(self, t_B: Tensor) -> Tensor:
        """The loss's weight at each time: that of z_0's error, min(snr, gamma), turned into the prediction's."""
        if self.min_snr_gamma is None:
            return torch.ones_like(t_B)
        alpha_B = self.alphas_cumprod_K[self._levels(t_B)].to(t_B.device)
        snr_B = alpha_B / (1 - alpha_B)
        limited_B = snr_B.clamp(max=self.min_snr_gamma)
        if self.prediction == "epsilon":  # a level of pure noise (zero terminal SNR) has weight 1, the limit of x / x
            return torch.where(snr_B > 0, limited_B / snr_B.clamp(min=1e-20), torch.ones_like(snr_B))
        return limited_B / (snr_B + 1)

    def _levels(self, t_B: Tensor) -> Tensor:
        # A time that is a level already must stay it: 0.007 * 1000 is 6.9999995 in float32.
        levels = len(self.alphas_cumprod_K)
        return (t_B.double().cpu() * levels + 1e-4).floor().long().clamp(0, levels - 1)

    def _scales(self, t_B: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        alpha_B = self.alphas_cumprod_K[self._levels(t_B)].to(z.device)
        return over(alpha_B.sqrt(), z), over((1 - alpha_B).sqrt(), z)
