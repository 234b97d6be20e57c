"""Which times are trained. Every draw is a pure function of (seed, step, micro-batch, place in the batch).

Shapes: B batch. Time t is in [0, 1]: 0 is clean, 1 is noise.

Each type is a list of times from the noisiest to the cleanest, read at a position q in (0, 1): q = u for even draws,
q = u^3 with `timestep_bias: high_noise`, q = 1 - u^3 with `low_noise`, for u uniform. The names, the direction of the
bias and the figures are those of ai-toolkit (commit 27a03a91), so that its job files keep their meaning. What differs:

- Types that are distributions are drawn from the distribution itself. ai-toolkit draws a new table of 1000 times for
  every batch, and a place in it.
- Bias and limits hold for every type. There, the few-step types and `next_sample` pass over both in silence.
- The limits `min_timestep` and `max_timestep` are times. There they are places in the table. Here q is squeezed into
  the part of the list that lies between the limits: without bias that is the distribution, given that t is within them.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from math import exp, log
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from detour import UserError
from detour.nn.flow import shift_time, unshift_time
from detour.seeds import seed_for

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from detour.config.job import TimestepType, TrainConfig

    FloatArray = NDArray[np.float64]

NORMAL = NormalDist()

# Places in ai-toolkit's table linspace(1000, 1, 1000) that its few-step types train, as times: 1 - place / 1000.
# They are even in t. The grid that a turbo model is sampled on is shifted: at shift 3 the eight times are 1, .9545, .9,
# .8333, .75, .6429, .5, .3, so that of the eight here only 1, .75 and .5 are ever met when sampling. The name in a job
# file means ai-toolkit's behaviour; times of the sampling grid are what `next_sample` trains.
FEW_STEPS: dict[str, tuple[float, ...]] = {
    "one_step": (1.0,),
    "two_step": (1.0, 0.501),
    "four_step": (1.0, 0.75, 0.5, 0.25),
    "eight_step": (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125),
}

# `next_sample` rehearses sampling in this many steps, as ai-toolkit's `next_sample_timesteps: 8`.
NEXT_SAMPLE_STEPS = 8

# (t, weight): twelve values of the table of 1000 weights that ai-toolkit publishes for `weighted`. Lines between them,
# scaled to mean 1, stay within 2.8 % of that table at each of its 1000 times, and within 1 % on average.
WEIGHTS = (
    (0.001, 0.45), (0.02, 0.48), (0.075, 0.67), (0.1, 0.72), (0.3, 0.73), (0.45, 0.86),
    (0.85, 1.51), (0.93, 1.46), (0.97, 1.26), (0.985, 1.12), (0.99, 1.04), (1.0, 0.91),
)  # fmt: skip


def draw_times(config: TrainConfig, shift: float, n: int, seed: int, step: int, micro: int) -> tuple[Tensor, Tensor]:
    """Times and loss weights (both n, float32, on the CPU) of micro-batch `micro` of `step`.

    `shift` is the architecture's. What a place in the batch gets does not depend on n. Raises `UserError` when a type
    with fixed times has none within `min_timestep` and `max_timestep`.
    """
    times = [_pair(config, shift, _uniform(seed, step, micro, place))[1] for place in range(n)]
    t_B = torch.tensor(times, dtype=torch.float64)
    weight_B = weight_at(t_B) if config.timestep_type == "weighted" else torch.ones(n)
    return t_B.float(), weight_B.float()


def state_times(config: TrainConfig, shift: float, n: int, seed: int, step: int, micro: int) -> Tensor | None:
    """With `next_sample`, the times (n, float32) from which the model itself steps to those of `draw_times`; else None.

    The pairs are neighbours on the grid of sampling in eight steps: (1, .9545), ..., (.5, .3) at shift 3.
    """
    if config.timestep_type != "next_sample":
        return None
    times = [_pair(config, shift, _uniform(seed, step, micro, place))[0] for place in range(n)]
    return torch.tensor(times, dtype=torch.float32)


def check_times(config: TrainConfig, shift: float) -> None:
    """For before the start: raises what `draw_times` would, a `UserError` when the limits leave nothing to draw."""
    _pair(config, shift, 0.5)


def weight_at(t_B: Tensor) -> Tensor:
    """The loss weight of `weighted` at each time: mean 1 over even times, 1.5 at t = .9, .72 at .1. Keeps the dtype."""
    knots, heights = zip(*WEIGHTS, strict=True)
    area = np.trapezoid((heights[0], *heights), (0.0, *knots))  # constant below the first knot, as np.interp
    return torch.from_numpy(np.interp(t_B.double().numpy(), knots, heights) / area).to(t_B.dtype)


def _uniform(*parts: int) -> float:
    """A number inside (0, 1): the middle of one of 2^52 cells, so that neither end is ever rounded to."""
    return ((seed_for("time", *parts) >> 11) + 0.5) * 2.0**-52


def _pair(config: TrainConfig, shift: float, u: float) -> tuple[float, float]:
    """(time of the state to start from, time to train); the two differ for `next_sample` only."""
    kind = config.timestep_type
    assert kind is not None, "train.timestep_type is open; resolve the job against its architecture first"
    q = u**3 if config.timestep_bias == "high_noise" else 1 - u**3 if config.timestep_bias == "low_noise" else u
    low, high = config.min_timestep, config.max_timestep
    if kind not in FEW_STEPS and kind != "next_sample":
        first, last = _position(kind, shift, high), _position(kind, shift, low)
        t = min(max(_time(kind, shift, first + (last - first) * q), low), high)
        return t, t
    pairs = _fixed_pairs(kind, shift)
    kept = [pair for pair in pairs if low <= pair[1] <= high]
    if not kept:
        times = ", ".join(f"{t:.4g}" for _, t in pairs)
        raise UserError(
            f"train.min_timestep {low:g} and train.max_timestep {high:g} leave none of the times of "
            f"timestep_type {kind!r} ({times}); widen them, or take another timestep_type"
        )
    return kept[int(q * len(kept))]


def _fixed_pairs(kind: TimestepType, shift: float) -> list[tuple[float, float]]:
    if kind == "next_sample":
        grid = [shift_time(1 - k / NEXT_SAMPLE_STEPS, shift) for k in range(NEXT_SAMPLE_STEPS)]
        return list(pairwise(grid))
    return [(t, t) for t in FEW_STEPS[kind]]


def _time(kind: TimestepType, shift: float, q: float) -> float:
    """The time at position q of a continuous type: its quantile, counted from the noisy end."""
    if kind == "sigmoid":  # logit-normal (0, 1), without a shift
        return 1 / (1 + exp(-NORMAL.inv_cdf(1 - q))) if 0 < q < 1 else 1 - q
    if kind == "shift":
        return shift_time(1 - q, shift)
    if kind == "lognorm_blend":
        return float(np.interp(q, np.linspace(0, 1, 1000), _lognorm_blend()))
    return 1 - q  # linear, weighted


def _position(kind: TimestepType, shift: float, t: float) -> float:
    """The inverse of `_time`: share of the draws that are noisier than t."""
    if kind == "sigmoid":
        return 1 - NORMAL.cdf(log(t / (1 - t))) if 0 < t < 1 else 1 - t
    if kind == "shift":
        return 1 - unshift_time(t, shift)
    if kind == "lognorm_blend":
        return float(np.interp(t, _lognorm_blend()[::-1], np.linspace(1, 0, 1000)))
    return 1 - t


@lru_cache(maxsize=1)
def _lognorm_blend() -> FloatArray:
    """1000 times, falling: 750 of 1 - x / max(x) for x log-normal (0, .333), and 250 even ones from 1 to .001.

    ai-toolkit draws the x anew for every batch, and so a new max(x). Here x are the quantiles at (i + .5) / 750: the
    same distribution without its scatter; max(x) is then 2.91, and the middle of the log-normal part is at t = .66.
    """
    x = np.array([exp(0.333 * NORMAL.inv_cdf((i + 0.5) / 750)) for i in range(750)])
    return np.sort(np.concatenate([1 - x / x[-1], np.linspace(1, 0.001, 250)]))[::-1].copy()
