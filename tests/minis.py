"""A row's miniature in memory, with a few pictures: what tests of single predictions and steps need."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from arch_row import Row
from detour import archs
from detour.archs.base import Framing
from detour.config.job import NetworkConfig, TrainConfig
from detour.nano import drawn
from detour.nn import lora
from detour.train.objective import Task
from detour.weights import ModelSource, Placement, find_model, materialise

CPU = torch.device("cpu")
SIZE = 64  # pixels
NETWORK = NetworkConfig(linear=4, linear_alpha=2)
LARGE = NetworkConfig(linear=16, transformer_only=False)


@dataclass
class Mini:
    """A row's miniature with a few pictures."""

    row: Row
    root: Path

    def __post_init__(self) -> None:
        self.row.write(self.root / "model")
        drawn.write_dataset(self.root / "data", n=4, size=SIZE)
        self.arch = archs.get(self.row.name)  # type: ignore[arg-type]
        spec = self.arch.spec
        self.source: ModelSource = find_model(
            str(self.root / "model"), components=spec.components, denoiser=spec.denoiser
        )
        text = self.arch.load_text_encoders(self.source, Placement(torch.float32, CPU))
        self.captions = [path.read_text().strip() for path in sorted((self.root / "data").glob("*.txt"))[:2]]
        self.conditions = self.arch.encode_prompts(text, self.captions)
        self.scheduler = self.arch.load_scheduler(self.source, spec.default.scheduler)
        self.task = Task.of(self.arch, self.scheduler, TrainConfig())

    def denoiser(self, network: NetworkConfig = NETWORK, weights: dict[str, torch.Tensor] | None = None) -> nn.Module:
        """The denoiser with a LoRA on it: fresh, or with these weights."""
        denoiser = self.arch.build_denoiser(self.source)
        materialise(denoiser, self.arch.denoiser_tensors(self.source), Placement(torch.float32, CPU), where="miniature")
        lora.attach(denoiser, lora.linear_names(denoiser, self.arch.spec, network), network, 0)
        if weights is not None:
            lora.load_state(denoiser, weights)
        return denoiser

    def field(self, denoiser: nn.Module, z: torch.Tensor, t: float) -> torch.Tensor:
        told = self.arch.picture_condition(Framing.whole(SIZE, SIZE), None)
        conditions = [condition | told for condition in self.conditions[: len(z)]]
        return self.arch.predict(denoiser, z, self.task.noising.times(torch.full((len(z),), t)), conditions)

    def batch(self, size: int = SIZE) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean latents and noise of two pictures."""
        g = torch.Generator().manual_seed(3)
        shape = (2, *self.arch.spec.latent_shape(size, size))
        return torch.randn(shape, generator=g), torch.randn(shape, generator=g)

    def fit(
        self, network: NetworkConfig, steps: int, enough: float = 0.0
    ) -> tuple[dict[str, torch.Tensor], list[float]]:
        """Fit a LoRA to one batch at one time: its weights, and the loss before each step.

        It ends sooner where the loss has fallen to a share `enough` of the first.
        """
        denoiser = self.denoiser(network)
        z0, eps = self.batch()
        t_B = self.task.noising.times(torch.full((2,), 0.6))
        z, target = self.task.noising.noisy(z0, eps, t_B), self.task.noising.target(z0, eps, t_B)
        optimizer = torch.optim.AdamW(lora.trainable(denoiser).values(), lr=self.row.overfit_lr, weight_decay=0.0)
        losses: list[float] = []
        for _ in range(steps):
            loss = (self.field(denoiser, z, 0.6) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if losses[-1] < enough * losses[0]:
                break
        return {name: tensor.clone() for name, tensor in lora.state(denoiser).items()}, losses
