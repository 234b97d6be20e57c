"""Drawing latents as sampling does: its grid of times, and the states on the way, bit for bit those of a picture.

Shapes: B batch (1 here), C channels, H W latent height and width (of video: C F H W). Time t is in [0, 1]: 0 is clean.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from detour import UserError, sample

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from torch import Tensor, nn

    from detour.archs.base import Arch, Condition, Scheduler


@dataclass(frozen=True)
class FewSteps:
    """A sampler of so many steps."""

    arch: Arch
    scheduler: Scheduler
    """Of its own: schedulers keep a place."""
    steps: int
    guidance: float = 1.0
    """That the model is drawn with, 1 for most distilled ones."""

    def grid(self, latent_HW: tuple[int, int], device: torch.device) -> list[float]:
        """The times that the sampler visits, from 1 (or the first noise level) to 0."""
        self.arch.set_timesteps(self.scheduler, self.steps, latent_HW, device)
        return [float(timestep) / 1000 for timestep in self.scheduler.timesteps] + [0.0]

    @staticmethod
    def below(grid: Sequence[float], most: float) -> list[int]:
        """The places on the grid whose times are at most that; the last, at 0, is no state to step from."""
        return [place for place, time in enumerate(grid[:-1]) if time <= most + 1e-6]  # times are float32 inside

    def check(self, latent_HW: tuple[int, int], device: torch.device) -> None:
        """UserError where the scheduler has no grid of so many steps."""
        try:
            grid = self.grid(latent_HW, device)
        except ValueError as error:
            raise UserError(
                f"preserve.steps: {self.steps}: the model's scheduler has no such grid ({error})"
            ) from error
        times = len(set(grid[:-1]))  # some schedulers visit one of them twice
        if times < self.steps:
            raise UserError(
                f"preserve.steps: {self.steps}: the grid of the model's scheduler ({type(self.scheduler).__name__}) "
                f"then has only {times} different times; give fewer steps"
            )

    def states(
        self, predict: sample.Predict, noise_BCHW: Tensor, conditions: Sequence[Condition], seed: int = 0
    ) -> Iterator[tuple[float, Tensor]]:
        """Times and states from noise to picture. `seed` is that of what a stochastic scheduler draws."""
        spec = self.arch.spec
        request = sample.Request(
            prompt="", seed=seed, steps=self.steps, guidance=self.guidance,
            width=noise_BCHW.shape[-1] * spec.spatial_factor, height=noise_BCHW.shape[-2] * spec.spatial_factor,
            frames=1 if spec.frame_factor is None else (noise_BCHW.shape[2] - 1) * spec.frame_factor + 1,
        )  # fmt: skip
        return sample.trajectory(self.arch, predict, self.scheduler, noise_BCHW, request, list(conditions))

    def draw(self, denoiser: nn.Module, noise_BCHW: Tensor, conditions: Sequence[Condition], seed: int = 0) -> Tensor:
        """The latents that a model draws."""
        latents_BCHW = noise_BCHW
        for _, latents_BCHW in self.states(partial(self.arch.predict, denoiser), noise_BCHW, conditions, seed):  # noqa: B007
            pass
        return latents_BCHW
