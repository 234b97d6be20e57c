"""A picture as tokens of the caption: the in-context teacher of the trained miniature reads them before the words.

No network: latents averaged over an 8 x 8 grid, a token for each row of it. The real Z-Image has no such input; a text
encoder whose config says `picture_tokens` was trained beside a denoiser that reads them (nano/recipes/base.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import Tensor

COUNT = 8  # tokens, and positions in each


def picture_tokens(latents_BCHW: Tensor, count: int = COUNT) -> Tensor:
    """tokens_BLD of latents: `count` tokens of `count` * C features, those of a row from left to right."""
    grid_BCHW = F.adaptive_avg_pool2d(latents_BCHW, count)
    return grid_BCHW.permute(0, 2, 3, 1).flatten(2)


def with_picture(tokens_LD: Tensor, latents_CHW: Tensor, count: int = COUNT) -> Tensor:
    """A caption's tokens with those of a picture before them."""
    return torch.cat([picture_tokens(latents_CHW[None], count)[0].to(tokens_LD), tokens_LD])
