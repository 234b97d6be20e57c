"""Keeping the few steps: the terms of the loss (docs/design.md §5).

Each term draws the trained model's prediction towards a target at chosen states:
`scale * E_(z,t) w(t) || v_theta(z, t, told) - stopgrad T(z, t) ||^2`. A strategy is a list of terms, plain data
(`config.preserve.STRATEGIES`). Plain training is the list with the one term that `objective.training_loss` computes.

All terms but those of the pictures see the model as it will be used: without the training adapter. Whom they learn from
is in `teachers.py`. Rollouts are `sample.trajectory`, so that their states are bit for bit those that sampling visits.

Shapes: B batch, C channels, H W latent height and width (of video: C F H W). Time t is in [0, 1]: 0 is clean.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from detour.config.preserve import PLAIN, TermConfig
from detour.nn import fields, lora
from detour.nn.rng import generator
from detour.seeds import seed_for
from detour.train.fewsteps import FewSteps
from detour.train.objective import LossOut, evaluating, noise_like, sample_loss, training_loss
from detour.train.teachers import Asked, Base, Teachers, Told
from detour.train.unwanted import Unwanted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from torch import nn

    from detour.archs.base import Condition, Scheduler
    from detour.config.job import TrainConfig
    from detour.data.loader import Batch
    from detour.nn.training_adapter import TrainingAdapter
    from detour.train.ema import Ema
    from detour.train.objective import Task

_OF_PICTURES = ("data", "contrast")
"""Targets that are the pictures', for which the training adapter stays on."""


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
    base: Base | None = None
    """Of `target: delta`."""
    scheduler: Scheduler = None
    """Of rollouts and grids; a copy, since schedulers keep a place."""
    steps: int = 8
    guidance: float = 1.0
    """That the model is drawn with, 1 for most distilled ones."""
    mixed_precision: Callable[[], AbstractContextManager[object]] = nullcontext
    """The context that predictions with a gradient are made in."""

    def __post_init__(self) -> None:
        self.scheduler = copy.deepcopy(self.scheduler)
        begun: dict[str, Tensor] = {}
        if any(term.target == "path" for term in self.terms):
            begun = {name: tensor.clone() for name, tensor in lora.state(self.denoiser).items()}
        self.sampler = FewSteps(self.task.arch, self.scheduler, self.steps, self.guidance)
        self.unwanted = Unwanted(self.sampler, self.denoiser, self.config.seed)
        self.teachers = Teachers(
            arch=self.task.arch,
            denoiser=self.denoiser,
            told=self.told,
            adapter=self.adapter,
            ema=self.ema,
            base=self.base,
            begun=begun,
            mixed_precision=self.mixed_precision,
        )

    @property
    def timed(self) -> bool:
        """Is each picture's loss that of its time, in every step? The sum of terms at different times is not."""
        return all(term.states == "data" and term.every == 1 for term in self.terms)

    def backward(self, batch: Batch, step: int, micro: int, share: float) -> LossOut:
        """Add the gradient of `share` times the loss of a micro-batch. Returns the sum of the terms, detached.

        Every state is led back by itself, so that no more than one graph is held (of `preference`: two).
        """
        place = (self.config.seed, step, micro)
        total: LossOut | None = None
        for terms in self._groups(step):
            out = self._group(terms, batch, place, share)
            total = (
                out
                if total is None
                else LossOut(total.loss + out.loss, total.per_sample_B + out.per_sample_B, total.t_B)
            )
        if total is None:  # no term counts in this step
            nothing_B = torch.zeros(len(batch.names))
            return LossOut(torch.zeros(()), nothing_B, nothing_B)
        return total

    def _groups(self, step: int) -> list[dict[int, TermConfig]]:
        """The terms that count in a step, by their place. Those that need one prediction at one state are together."""
        groups: dict[object, dict[int, TermConfig]] = defaultdict(dict)
        for index, term in enumerate(self.terms):
            if step % term.every:
                continue
            alone = term.states == "rollout" or term.target == "preference"
            deployed = self.adapter is not None and term.target not in _OF_PICTURES
            groups[index if alone else (term.states, deployed)][index] = term
        return list(groups.values())

    def _group(self, terms: dict[int, TermConfig], batch: Batch, place: tuple[int, int, int], share: float) -> LossOut:
        (index, term), *more = terms.items()
        if term == PLAIN and not more:
            with self.mixed_precision():
                out = training_loss(self.task, self.denoiser, batch, self.config, *place)
            (out.loss * share).backward()  # type: ignore[no-untyped-call]
            return LossOut(out.loss.detach(), out.per_sample_B, out.t_B)
        if term.states == "rollout":
            return self._rollouts(term, batch, (index, *place), share)
        if term.target == "preference":
            return self._preferred(term, batch, place, share)
        return self._noised(list(terms.values()), batch, place, share)

    # --- noised pictures ---------------------------------------------------------------------------------------------

    def _noised(self, terms: list[TermConfig], batch: Batch, place: tuple[int, int, int], share: float) -> LossOut:
        """States on the lines between pictures and noise, with the noise and times of plain training where it has them.

        A term with the picture as its target keeps the training adapter; one that compares with the untouched model
        does not: it is about the model as it will be used.
        """
        z0 = batch.latents_BCHW.float()
        eps = noise_like(z0, *place)
        t_B, next_B, weights_B = self._times(terms[0], z0, place)
        z = self.task.noising.noisy(z0, eps, t_B)
        of_pictures = all(term.target in _OF_PICTURES for term in terms)
        with nullcontext() if of_pictures else self.teachers.deployed():
            targets = [self._target(term, z, t_B, batch, eps) for term in terms]
            with self.mixed_precision():
                prediction = self.task.predict(self.denoiser, z, t_B, batch)
            loss, per_sample_B = torch.zeros((), device=z.device), torch.zeros_like(t_B)
            for term, target in zip(terms, targets, strict=True):
                of_picture = term.target in _OF_PICTURES
                errors_B = sample_loss(prediction, target, self.config, batch.masks_B1HW if of_picture else None)
                weight_B = fields.weight(term.weighting, t_B, next_B) * weights_B
                weight_B = weight_B * (self.task.noising.weights(t_B) if of_picture else 1.0)
                loss = loss + term.scale * (weight_B * batch.weights_B * errors_B).mean()
                per_sample_B = per_sample_B + errors_B.detach()
            (loss * share).backward()  # type: ignore[no-untyped-call]  # inside: checkpoints run the model again
        return LossOut(loss.detach(), per_sample_B, t_B)

    def _target(self, term: TermConfig, z: Tensor, t_B: Tensor, batch: Batch, eps: Tensor) -> Tensor:
        """What a term on noised pictures draws to."""
        z0 = batch.latents_BCHW.float()
        if term.target not in _OF_PICTURES:
            return self.teachers.target(term, self._asked(z, t_B, batch))
        target = self.task.noising.target(z0, eps, t_B)
        if term.target == "data":
            return target
        nothing = replace(batch, conditions=[self.told.empty] * len(z0))
        with torch.no_grad(), evaluating(self.denoiser), self.mixed_precision():
            without = self.task.predict(self.denoiser, z, t_B, nothing)
        return fields.moved(without, target, without, term.gain)

    def _preferred(self, term: TermConfig, batch: Batch, place: tuple[int, int, int], share: float) -> LossOut:
        """A choice between each picture and what the untouched model draws for its caption, at the same times.

        The picture has the noise of plain training, what was drawn the noise that it came from.
        """
        with self.teachers.deployed():
            z0, eps = batch.latents_BCHW.float(), noise_like(batch.latents_BCHW, *place)
            drawn, drawn_eps = self.unwanted.of(batch)
            t_B, next_B, weights_B = self._times(term, z0, place)
            weight_B = fields.weight(term.weighting, t_B, next_B) * weights_B
            trained: list[Tensor] = []
            before: list[Tensor] = []
            for clean, noise, masks in ((z0, eps, batch.masks_B1HW), (drawn, drawn_eps, None)):
                asked = self._asked(self.task.noising.noisy(clean, noise, t_B), t_B, batch)
                goal = self.task.noising.target(clean, noise, t_B)
                untouched = self.teachers.untouched(asked)
                with self.mixed_precision():
                    prediction = self.teachers.predict(asked)
                for errors, field_of in ((before, untouched), (trained, prediction)):
                    errors.append(weight_B * sample_loss(field_of, goal, self.config, masks))
            loss_B = fields.preference((trained[0], trained[1]), (before[0], before[1]), term.beta)
            loss = term.scale * (batch.weights_B * loss_B).mean()
            (loss * share).backward()  # type: ignore[no-untyped-call]
        return LossOut(loss.detach(), loss_B.detach(), t_B)

    def _times(self, term: TermConfig, z0: Tensor, place: tuple[int, int, int]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Times, the next on the grid where they are on it, and the weights that the times' type gives them."""
        if term.states == "data":
            t_B, weights_B = self.task.times(self.config, z0, *place)
            return t_B, None, weights_B
        grid = self.sampler.grid((z0.shape[-2], z0.shape[-1]), z0.device)
        picks = [seed_for("state", *place, i) % (len(grid) - 1) for i in range(len(z0))]
        t_B, next_B = (torch.tensor([grid[pick + after] for pick in picks], device=z0.device) for after in (0, 1))
        return t_B, next_B, torch.ones_like(t_B)

    def _asked(self, z: Tensor, t_B: Tensor, batch: Batch) -> Asked:
        told = [self.task.arch.picture_condition(framing, None) for framing in batch.framings]
        conditions = [caption | picture for caption, picture in zip(batch.conditions, told, strict=True)]
        return Asked(z, t_B, conditions, batch.names, batch.latents_BCHW)

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
        noise = torch.randn(z.shape, generator=generator("rollout noise", *place, i)).to(z.device)
        grid = self.sampler.grid((z.shape[-2], z.shape[-1]), z.device)
        wanted = self._wanted(term, grid, seed_for("state", *place, i))
        found: list[tuple[Tensor, float]] = []
        count = 0

        def predict(state: Tensor, t_B: Tensor, conditions: Sequence[Condition]) -> Tensor:
            """What `trajectory` steps on with; at chosen states the loss is led back on the way."""
            nonlocal count
            at, count = count, count + 1
            if at not in wanted:
                return self.task.arch.predict(self.denoiser, state, t_B, conditions)
            asked = Asked(state, t_B, list(conditions), one.names, z)
            with torch.enable_grad():
                prediction, loss = self._at(term, asked, grid[at : at + 2], share / len(wanted))
            found.append((loss, grid[at]))
            return prediction

        with self.teachers.deployed():
            states = self.sampler.states(predict, noise, one.conditions, seed_for("rollout", *place, i))
            for index, _ in enumerate(states):
                if index > wanted[-1]:
                    break
        mean = torch.stack([loss for loss, _ in found]).mean().reshape(1)
        return LossOut(term.scale * mean[0], mean, torch.tensor([found[0][1]]))

    def _wanted(self, term: TermConfig, grid: Sequence[float], number: int) -> list[int]:
        """The places on the grid whose states count in a rollout: every one, or one by a random number."""
        places = FewSteps.below(grid, term.below)
        return places if term.which == "all" else [places[number % len(places)]]

    def _at(self, term: TermConfig, asked: Asked, times: list[float], share: float) -> tuple[Tensor, Tensor]:
        """Prediction and loss (both detached) at one state of a rollout; its gradient is added."""
        here_B, next_B = (torch.tensor([time], device=asked.z.device) for time in times)
        target = self.teachers.target(term, asked, times)
        with self.mixed_precision():
            prediction = self.teachers.predict(asked)
        loss = (fields.weight(term.weighting, here_B, next_B) * fields.squared_error(prediction, target)).mean()
        (loss * (term.scale * share)).backward()  # type: ignore[no-untyped-call]
        return prediction.detach(), loss.detach()

    def _one(self, term: TermConfig, batch: Batch, i: int, place: tuple[int, int, int, int]) -> Batch:
        """A batch of one picture with what its rollout is told. Told a neutral prompt, only its size counts."""
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
