"""A row of the table of architectures (`archs.py`): what the contract suite must know about each."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detour import archs, nano
from detour.archs.base import ArchSpec
from detour.sample import Request


def draw(pipeline: Any, request: Request, spec: ArchSpec) -> Tensor:
    """The latents that a diffusers pipeline draws."""
    latents: Tensor = pipeline(
        prompt=request.prompt,
        negative_prompt=request.negative if request.guidance > 1 else None,
        width=request.width,
        height=request.height,
        num_inference_steps=request.steps,
        guidance_scale=spec.diffusers_guidance(request.guidance),
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="latent",
    ).images
    return latents


@dataclass(frozen=True, kw_only=True)
class Row:
    name: str
    pipeline: str
    """Class in diffusers that samples it."""
    pipeline_class: Callable[[], Any] | None = None
    """Gives the class, where diffusers has none: a plain reference that is written down beside the row."""
    native_truth: Callable[[Tensor, Tensor], nn.Module]
    """(z_0, eps) to a stand-in for the denoiser that answers with the true field in the model's own convention."""
    lora_blocks: int
    """Linear layers of the miniature that `spec.lora_blocks` names."""
    lora_all: int
    full_size: Callable[[], nn.Module]
    """The denoiser at its published size, built from the published configuration (on the meta device)."""
    full_parameters: int
    """Of the denoiser as published."""
    full_lora_blocks: int
    draw: Callable[[Any, Request, ArchSpec], Tensor] = draw
    """How the pipeline is asked for latents, in the shape that this project gives them."""
    guidances: tuple[float, ...] = (1.0, 3.5)
    tolerance: float = 0.0
    """How far our latents may be from the pipeline's, relative to their largest value. 0: the same bits."""
    overfit_lr: float = 1e-2
    """Learning rate at which a LoRA of rank 16 on every layer overfits one batch in 60 steps."""
    reaching: int = 64
    """Pixels at which every layer gets a gradient: attention over a single position has nothing to learn."""
    unread: tuple[str, ...] = ()
    """Layers named by `spec.lora_blocks` whose output nothing reads, so that they get no gradient."""
    guidance_keeps_length: bool = False
    """Its pipeline gives each row of the guided prediction the length that it has without guidance."""
    recovers: float = 1e-5
    """How far the scheduler's last step may be from the clean latents, given the true field."""

    def write(self, folder: Path) -> None:
        """Write the architecture's miniature in the diffusers layout."""
        nano.write(folder, self.name, random=True)

    def load_pipeline(self, folder: Path) -> Any:
        """The pipeline that samples the miniature in `folder`, in float32, frozen and without bars."""
        import diffusers

        cls = self.pipeline_class() if self.pipeline_class is not None else getattr(diffusers, self.pipeline)
        pipeline = cls.from_pretrained(folder, dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(
                    False
                )  # as here: torch's matmul takes another path, and rounds otherwise, if it is on
        return pipeline

    @property
    def spec(self) -> ArchSpec:
        return archs.spec(self.name)

    def __str__(self) -> str:
        return self.name
