"""Keeping the few steps: the terms of the loss (docs/design.md §5).

Each term draws the trained model's prediction towards a target at chosen states:
`scale * E_(z,t) w(t) || v_theta(z, t, told) - stopgrad T(z, t) ||^2`. A strategy is a list of terms, plain data
(`config.preserve.STRATEGIES`). Plain training is the list with the one term that `objective.training_loss` computes.

Teachers are the same weights with what is trained switched off, averaged, or as it was when the run began: never a
second copy. All terms but the plain one see the model as it will be used: without the training adapter. Rollouts are
`sample.trajectory`, so that their states are bit for bit those that sampling visits.

Shapes: B batch, C channels, H W latent height and width (of video: C F H W). Time t is in [0, 1]: 0 is clean.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from detour import sample
from detour.config.preserve import PLAIN, TermConfig
from detour.nn import fields, lora
from detour.nn.rng import generator
from detour.seeds import seed_for
from detour.train.objective import LossOut, evaluating, noise_like, sample_loss, training_loss

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from torch import nn

    from detour.archs.base import Condition, Scheduler
    from detour.config.job import TrainConfig
    from detour.data.loader import Batch
    from detour.nn.training_adapter import TrainingAdapter
    from detour.train.ema import Ema
    from detour.train.objective import Task


def needs_prompts(terms: Sequence[TermConfig]) -> bool:
    """Is some term told neutral prompts?"""
    return any(term.told == "neutral" for term in terms)


@dataclass(frozen=True, slots=True)
class Asked:
    """A question to a model: states, times, and all that it is told."""

    z: Tensor
    t_B: Tensor
    conditions: list[Condition]
    names: list[str]
    """Of the pictures, as in a batch."""


@dataclass
class Told:
    """Conditions besides the captions', by what they are for."""

    neutral: list[Condition] = field(default_factory=list)
    rich: dict[str, Condition] = field(default_factory=dict)
    """The long caption's, by the picture's name in batches."""
    empty: Condition = field(default_factory=dict)
    """Of no caption at all."""


@dataclass
class Objective:
    """The loss of a run: its terms, and the model in each of the states that they need."""

    task: Task
    denoiser: nn.Module
    config: TrainConfig
    terms: Sequence[TermConfig]
    told: Told = field(default_factory=Told)
    adapter: TrainingAdapter | None = None
    ema: Ema | None = None
    scheduler: Scheduler = None
    """Of rollouts and grids; a copy, since schedulers keep a place."""
    steps: int = 8
    guidance: float = 1.0
    """That the model is drawn with, 1 for most distilled ones."""
    mixed_precision: Callable[[], AbstractContextManager[object]] = nullcontext
    """The context that predictions with a gradient are made in."""

    def __post_init__(self) -> None:
        self.scheduler = copy.deepcopy(self.scheduler)
        self._begun: dict[str, Tensor] = {}
        if any(term.target == "path" for term in self.terms):
            self._begun = {name: tensor.clone() for name, tensor in lora.state(self.denoiser).items()}

    def backward(self, batch: Batch, step: int, micro: int, share: float) -> LossOut:
        """Add the gradient of `share` times the loss of a micro-batch. Returns the sum of the terms, detached.

        Every state is led back by itself, so that no more than one graph is held.
        """
        total: LossOut | None = None
        for index, term in enumerate(self.terms):
            if step % term.every:
                continue
            out = self._term(index, term, batch, step, micro, share)
            total = (
                out
                if total is None
                else LossOut(total.loss + out.loss, total.per_sample_B + out.per_sample_B, total.t_B)
            )
        if total is None:  # no term counts in this step
            nothing_B = torch.zeros(len(batch.names))
            return LossOut(torch.zeros(()), nothing_B, nothing_B)
        return total

    def _term(self, index: int, term: TermConfig, batch: Batch, step: int, micro: int, share: float) -> LossOut:
        if term == PLAIN:
            with self.mixed_precision():
                out = training_loss(self.task, self.denoiser, batch, self.config, self.config.seed, step, micro)
            (out.loss * share).backward()  # type: ignore[no-untyped-call]
            return LossOut(out.loss.detach(), out.per_sample_B, out.t_B)
        place = (self.config.seed, step, micro)
        if term.states == "rollout":
            return self._rollouts(term, batch, (index, *place), share)
        return self._noised(term, batch, place, share)

    # --- noised pictures ---------------------------------------------------------------------------------------------

    def _noised(self, term: TermConfig, batch: Batch, place: tuple[int, int, int], share: float) -> LossOut:
        """States on the lines between pictures and noise, with the noise and times of plain training where it has them.

        A term with the picture as its target keeps the training adapter; one that compares with the untouched model
        does not: it is about the model as it will be used.
        """
        z0 = batch.latents_BCHW.float()
        eps = noise_like(z0, *place)
        t_B, next_B, weights_B = self._times(term, z0, place)
        z = self.task.noising.noisy(z0, eps, t_B)
        of_data = term.target in ("data", "contrast")
        with nullcontext() if of_data else self._deployed():
            target = (
                self.task.noising.target(z0, eps, t_B) if of_data else self._field(term, self._asked(z, t_B, batch))
            )
            if term.target == "contrast":
                nothing = replace(batch, conditions=[self.told.empty] * len(z0))
                with torch.no_grad(), evaluating(self.denoiser), self.mixed_precision():
                    without = self.task.predict(self.denoiser, z, t_B, nothing)
                target = fields.moved(without, target, without, term.gain)
            with self.mixed_precision():
                prediction = self.task.predict(self.denoiser, z, t_B, batch)
            per_sample_B = sample_loss(prediction, target, self.config, batch.masks_B1HW if of_data else None)
            weight_B = fields.weight(term.weighting, t_B, next_B) * weights_B
            loss = term.scale * (weight_B * batch.weights_B * per_sample_B).mean()
            (loss * share).backward()  # type: ignore[no-untyped-call]  # inside: checkpoints run the model again
        return LossOut(loss.detach(), per_sample_B.detach(), t_B)

    def _times(self, term: TermConfig, z0: Tensor, place: tuple[int, int, int]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Times, the next on the grid where they are on it, and the weights that the times' type gives them."""
        if term.states == "data":
            t_B, weights_B = self.task.times(self.config, z0, *place)
            return t_B, None, weights_B
        grid = self.grid((z0.shape[-2], z0.shape[-1]), z0.device)
        picks = [seed_for("state", *place, i) % (len(grid) - 1) for i in range(len(z0))]
        t_B, next_B = (torch.tensor([grid[pick + after] for pick in picks], device=z0.device) for after in (0, 1))
        return t_B, next_B, torch.ones_like(t_B)

    def grid(self, latent_HW: tuple[int, int], device: torch.device) -> list[float]:
        """The times that the sampler visits, from 1 (or the first noise level) to 0."""
        self.task.arch.set_timesteps(self.scheduler, self.steps, latent_HW, device)
        return [float(timestep) / 1000 for timestep in self.scheduler.timesteps] + [0.0]

    def _asked(self, z: Tensor, t_B: Tensor, batch: Batch) -> Asked:
        told = [self.task.arch.picture_condition(framing, None) for framing in batch.framings]
        conditions = [caption | picture for caption, picture in zip(batch.conditions, told, strict=True)]
        return Asked(z, t_B, conditions, batch.names)

    # --- the model's own states --------------------------------------------------------------------------------------

    def _rollouts(self, term: TermConfig, batch: Batch, place: tuple[int, int, int, int], share: float) -> LossOut:
        """Losses at states that the trained model reaches by itself, one picture of the batch after another."""
        outs = [self._rollout(term, batch, i, place, share / len(batch.names)) for i in range(len(batch.names))]
        losses = torch.stack([out.loss for out in outs])
        per_sample_B = torch.cat([out.per_sample_B for out in outs])
        return LossOut(losses.mean(), per_sample_B, torch.cat([out.t_B for out in outs]))

    def _rollout(
        self, term: TermConfig, batch: Batch, i: int, place: tuple[int, int, int, int], share: float
    ) -> LossOut:
        one = self._one(term, batch, i, place)
        z = one.latents_BCHW
        spec = self.task.arch.spec
        request = sample.Request(
            prompt="", seed=seed_for("rollout", *place, i), steps=self.steps, guidance=self.guidance,
            width=z.shape[-1] * spec.spatial_factor, height=z.shape[-2] * spec.spatial_factor,
            frames=1 if spec.frame_factor is None else (z.shape[2] - 1) * spec.frame_factor + 1,
        )  # fmt: skip
        noise = torch.randn(z.shape, generator=generator("rollout noise", *place, i)).to(z.device)
        grid = self.grid((z.shape[-2], z.shape[-1]), z.device)
        chosen = seed_for("state", *place, i) % self.steps
        found: list[tuple[Tensor, float]] = []
        count = 0

        def predict(state: Tensor, t_B: Tensor, conditions: Sequence[Condition]) -> Tensor:
            """What `trajectory` steps on with; at chosen states the loss is led back on the way."""
            nonlocal count
            at, count = count, count + 1
            if term.which == "one" and at != chosen:
                return self.task.arch.predict(self.denoiser, state, t_B, conditions)
            asked = Asked(state, t_B, list(conditions), one.names)
            with torch.enable_grad():
                prediction, loss = self._at(term, asked, grid[at : at + 2], share)
            found.append((loss, grid[at]))
            return prediction

        with self._deployed():
            states = sample.trajectory(self.task.arch, predict, self.scheduler, noise, request, one.conditions)
            for index, _ in enumerate(states):
                if term.which == "one" and index > chosen:
                    break
        losses = torch.stack([loss for loss, _ in found])
        mean = losses.mean().reshape(1)
        return LossOut(term.scale * mean[0], mean, torch.tensor([found[0][1]]))

    def _at(self, term: TermConfig, asked: Asked, times: list[float], share: float) -> tuple[Tensor, Tensor]:
        """Prediction and loss (both detached) at one state of a rollout; its gradient is added."""
        states = self.steps if term.which == "all" else 1
        here_B, next_B = (torch.tensor([time], device=asked.z.device) for time in times)
        target = self._path(term, asked, times) if term.target == "path" else self._field(term, asked)
        with self.mixed_precision():
            prediction = self._predict(asked)
        loss = (fields.weight(term.weighting, here_B, next_B) * fields.squared_error(prediction, target)).mean()
        (loss * (term.scale * share / states)).backward()  # type: ignore[no-untyped-call]
        return prediction.detach(), loss.detach()

    def _one(self, term: TermConfig, batch: Batch, i: int, place: tuple[int, int, int, int]) -> Batch:
        """A batch of one picture with what its rollout is told. The picture itself only gives the size."""
        conditions = batch.conditions[i : i + 1]
        if term.told == "neutral":
            conditions = [self.told.neutral[seed_for("prompt", *place, i) % len(self.told.neutral)]]
        return replace(
            batch,
            latents_BCHW=batch.latents_BCHW[i : i + 1],
            conditions=conditions,
            prompts=batch.prompts[i : i + 1],
            framings=batch.framings[i : i + 1],
            names=batch.names[i : i + 1],
        )

    # --- targets -----------------------------------------------------------------------------------------------------

    def _predict(self, asked: Asked) -> Tensor:
        return self.task.arch.predict(self.denoiser, asked.z, asked.t_B, asked.conditions).float()

    def _field(self, term: TermConfig, asked: Asked) -> Tensor:
        """What the teacher predicts; no gradient."""
        teacher = lora.disabled(self.denoiser) if term.target == "frozen" else self._averaged()
        if term.teacher_told == "rich":
            rich = [self.told.rich[name] for name in asked.names]
            conditions = [told | more for told, more in zip(asked.conditions, rich, strict=True)]
            asked = replace(asked, conditions=conditions)
        with torch.no_grad(), evaluating(self.denoiser), teacher, self.mixed_precision():
            return self._predict(asked)

    def _path(self, term: TermConfig, asked: Asked, times: list[float]) -> Tensor:
        """The velocity that leads straight to where small steps of the model as it was at the start end."""
        start, end = times
        between = [start + (end - start) * k / term.path_steps for k in range(term.path_steps + 1)]
        state = asked.z
        with torch.no_grad(), evaluating(self.denoiser), self._as_begun(), self.mixed_precision():
            for here, there in pairwise(between):
                t_B = torch.full_like(asked.t_B, here)
                state = state + (there - here) * self._predict(replace(asked, z=state, t_B=t_B))
        return (state - asked.z) / (end - start)

    @contextmanager
    def _as_begun(self) -> Iterator[None]:
        """The trained weights as they were when the run began, with the training adapter if there is one."""
        trained = {name: tensor.clone() for name, tensor in lora.state(self.denoiser).items()}
        lora.load_state(self.denoiser, self._begun)
        try:
            with nullcontext() if self.adapter is None else self.adapter.present():
                yield
        finally:
            lora.load_state(self.denoiser, trained)

    def _averaged(self) -> AbstractContextManager[None]:
        assert self.ema is not None, "the schema asks for it"
        return self.ema.swapped()

    def _deployed(self) -> AbstractContextManager[None]:
        """The model as it will be used: without the training adapter."""
        return self.adapter.removed() if self.adapter is not None else nullcontext()
