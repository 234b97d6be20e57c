"""Adapters on a miniature Z-Image transformer, in process and through diffusers, for the tests of LoRA files."""

import copy
import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detour.archs.zimage import SPEC
from detour.config.job import NetworkConfig
from detour.export import Base, from_training
from detour.lora_formats import LoraFile
from detour.nn.quiet import quiet_imports

DIM, TEXT_DIM, RANK = 48, 32, 4

with quiet_imports():
    from diffusers import ZImagePipeline, ZImageTransformer2DModel
    from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer


@functools.cache
def _transformer() -> ZImageTransformer2DModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ZImageTransformer2DModel(
            in_channels=16, dim=DIM, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=TEXT_DIM,
            axes_dims=[8, 8, 8], axes_lens=[64, 32, 32],
        ).eval()  # fmt: skip
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[-1]))
                elif "norm" in name or name == "cap_embedder.0.weight":
                    nn.init.ones_(parameter)
                else:
                    nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


def transformer() -> ZImageTransformer2DModel:
    """A fresh copy of the miniature, float32, with an output of a standard deviation of about one."""
    return copy.deepcopy(_transformer())


def layers() -> list[str]:
    return [name for name, module in _transformer().named_modules() if isinstance(module, nn.Linear)]


def shapes() -> dict[str, tuple[int, int]]:
    return {name: tuple(_transformer().get_submodule(name).weight.shape) for name in layers()}


def base(*, weights: bool = True) -> Base:
    whole = Base.of(_transformer(), SPEC)
    return whole if weights else Base(spec=SPEC, shapes=whole.shapes)


def output(model: nn.Module) -> Tensor:
    g = torch.Generator().manual_seed(1)
    picture = torch.randn(16, 1, 8, 8, generator=g)
    caption = torch.randn(20, TEXT_DIM, generator=g)
    with torch.no_grad():
        return model([picture], torch.tensor([0.3]), [caption], return_dict=False)[0][0]


def network(kind: str, *, rank: int = RANK, alpha: float | None = None) -> NetworkConfig:
    return NetworkConfig(type=kind, linear=rank, linear_alpha=alpha)


def trained(
    kind: str, *, alpha: float, rank: int = RANK, names: list[str] | None = None, **options: Any
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A miniature with an adapter of arbitrary weights on it, and the adapter's tensors by PEFT's names."""
    model = transformer()
    options |= {"r": rank, "target_modules": layers() if names is None else names}
    if kind in ("lora", "dora"):
        config: Any = LoraConfig(lora_alpha=alpha, use_dora=kind == "dora", **options)
    else:
        config = {"lokr": LoKrConfig, "loha": LoHaConfig}[kind](alpha=alpha, **options)
    inject_adapter_in_model(config, model)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=g)
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.1 * noise)
            elif "lora_" in name or "lokr_" in name or "hada_" in name:
                size = 0.25 if "hada_" in name else 0.1
                parameter.copy_(size * noise)
    tensors = {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}
    return model.eval(), tensors


def file_of(kind: str, *, alpha: float, rank: int = RANK, **options: Any) -> tuple[nn.Module, LoraFile]:
    model, tensors = trained(kind, alpha=alpha, rank=rank, **options)
    return model, from_training(tensors, network(kind, rank=rank, alpha=alpha))


def through_pipeline(path: Path) -> tuple[nn.Module, int]:
    """A fresh miniature with the file loaded by diffusers' own pipeline, and how many layers took part of it."""
    model = transformer()
    pipeline = ZImagePipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=model)
    pipeline.load_lora_weights(str(path))
    return model, sum(isinstance(module, BaseTunerLayer) for module in model.modules())
