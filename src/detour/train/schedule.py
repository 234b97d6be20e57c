"""The learning rate as a pure function of the step: resuming needs no state."""

from __future__ import annotations

from math import cos, pi
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from detour.config.job import TrainConfig


def lr_at(config: TrainConfig, step: int, total: int) -> float:
    """The learning rate of the update that follows `step` finished ones (0 for the first), out of `total`.

    Warm-up: (step + 1) / lr_warmup_steps, so that the first update is not spent on a rate of zero. After it, progress
    runs from 0 at the first step to 1 at `total`, and the shapes are those of transformers' schedules of these names,
    lifted so that they end at `lr_min_ratio`: linear 1 - p, cosine (1 + cos(pi p)) / 2, restarts with p * cycles mod 1.
    """
    warmup = config.lr_warmup_steps
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return config.lr * (config.lr_min_ratio + (1 - config.lr_min_ratio) * _shape(config, progress))


def _shape(config: TrainConfig, progress: float) -> float:
    """From 1 to 0 as progress goes from 0 to 1 (`constant` stays at 1)."""
    if config.lr_scheduler == "constant":
        return 1.0
    if config.lr_scheduler == "linear":
        return 1 - progress
    if config.lr_scheduler == "cosine_with_restarts":
        progress = 1.0 if progress >= 1 else progress * config.lr_cycles % 1
    return 0.5 * (1 + cos(pi * progress))


def text_lr_at(config: TrainConfig, step: int, total: int) -> float | None:
    """The same for text encoders; None where they are not trained."""
    if not config.train_text_encoder:
        return None
    lr = config.lr if config.text_encoder_lr is None else config.text_encoder_lr
    return lr_at(config.model_copy(update={"lr": lr}), step, total)


def set_lr(optimizer: Optimizer, lr: float, text_lr: float | None = None) -> None:
    """Give every group of an optimizer its learning rate: the last is that of text encoders, if there are two rates."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    if text_lr is not None:
        optimizer.param_groups[-1]["lr"] = text_lr
