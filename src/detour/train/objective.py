"""What is minimised: the loss of one micro-batch, and the validation loss.

Shapes: B batch, C channels, H W latent height and width (of video: C F H W, F frames). Time t is in [0, 1]: 0 is clean,
1 is noise.
States, targets and losses are float32 whatever the model computes in.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from math import fsum
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from detour.config.job import TrainConfig
from detour.nn.ddpm import Diffusion
from detour.nn.flow import FlowMatching, haar, over
from detour.nn.rng import generator
from detour.train.timesteps import draw_times, state_times

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import nn

    from detour.archs.base import Arch, Condition, Scheduler, Variant
    from detour.archs.parts import TextModels
    from detour.data.loader import Batch


class Noising(Protocol):
    """How a model's states are noised and what it should predict: `FlowMatching` or `Diffusion`. States and times are
    tensors over a batch; of `times` are those that can be trained at or below what was drawn."""

    def times(self, t_B: Tensor) -> Tensor: ...
    def noisy(self, z0: Tensor, eps: Tensor, t_B: Tensor) -> Tensor: ...
    def target(self, z0: Tensor, eps: Tensor, t_B: Tensor) -> Tensor: ...
    def weights(self, t_B: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Task:
    """What is trained: an architecture's prediction, under the noise that belongs to its weights."""

    arch: Arch
    noising: Noising
    variant: Variant | None = None
    """Whose shift the times have; None: the architecture's."""
    text: TextModels | None = None
    """The text encoders, where they are trained too."""

    @classmethod
    def of(cls, arch: Arch, scheduler: Scheduler, config: TrainConfig, variant: Variant | None = None) -> Task:
        """The task of an architecture whose weights came with that scheduler."""
        flow = arch.spec.objective == "flow"
        return cls(arch, FlowMatching() if flow else Diffusion.of(scheduler, config.min_snr_gamma), variant)

    def times(self, config: TrainConfig, z0: Tensor, seed: int, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """Times and loss weights of a micro-batch, on its device."""
        times, weights = draw_times(config, self.shift(z0), len(z0), seed, step, micro)
        return self.noising.times(times).to(z0.device), weights.to(z0.device)

    def shift(self, z0: Tensor) -> float:
        """The shift of the flow schedule for latents of that size."""
        return self.arch.spec.shift_at((z0.shape[-2], z0.shape[-1]), self.variant)

    def embedded(self, prompts: Sequence[str], conditions: Sequence[Condition]) -> list[Condition]:
        """Conditions with the prompts in them: as they are, or embedded now where the encoders are trained."""
        if self.text is None:
            return list(conditions)
        fresh = self.arch.encode_prompts(self.text, prompts)
        return [prompt | rest for prompt, rest in zip(fresh, conditions, strict=True)]

    def predict(self, denoiser: nn.Module, z: Tensor, t_B: Tensor, batch: Batch) -> Tensor:
        """The model's prediction for a batch's captions and framings, float32."""
        captions = self.embedded(batch.prompts, batch.conditions)
        told = [self.arch.picture_condition(framing, None) for framing in batch.framings]
        conditions = [caption | picture for caption, picture in zip(captions, told, strict=True)]
        return self.arch.predict(denoiser, z, t_B, conditions).float()


@dataclass(frozen=True, slots=True)
class LossOut:
    """The loss of one micro-batch."""

    loss: Tensor
    """Scalar with a graph. In a step of n micro-batches call backward on loss / n: gradients average."""
    per_sample_B: Tensor
    """Each picture's own mean, before any weight but the mask's. Detached."""
    t_B: Tensor
    """The times that were trained."""


_PLAIN = TrainConfig(loss_type="mse")


def noise_like(latents_BCHW: Tensor, seed: int, step: int, micro: int) -> Tensor:
    """Standard normal float32 noise of that shape, on its device.

    Drawn on the CPU, place by place: it depends neither on the device nor on how many pictures share the batch.
    """
    shape = latents_BCHW.shape[1:]
    places = [torch.randn(shape, generator=generator(seed, "noise", step, micro, i)) for i in range(len(latents_BCHW))]
    return torch.stack(places).to(latents_BCHW.device)


def training_loss(
    task: Task, denoiser: nn.Module, batch: Batch, config: TrainConfig, seed: int, step: int, micro: int
) -> LossOut:
    """The loss of micro-batch `micro` of `step`: the mean over pictures of weight x mean over C, H, W of the error.

    A picture's weight is the batch's (`loss_weight`, `reg_weight`), times that of its time (`weighted`, min-SNR).
    """
    z0 = batch.latents_BCHW.float()
    eps = noise_like(z0, seed, step, micro)
    t_B, time_weights_B = task.times(config, z0, seed, step, micro)
    start = state_times(config, task.shift(z0), len(z0), seed, step, micro)
    if start is None:
        z, target = task.noising.noisy(z0, eps, t_B), task.noising.target(z0, eps, t_B)
    else:
        z, target = _next_sample(task, denoiser, batch, eps, (start.to(z0.device), t_B))
    prediction = task.predict(denoiser, z, t_B, batch)
    per_sample_B = sample_loss(prediction, target, config, batch.masks_B1HW)
    weight_B = batch.weights_B * time_weights_B * task.noising.weights(t_B)
    return LossOut((weight_B * per_sample_B).mean(), per_sample_B.detach(), t_B)


def _next_sample(
    task: Task, denoiser: nn.Module, batch: Batch, eps: Tensor, times: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """State and target of `timestep_type: next_sample`: a state that the model itself steps to. Flow models only.

    From z at the first time, an Euler step with the model's own prediction (no gradient) goes to the second. That state
    is off the line between z_0 and eps, so the target is the velocity that leads from it to z_0, (z - z_0) / t: the
    eps - z_0 of the noise that would have given this state, as ai-toolkit has it. For a model that predicts eps - z_0
    exactly both are the same. The least of these times is far from 0 (.3 at shift 3), so the division is safe.
    """
    z0, (start_B, t_B) = batch.latents_BCHW.float(), times
    with torch.no_grad():
        z = task.noising.noisy(z0, eps, start_B)
        z = z + over(t_B - start_B, z) * task.predict(denoiser, z, start_B, batch)
    return z, (z - z0) / over(t_B, z)


def sample_loss(prediction: Tensor, target: Tensor, config: TrainConfig, mask_B1HW: Tensor | None = None) -> Tensor:
    """Each picture's error by `loss_type`, the mean over its elements in float32 (B). `mask` multiplies the elements.

    `wavelet` is the squared error of the Haar bands of the clean picture. The clean picture read from a flow model's
    prediction is eps - v, so the error in it is target - prediction; the transform is linear, so its bands are taken of
    that (of a diffusion model's error likewise: it is the clean picture's, scaled by a number of the noise level). They
    are orthonormal and count alike: with even sides and no mask the loss is that of `mse`, up to rounding (Parseval).
    """
    prediction, target = prediction.float(), target.float()
    if config.loss_type == "mae":
        error = (prediction - target).abs()
    elif config.loss_type == "huber":
        error = F.huber_loss(prediction, target, reduction="none", delta=config.huber_delta)
    elif config.loss_type == "wavelet":
        bands = haar((target - prediction).flatten(0, -4))  # the frames of a clip one by one
        error = bands.square().reshape(len(target), -1, *bands.shape[-2:])
    else:
        error = (prediction - target).square()
    if mask_B1HW is not None:
        mask = mask_B1HW.to(error)
        if config.loss_type == "wavelet":
            mask = F.avg_pool2d(mask, 2, ceil_mode=True)
        error = error * (mask if mask.ndim == error.ndim else mask.unsqueeze(2))
    return error.reshape(len(target), -1).mean(1)


@torch.no_grad()
def validation_loss(
    task: Task, denoiser: nn.Module, batches: Iterable[Batch], times: Sequence[float], seed: int
) -> tuple[float, dict[str, float]]:
    """The plain (mse, unweighted, masked) loss at fixed times: its mean, and by time (keys such as "0.25").

    The noise of a picture is a function of `seed` and its key and is the same at every time, so that figures of other
    steps, runs, loss types and batch sizes compare. Dropout is off meanwhile. ValueError when there is no picture.
    """
    losses: dict[str, list[float]] = {f"{t:g}": [] for t in times}
    with evaluating(denoiser):
        for batch in batches:
            z0 = batch.latents_BCHW.float()
            noise = [torch.randn(z0.shape[1:], generator=generator(seed, "validation", name)) for name in batch.names]
            eps = torch.stack(noise).to(z0.device)
            for t in times:
                t_B = task.noising.times(torch.full((len(z0),), t)).to(z0.device)
                prediction = task.predict(denoiser, task.noising.noisy(z0, eps, t_B), t_B, batch)
                target = task.noising.target(z0, eps, t_B)
                losses[f"{t:g}"] += sample_loss(prediction, target, _PLAIN, batch.masks_B1HW).tolist()
    if not any(losses.values()):
        raise ValueError("validation_loss needs at least one picture and one time")
    by_time = {key: fsum(values) / len(values) for key, values in losses.items()}
    return fsum(by_time.values()) / len(by_time), by_time


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout and the like are off inside; afterwards every submodule is as it was, each by itself."""
    flags = [(part, part.training) for part in module.modules()]
    module.train(False)
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training
