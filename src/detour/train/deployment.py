"""The model as a finished LoRA is used: what previews and the drift meter are drawn with.

Mostly that is the trained model without its training adapter. There may be a patch, a second LoRA that is on the model
only while it draws (`preserve.distill_patch`); or the model is another one, which the trained LoRA is put on each time
(`preserve.deploy_on`).
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from detour.nn import lora
from detour.train.objective import evaluating

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from detour.archs.base import Scheduler
    from detour.nn.training_adapter import TrainingAdapter


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A denoiser to draw with, and what is done to it before."""

    denoiser: nn.Module
    trained: nn.Module
    """What has the LoRA: the denoiser, it and its text encoders, or another model's."""
    scheduler: Scheduler
    device: torch.device
    adapter: TrainingAdapter | None = None
    patch: TrainingAdapter | None = None
    patch_sha256: str | None = None
    elsewhere: bool = False
    """The denoiser is not the trained one: it waits in main memory, and is given the LoRA as it stands."""

    @property
    def with_lora(self) -> nn.Module:
        """What the LoRA's strength is changed on."""
        return self.denoiser if self.elsewhere else self.trained

    @contextmanager
    def tuned(self) -> Iterator[None]:
        """With the LoRA as it stands, and with the patch."""
        with ExitStack() as stack:
            stack.enter_context(self._ready())
            if self.elsewhere:
                lora.load_state(self.denoiser, lora.state(self.trained))
            if self.patch is not None:
                self.patch.attach(self.denoiser)
                stack.callback(self.patch.detach)
            yield

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Without LoRA and patch."""
        with self._ready(), lora.disabled(self.denoiser):
            yield

    @contextmanager
    def _ready(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.elsewhere:
                self.denoiser.to(self.device)
                stack.callback(self._put_away)
            stack.enter_context(evaluating(self.denoiser))
            if self.adapter is not None:
                stack.enter_context(self.adapter.removed())
            yield

    def _put_away(self) -> None:
        self.denoiser.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
