"""What a model is told of pictures while it is trained: control pictures now and then left out, and random holes.

A hole is a picture to fill: the clean latents with a part of them missing (zero), and where. It is drawn anew each time
as a pure function of seed, step, micro-batch and place. Pictures without a hole are told of nothing, which a model that
knows holes takes for "fill everything".

Shapes: B batch, C channels, H W latent height and width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from detour.nn.rng import generator

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from detour.config.job import ControlsConfig
    from detour.data.loader import Batch

COVERAGE = (0.2, 0.8)
"""Least and greatest share of the picture that is missing."""
_WIDEST = 7  # positions, of the blur that softens an edge
_VARIED = 0.05  # share of the shorter side


def told(batch: Batch, config: ControlsConfig, seed: int, step: int, micro: int) -> Batch:
    """The batch as it is told in one step. Without any option set it is the same."""
    if not config.control_dropout and not config.inpaint:
        return batch
    conditions = []
    for place, (condition, z0_CHW) in enumerate(zip(batch.conditions, batch.latents_BCHW, strict=True)):
        draws = generator(seed, "controls", step, micro, place)
        drop, hole = torch.rand(2, generator=draws).tolist()
        now = dict(condition)
        if drop < config.control_dropout:
            now.pop("control_CHW", None)
        if hole < config.inpaint:
            missing_1HW, said_1HW = random_hole((z0_CHW.shape[-2], z0_CHW.shape[-1]), config, draws)
            now |= {"inpaint_CHW": z0_CHW * (1 - missing_1HW.to(z0_CHW)), "hole_1HW": said_1HW.to(z0_CHW)}
        conditions.append(now)
    return replace(batch, conditions=conditions)


def random_hole(latent_HW: tuple[int, int], config: ControlsConfig, draws: Generator) -> tuple[Tensor, Tensor]:
    """What is missing and what is said to be, each (1, H, W) in [0, 1]: 1 in the hole.

    The shape is what stands out of a smooth random surface, at the height at which it covers the share drawn.
    """
    share, kind, turn, side = torch.rand(4, generator=draws).tolist()
    coarse = int(torch.randint(3, 6, (), generator=draws))
    surface = F.interpolate(
        torch.randn(1, 1, coarse, coarse, generator=draws), latent_HW, mode="bicubic", align_corners=True
    )
    share = COVERAGE[0] + (COVERAGE[1] - COVERAGE[0]) * share
    hole_11HW = (surface > torch.quantile(surface, 1 - share)).float()
    if config.inpaint_soften and kind < 0.5:
        width = 2 * int(torch.randint(1, _WIDEST // 2 + 1, (), generator=draws)) + 1
        hole_11HW = F.avg_pool2d(hole_11HW, width, 1, width // 2, count_include_pad=False)
    if turn < config.inpaint_invert:
        hole_11HW = 1 - hole_11HW
    said_11HW = hole_11HW
    if config.inpaint_vary:
        most = max(1, round(_VARIED * min(latent_HW)))
        reach = int(torch.randint(0, most + 1, (), generator=draws))
        sign = 1 if side < 0.5 else -1  # wider, or narrower: the rest wider
        said_11HW = sign * F.max_pool2d(sign * hole_11HW, 2 * reach + 1, 1, reach)
    return hole_11HW[0], said_11HW[0]
