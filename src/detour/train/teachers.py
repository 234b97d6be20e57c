"""Whom the terms of the loss learn from: the model in other states, and the fields that it gives then.

Teachers are the same weights with what is trained switched off, averaged, or as it was when the run began: never a
second copy. The one exception is `delta`, whose undistilled base is another model.

Shapes: B batch, C channels, H W latent height and width (of video: C F H W). Time t is in [0, 1]: 0 is clean.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from detour.nn import fields, lora
from detour.nn.flow import over
from detour.nn.picture_tokens import with_picture
from detour.train.objective import evaluating

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import nn

    from detour.archs.base import Arch, Condition
    from detour.config.preserve import TermConfig
    from detour.nn.training_adapter import TrainingAdapter
    from detour.train.ema import Ema


@dataclass(frozen=True, slots=True)
class Asked:
    """A question to a model: states, times, and all that it is told."""

    z: Tensor
    t_B: Tensor
    conditions: list[Condition]
    names: list[str]
    """Of the pictures, as in a batch."""
    pictures: Tensor
    """Their latents."""


@dataclass
class Told:
    """Conditions besides the captions', by what they are for."""

    neutral: list[Condition] = field(default_factory=list)
    rich: dict[str, Condition] = field(default_factory=dict)
    """The long caption's, by the picture's name in batches."""
    empty: Condition = field(default_factory=dict)
    """Of no caption at all."""
    picture_tokens: int = 0
    """How many tokens a picture is for the model."""


@dataclass(frozen=True)
class Base:
    """An undistilled model, and a LoRA that was trained on it."""

    denoiser: nn.Module
    change: TrainingAdapter
    """The LoRA, as a branch."""

    def fields(self, arch: Arch, asked: Asked) -> tuple[Tensor, Tensor]:
        """What it predicts with the LoRA, and without."""
        with_it = arch.predict(self.denoiser, asked.z, asked.t_B, asked.conditions).float()
        with self.change.removed():
            return with_it, arch.predict(self.denoiser, asked.z, asked.t_B, asked.conditions).float()


@dataclass(frozen=True)
class Teachers:
    """The model in each of the states that targets need."""

    arch: Arch
    denoiser: nn.Module
    told: Told
    adapter: TrainingAdapter | None
    ema: Ema | None
    base: Base | None
    begun: Mapping[str, Tensor]
    """What is trained, as it was when the run began; empty where nobody asks."""
    mixed_precision: Callable[[], AbstractContextManager[object]]

    def predict(self, asked: Asked) -> Tensor:
        """What the model says as it is now, float32."""
        return self.arch.predict(self.denoiser, asked.z, asked.t_B, asked.conditions).float()

    def deployed(self) -> AbstractContextManager[None]:
        """The model as it will be used: without the training adapter."""
        return self.adapter.removed() if self.adapter is not None else nullcontext()

    def target(self, term: TermConfig, asked: Asked, times: Sequence[float] = ()) -> Tensor:
        """What a term draws predictions to; no gradient. `times` are that of the state and the next, of rollouts."""
        if term.target == "path":
            return self._path(term, asked, times)
        if term.target == "average":
            assert self.ema is not None, "the schema asks for it"
            return self._in_state(self.ema.swapped(), self.of_teacher(term, asked))
        untouched = self.untouched(self.of_teacher(term, asked))
        if term.target == "delta":
            return self._transferred(term, asked, untouched)
        if term.target == "bounded":
            t_B = asked.t_B.to(asked.z)
            goal = (asked.z - asked.pictures.to(asked.z)) / over(t_B, asked.z)
            return fields.bounded(goal, untouched, asked.z, t_B, term.radius)
        return untouched

    def untouched(self, asked: Asked) -> Tensor:
        """What the model predicts without what is trained; no gradient."""
        return self._in_state(lora.disabled(self.denoiser), asked)

    def of_teacher(self, term: TermConfig, asked: Asked) -> Asked:
        """The question as the teacher is asked it."""
        if term.teacher_told == "same":
            return asked
        if term.teacher_told == "rich":
            more = [self.told.rich[name] for name in asked.names]
        else:
            key, count = self.arch.spec.picture_tokens, self.told.picture_tokens
            pairs = zip(asked.conditions, asked.pictures, strict=True)
            more = [{key: with_picture(told[key], picture, count)} for told, picture in pairs]
        conditions = [told | extra for told, extra in zip(asked.conditions, more, strict=True)]
        return replace(asked, conditions=conditions)

    def _in_state(self, state: AbstractContextManager[None], asked: Asked) -> Tensor:
        with torch.no_grad(), evaluating(self.denoiser), state, self.mixed_precision():
            return self.predict(asked)

    def _transferred(self, term: TermConfig, asked: Asked, untouched: Tensor) -> Tensor:
        assert self.base is not None, "the schema asks for it"
        with torch.no_grad(), self.mixed_precision():
            changed, unchanged = self.base.fields(self.arch, asked)
        return fields.moved(untouched, changed, unchanged, term.gain)

    def _path(self, term: TermConfig, asked: Asked, times: Sequence[float]) -> Tensor:
        """The velocity that leads straight to where small steps of the model as it was at the start end."""
        start, end = times
        between = [start + (end - start) * k / term.path_steps for k in range(term.path_steps + 1)]
        state = asked.z
        with torch.no_grad(), evaluating(self.denoiser), self._as_begun(), self.mixed_precision():
            for here, there in pairwise(between):
                t_B = torch.full_like(asked.t_B, here)
                state = state + (there - here) * self.predict(replace(asked, z=state, t_B=t_B))
        return (state - asked.z) / (end - start)

    @contextmanager
    def _as_begun(self) -> Iterator[None]:
        """The trained weights as they were when the run began, with the training adapter if there is one."""
        trained = {name: tensor.clone() for name, tensor in lora.state(self.denoiser).items()}
        lora.load_state(self.denoiser, self.begun)
        try:
            with nullcontext() if self.adapter is None else self.adapter.present():
                yield
        finally:
            lora.load_state(self.denoiser, trained)
