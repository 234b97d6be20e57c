"""The drift meter: how far few-step pictures have moved on prompts that nobody trains.

For each control prompt two pictures are drawn, of fixed seeds, as the LoRA will be used (no training adapter, averaged
weights): in few steps whenever it measures, in many at the start and at the end. They are compared with what the
untouched model draws from the same noise, so every figure is paired. Lengths are root mean squares over latents;
relative ones are divided by that of the untouched few-step pictures. Where the LoRA is used with a patch, the untouched
model is drawn without it: then there is drift before the first step, what the patch itself changes.

Measuring costs forward passes. `Schedule` keeps that below a share of the training's own (`preserve.drift.budget`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import fsum, sqrt
from typing import TYPE_CHECKING

from detour import sample
from detour.events import DriftEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from detour.archs.base import Arch, Condition
    from detour.train.deployment import Deployment

SEEDS = 2
"""Pictures of each prompt: two, so that the spread within a prompt can be told."""
STEP_FORWARDS = 3
"""Forward passes that a training step of one picture is worth: itself, and a backward pass of twice that."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """When the meter measures, and what that costs."""

    every: int
    """Steps between measurements; the start and the end are measured in any case."""
    forwards: int
    """Of the whole run."""
    share: float
    """Of the training's own forward passes."""

    @classmethod
    def within(cls, budget: float, every: int, steps: int, pictures: int, costs: tuple[int, int]) -> Schedule:
        """The closest to `every` that the budget allows, for a run of so many steps of so many pictures.

        `costs` are the forward passes of the few-step and of the many-step pictures. The untouched model draws both
        once, and the start and the end are measured in full: that is spent whatever the budget.
        """
        few, many = costs
        worth = STEP_FORWARDS * steps * pictures
        ends = 3 * (few + many)
        room = max(0, int((budget * worth - ends) // few))
        due = (steps - 1) // every
        stride = due // (room + 1) + 1  # the least that leaves `room` of them
        forwards = ends + due // stride * few
        return cls(every * stride, forwards, forwards / worth)

    def due(self, step: int, last: int) -> bool:
        """Is it time at this step, of a run that ends at `last`?"""
        return step % self.every == 0 or step >= last


@dataclass(frozen=True, slots=True)
class Drawn:
    """One control picture: where its latents went, and how bent the way was."""

    latents: Tensor
    curvature: float
    """Sum over the steps of |v_(k+1) - v_k|^2, relative to the mean |v|^2: 0 on a straight line."""


@dataclass
class DriftMeter:
    """Draws the control pictures and compares them."""

    arch: Arch
    model: Deployment
    requests: Sequence[sample.Request]
    """Of few steps; `SEEDS` in a row belong to one prompt."""
    conditions: Sequence[Condition]
    long_steps: int
    pixels: Callable[[Tensor], Tensor]
    """Decodes latents."""
    alarm: float | None = None

    def __post_init__(self) -> None:
        self._untouched: dict[int, list[Drawn]] = {}

    def measure(self, step: int, *, long: bool) -> DriftEvent:
        """Compare now; with `long`, many-step pictures too."""
        steps = self.requests[0].steps
        few, few0 = self._now(steps), self._before(steps)
        size = _rms([drawn.latents for drawn in few0])
        moved = [_rms([a.latents - b.latents]) / size for a, b in zip(few, few0, strict=True)]
        seen, seen0 = ([self.pixels(drawn.latents) for drawn in pictures] for pictures in (few, few0))
        in_pixels = [_rms([a - b]) / 2 for a, b in zip(seen, seen0, strict=True)]  # pixels run from -1 to 1
        sharp0 = _sharpness(seen0)
        gap = gap0 = sharp_long = None
        if long:
            many = self._now(self.long_steps)
            gap, gap0 = _gap(few, many) / size, _gap(few0, self._before(self.long_steps)) / size
            sharp_long = _share(_sharpness([self.pixels(drawn.latents) for drawn in many]), sharp0)
        drift = fsum(moved) / len(moved)
        prompts = [request.prompt for request in self.requests]
        return DriftEvent(
            step=step,
            drift=drift,
            by_prompt={
                prompt: _mean([m for m, p in zip(moved, prompts, strict=True) if p == prompt]) for prompt in prompts
            },
            pixels=_mean(in_pixels),
            gap=gap,
            gap_untouched=gap0,
            curvature=_mean([drawn.curvature for drawn in few]),
            curvature_untouched=_mean([drawn.curvature for drawn in few0]),
            spread=_spread(few) / _spread(few0),
            alarm=self.alarm is not None and drift > self.alarm,
            sharpness=_share(_sharpness(seen), sharp0),
            sharpness_long=sharp_long,
        )

    def _now(self, steps: int) -> list[Drawn]:
        """What the model draws with what is trained."""
        with self.model.tuned():
            return self._draw(steps)

    def _before(self, steps: int) -> list[Drawn]:
        """What the untouched model draws; once."""
        if steps not in self._untouched:
            with self.model.untouched():
                self._untouched[steps] = self._draw(steps)
        return self._untouched[steps]

    def _draw(self, steps: int) -> list[Drawn]:
        return [self._one(r, c, steps) for r, c in zip(self.requests, self.conditions, strict=True)]

    def _one(self, request: sample.Request, condition: Condition, steps: int) -> Drawn:
        arch, model = self.arch, self.model
        request = replace(request, steps=steps)
        noise = sample.initial_noise(arch.spec, request).to(model.device)
        predict = partial(arch.predict, model.denoiser)
        states = list(sample.trajectory(arch, predict, model.scheduler, noise, request, [condition]))
        velocities = [(b - a) / (u - t) for (t, a), (u, b) in pairwise(states) if u != t]
        size = _mean([float(v.square().mean()) for v in velocities])
        bends = fsum(float((b - a).square().mean()) for a, b in pairwise(velocities))
        return Drawn(states[-1][1], bends / size)


def _rms(tensors: Sequence[Tensor]) -> float:
    return sqrt(_mean([float(tensor.float().square().mean()) for tensor in tensors]))


def _sharpness(pictures: Sequence[Tensor]) -> float:
    """Root mean square of the differences between neighbouring pixels, along both sides."""
    sides = [(pixels.diff(dim=-1), pixels.diff(dim=-2)) for pixels in pictures]
    return _rms([difference for pair in sides for difference in pair])


def _share(value: float, whole: float) -> float | None:
    """None of a whole that is nothing: pictures of one flat colour."""
    return value / whole if whole else None


def _mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values)


def _gap(few: Sequence[Drawn], many: Sequence[Drawn]) -> float:
    """Between pictures of few and of many steps from the same noise."""
    return _mean([_rms([a.latents - b.latents]) for a, b in zip(few, many, strict=True)])


def _spread(drawn: Sequence[Drawn]) -> float:
    """Between the pictures of one prompt."""
    pairs = zip(drawn[::SEEDS], drawn[1::SEEDS], strict=True)
    return _mean([_rms([a.latents - b.latents]) for a, b in pairs])
