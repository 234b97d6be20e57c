"""The mathematics of flow matching, as pure functions.

Shapes: B batch, C channels, H W latent height and width; tensors of more axes (video) work the same.
Time t is in [0, 1]: 0 is clean, 1 is noise; z_t = (1 - t) z_0 + t eps, target v = eps - z_0 (docs/design.md §3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

Time = TypeVar("Time", float, Tensor)


def over(t_B: Tensor, z: Tensor) -> Tensor:
    """Times with one axis, shaped to multiply tensors with the axes of `z`."""
    return t_B.reshape(-1, *(1,) * (z.ndim - 1))


def noisy(z0: Tensor, eps: Tensor, t_B: Tensor) -> Tensor:
    """The state z_t = (1 - t) z_0 + t eps."""
    t = over(t_B, z0)
    return (1 - t) * z0 + t * eps


def velocity(z0: Tensor, eps: Tensor) -> Tensor:
    """The derivative of z_t by t: v = eps - z_0, the same at every t of one pair."""
    return eps - z0


@dataclass(frozen=True, slots=True)
class FlowMatching:
    """The noise of flow models, with the same methods as `nn.ddpm.Diffusion`."""

    def times(self, t_B: Tensor) -> Tensor:
        """Every time can be trained."""
        return t_B

    def noisy(self, z0: Tensor, eps: Tensor, t_B: Tensor) -> Tensor:
        """The state z_t."""
        return noisy(z0, eps, t_B)

    def target(self, z0: Tensor, eps: Tensor, t_B: Tensor) -> Tensor:
        """What the model should predict."""
        return velocity(z0, eps)

    def weights(self, t_B: Tensor) -> Tensor:
        """All alike."""
        return torch.ones_like(t_B)


def clean_from(z: Tensor, v: Tensor, t_B: Tensor) -> Tensor:
    """The clean picture that a velocity at (z, t) points to: z - t v."""
    return z - over(t_B, z) * v


def shift_time(t: Time, shift: float) -> Time:
    """Moves times towards the noisy end: s t / (1 + (s - 1) t). Four even steps at shift 3: 1, .9, .75, .5, 0."""
    return shift * t / (1 + (shift - 1) * t)


def unshift_time(t: Time, shift: float) -> Time:
    """The inverse of `shift_time`."""
    return t / (shift - (shift - 1) * t)


def haar(x_BCHW: Tensor) -> Tensor:
    """One level of the orthonormal Haar wavelet transform, (B, C, H, W) -> (B, 4C, ceil(H/2), ceil(W/2)).

    The bands follow each other along the channels: average, differences of rows, differences of columns, both
    (cA, cH, cV, cD of `pywt.dwt2`). An odd last row or column is paired with a copy of itself, pywt's mode `symmetric`.
    """
    height, width = x_BCHW.shape[-2:]
    if height % 2 or width % 2:
        x_BCHW = F.pad(x_BCHW, (0, width % 2, 0, height % 2), mode="replicate")
    upper, lower = x_BCHW[..., 0::2, :], x_BCHW[..., 1::2, :]
    a, b, c, d = upper[..., 0::2], upper[..., 1::2], lower[..., 0::2], lower[..., 1::2]
    return torch.cat([a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d], dim=1) / 2
