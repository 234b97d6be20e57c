"""Terms of the loss on the miniature of a distilled model in float32: what their tests share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import rows_zimage
from detour.archs.base import Framing
from detour.config.job import NetworkConfig, TrainConfig
from detour.config.preserve import TermConfig
from detour.data.loader import Batch
from detour.nano.adapter import write_adapter
from detour.nn import lora
from detour.nn.training_adapter import TrainingAdapter, linear_shapes, load_training_adapter
from detour.train.objective import LossOut
from detour.train.preserve import Objective, Told
from detour.train.teachers import Base
from minis import Mini

STEPS = 4
NETWORK = NetworkConfig(linear=4)
CONFIG = TrainConfig(seed=7, timestep_type="sigmoid", dtype="fp32")
ROLLOUT = TermConfig(states="rollout", target="frozen")


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Mini:
    return Mini(rows_zimage.ROWS[0], tmp_path_factory.mktemp("zimage"))


@pytest.fixture(scope="session")
def trained(mini: Mini) -> dict[str, torch.Tensor]:
    """Weights of a LoRA that changes predictions."""
    return mini.fit(NETWORK, 6)[0]


def batch_of(mini: Mini) -> Batch:
    """Two pictures, called a and b."""
    z0, _ = mini.batch()
    return Batch(
        latents_BCHW=z0,
        conditions=mini.conditions,
        weights_B=torch.ones(2),
        masks_B1HW=None,
        names=["a", "b"],
        prompts=mini.captions,
        framings=[Framing.whole(64, 64)] * 2,
        is_reg=False,
        epoch=0,
    )


def told(mini: Mini) -> Told:
    one, two = mini.conditions
    return Told(neutral=[two], rich=dict.fromkeys(("a", "b"), two), empty=one)


def objective(mini: Mini, denoiser: nn.Module, *terms: TermConfig, **parts: Any) -> Objective:
    return Objective(
        task=mini.task, denoiser=denoiser, config=CONFIG, terms=terms, told=parts.pop("told", told(mini)),
        scheduler=mini.scheduler, steps=STEPS, **parts,
    )  # fmt: skip


def gradient(denoiser: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in lora.trainable(denoiser).items()}


def step(objective: Objective, batch: Batch, share: float = 1.0, number: int = 0) -> LossOut:
    return objective.backward(batch, number, 0, share)


@contextmanager
def forwards(*denoisers: nn.Module) -> Iterator[dict[str, int]]:
    """How often models run on one picture, with and without a gradient."""
    counts = {"with": 0, "without": 0}

    def count(_: nn.Module, args: tuple[Any, ...]) -> None:
        counts["with" if torch.is_grad_enabled() else "without"] += len(args[0])

    with ExitStack() as stack:
        for denoiser in denoisers:
            stack.callback(denoiser.register_forward_pre_hook(count).remove)
        yield counts


def attached(mini: Mini, denoiser: nn.Module) -> TrainingAdapter:
    """A training adapter on a denoiser."""
    adapter = _branch(mini)
    adapter.attach(denoiser)
    return adapter


def _branch(mini: Mini) -> TrainingAdapter:
    path = mini.root / "adapter.safetensors"
    if not path.exists():
        write_adapter(path, "zimage", mini.root / "model", scale=0.3)
    shapes = linear_shapes(mini.arch.build_denoiser(mini.source))
    return load_training_adapter(path, shapes, mini.arch.spec.lora_keys, "factored", dtype=torch.float32)


def base(mini: Mini, *, scale: float = 1.0) -> Base:
    """Another model (every weight a fifth larger) and what a LoRA changes in it, times `scale`."""
    denoiser = mini.denoiser(NETWORK)  # its LoRA is untrained: it changes nothing
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            parameter.mul_(1.2 if "lora_" not in name else 1.0)
    change = _branch(mini)
    for branch in change._branches.values():
        branch.pair = type(branch.pair)(branch.pair.A, branch.pair.B * scale, branch.pair.scale)
        branch.B = branch.pair.B
    change.attach(denoiser)
    return Base(denoiser, change)
