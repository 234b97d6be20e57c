"""Random training adapters for miniatures, in the layout of the published ones.

Shapes: O out features, I in features, R rank.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from detour import archs
from detour.nn.rng import generator
from detour.weights import find_model

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from detour.config.job import ModelArch


def write_adapter(  # the layout and the size of the published ones are its defaults
    path: Path, arch: ModelArch, folder: Path, *, prefix: str | None = None, rank: int = 4, seed: int = 0,
    scale: float = 0.1,
) -> None:  # fmt: skip
    """Write a random training adapter for the model in `folder`, for the layers that a LoRA of its kind has.

    That is `<prefix><module>.lora_A/B.weight` in bf16, without alpha (alpha = rank); `prefix` is diffusers' unless
    given. `scale` is the Frobenius norm of each B A relative to that of the weight it is added to.
    """
    behaviour = archs.get(arch)
    spec = behaviour.spec
    source = find_model(str(folder), components=[spec.denoiser], denoiser=spec.denoiser)
    start = spec.lora_keys.diffusers_prefix if prefix is None else prefix
    tensors: dict[str, Tensor] = {}
    for key, weight in behaviour.denoiser_tensors(source):
        name = key.removesuffix(".weight")
        if key == name or weight.ndim != 2 or re.fullmatch(spec.lora_blocks, name) is None:
            continue
        weight_OI = weight.float()
        A_RI = torch.randn(rank, weight_OI.shape[1], generator=generator(seed, "adapter A", name))
        B_OR = torch.randn(weight_OI.shape[0], rank, generator=generator(seed, "adapter B", name))
        B_OR = B_OR * (scale * weight_OI.norm() / (B_OR @ A_RI).norm())
        tensors[f"{start}{name}.lora_A.weight"] = A_RI.bfloat16()
        tensors[f"{start}{name}.lora_B.weight"] = B_OR.bfloat16().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})
