"""The grain of the drawn world: every 2 x 2 cells are a little brighter or darker, at random, and no caption says so.

It is what makes few steps hard for an ordinary model, and it can be worked out exactly. A block is one position of the
latents (`codec`), where its brightness is plus or minus 0.30 beside noise of 1. For so faint a sign, a perfect
flow-matching model that samples in 8 Euler steps (shift 3) ends at 0.56 of the grain, because its last step, from
t = 0.3, still hedges between both signs; in 32 steps at 0.98, in 4 at 0.28 (`expected`). A model that knows only the
best linear guess, as small ones do, ends at 0.54 and 0.87. A distilled model can draw all of it in 8. So the contrast
of the grain says how much of a model's few-step speed is left, whatever it draws.

Shapes: N pictures, H W cells (32 x 32), B blocks along a side (16).
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Pictures = NDArray[np.float32]
    """pictures_NHW3, 0 to 1."""

DEPTH = 0.06
"""Brightness above or below, 0 to 1: 15 of 255 levels, well visible and far below the least contrast of two colours."""
BLOCK, BLOCKS = 2, 16  # cells along a side; blocks along a side of a picture
LATENT = 0.30
"""Deviation of the latents that `DEPTH` makes: 2 DEPTH in pixels of -1 to 1, three colours, `codec.GAINS` and
`codec.SCALING` (sqrt(3) * 4 * 0.3611 * 0.12)."""


@lru_cache(maxsize=64)
def pattern(seed: int) -> NDArray[np.float32]:
    """brightness_HW1 of a grain, plus or minus `DEPTH`."""
    signs_BB = np.random.Generator(np.random.PCG64(seed)).integers(2, size=(BLOCKS, BLOCKS)) * 2 - 1
    brightness_BB = np.asarray(DEPTH * signs_BB, np.float32)
    return np.asarray(_cells(brightness_BB[None])[0], np.float32)


def contrast(pictures_NHW3: Pictures, drawings_NHW3: Pictures) -> NDArray[np.float32]:
    """How much grain there is on pictures whose plain `drawings` are known: 1 is all of it, 0 none; noise adds to it.

    The root mean square distance of the blocks from the drawing, against what a true grain makes there: colours near
    white or black have less room for it.
    """
    away_NBB = _blocks(pictures_NHW3 - drawings_NHW3)
    grained = np.clip(drawings_NHW3 + np.where(_cells(away_NBB) < 0, -DEPTH, DEPTH), 0, 1)
    wanted_NBB = np.abs(_blocks(grained - drawings_NHW3))
    there_NBB = np.minimum(np.abs(away_NBB), 2 * DEPTH)
    there_N, wanted_N = (np.square(blocks).sum(axis=(1, 2)) for blocks in (there_NBB, wanted_NBB))
    return np.asarray(np.sqrt(there_N / wanted_N), np.float32)


def removed(pictures_NHW3: Pictures, drawings_NHW3: Pictures) -> Pictures:
    """The pictures without what a grain can explain: each block is brought up to `DEPTH` nearer to its drawing."""
    explained_NBB = np.clip(_blocks(pictures_NHW3 - drawings_NHW3), -DEPTH, DEPTH)
    return np.asarray(pictures_NHW3 - _cells(explained_NBB), np.float32)


def expected(times: Sequence[float], depth: float = LATENT, *, samples: int = 100_000) -> float:
    """The contrast that a perfect flow-matching model reaches with Euler steps on `times` (1 to 0), by simulation.

    The denoised value of x = (1 - t) s depth + t eps, with a random sign s, is depth * tanh((1 - t) depth x / t^2).
    """
    x = np.random.Generator(np.random.PCG64(0)).standard_normal(samples)
    for now, then in pairwise(times):
        clean = depth * np.tanh((1 - now) * depth * x / now**2)
        x += (then - now) * (x - clean) / now
    return float(np.sqrt(np.square(x).mean()) / depth)


def _blocks(pictures_NHW3: Pictures) -> NDArray[np.float32]:
    n = len(pictures_NHW3)
    return np.asarray(pictures_NHW3.reshape(n, BLOCKS, BLOCK, BLOCKS, BLOCK, 3).mean(axis=(2, 4, 5)), np.float32)


def _cells(blocks_NBB: NDArray[np.float32]) -> NDArray[np.float32]:
    return blocks_NBB.repeat(BLOCK, axis=1).repeat(BLOCK, axis=2)[..., None]
