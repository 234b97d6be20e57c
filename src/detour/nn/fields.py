"""Targets and weights for regressing a velocity field onto another, as pure functions of fields.

Shapes: B batch; states and fields have any axes after it. Time t is in [0, 1]: 0 is clean, 1 is noise; the clean
picture that a velocity v at (z, t) points to is z - t v, so errors of it are t times those of v.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from detour.nn.flow import clean_from, over

Weighting = Literal["velocity", "clean", "step"]


def weight(kind: Weighting, t_B: Tensor, next_B: Tensor | None = None) -> Tensor:
    """What multiplies the squared error of a velocity at each time.

    `velocity`: 1. `clean`: t^2, the squared error of the clean picture. `step`: (t - next)^2, the squared error of
    where a step of the sampler to `next` ends.
    """
    if kind == "velocity":
        return torch.ones_like(t_B)
    if kind == "clean":
        return t_B.square()
    if next_B is None:
        raise ValueError("the weighting `step` is for states on a sampler's grid, where a next time is known")
    return (t_B - next_B).square()


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, float32 (B). No gradient flows into the target."""
    return (prediction.float() - target.detach().float()).square().flatten(1).mean(1)


def moved(field: Tensor, towards: Tensor, away: Tensor, gain: float) -> Tensor:
    """`field` + gain (`towards` - `away`).

    With a distilled model's field, and those of its undistilled base with and without a LoRA, this is the delta
    transfer of OneTrainer's pull request 1353 (gain 3). With the same field as `field` and `towards`, it is guidance.
    """
    return field + gain * (towards - away)


def bounded(target: Tensor, reference: Tensor, z: Tensor, t_B: Tensor, radius: float) -> Tensor:
    """`target`, or as far towards it from `reference` as the clean picture may move: `radius` times its norm.

    Both are velocities at (z, t), t above 0. The bound is that of DiffusionOPSD (arXiv 2608.24646).
    """
    goal, start = clean_from(z, target, t_B), clean_from(z, reference, t_B)
    away = goal - start
    limit_B = radius * start.flatten(1).norm(dim=1) / away.flatten(1).norm(dim=1).clamp(min=1e-12)
    return (z - (start + over(limit_B.clamp(max=1.0), away) * away)) / over(t_B, z)


def preference(trained: tuple[Tensor, Tensor], frozen: tuple[Tensor, Tensor], beta: float) -> Tensor:
    """-log sigmoid(-beta ((e_w - e_l) - (e_w0 - e_l0))) for each sample: pairwise preference with a true reference.

    Each pair holds the errors (B) of the wanted and the unwanted sample. Without training it is log 2. Diffusion-DPO's
    form (Wallace et al., 2023, arXiv 2311.12908), which PSO takes for few-step models (Miao et al., 2024, 2410.03190).
    """
    margin_B = (trained[0] - trained[1]) - (frozen[0] - frozen[1]).detach()
    return F.softplus(beta * margin_B)
