"""The miniature that the recipes train: its transformer, its other parts, and drawing many pictures with it at once.

Shapes: B batch, C channels, H W latent positions, L tokens, D features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from detour import UserError, archs
from detour.nano import codec, language, parts
from detour.nano.recipes.fast import FastField
from detour.nn.quiet import without_bars

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from diffusers import ZImageTransformer2DModel

    from detour.nano.world import Pictures

    Field = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """z_BCHW, t_B, captions_BLD, padding_BL to v_BCHW, as `FastField`."""

LATENT_HW = (codec.POSITIONS, codec.POSITIONS)
DIM, LAYERS, HEADS = 128, 4, 4  # 1.96 M parameters
SHIFT = 3.0
WEIGHTS = "diffusion_pytorch_model.safetensors"
BATCH = 32  # pictures drawn at a time
EMPTY = ""
"""The prompt that stands for no caption, in training and in guidance."""


def build_transformer(seed: int = 0) -> ZImageTransformer2DModel:
    """A transformer ready to be trained: blocks that begin as the identity, an output that begins at zero."""
    from diffusers import ZImageTransformer2DModel

    with torch.random.fork_rng(devices=[]):  # the constructor draws weights, all of which are replaced
        model = ZImageTransformer2DModel(
            in_channels=codec.CHANNELS,
            dim=DIM,
            n_layers=LAYERS,
            n_refiner_layers=1,
            n_heads=HEADS,
            n_kv_heads=HEADS,
            cap_feat_dim=language.WIDTH,
            axes_dims=[8, 12, 12],  # the real 32, 48, 48, a quarter of it
            axes_lens=[1024, 512, 512],
        )
    for name, parameter, draw in parts.drawn(model, "nano base", seed):
        if "pad_token" in name:
            parameter.copy_(draw * 0.02)
        elif name.endswith("bias") or "adaLN_modulation" in name or name.startswith("all_final_layer.2-1.linear"):
            nn.init.zeros_(parameter)
        elif "norm" in name or name == "cap_embedder.0.weight":
            nn.init.ones_(parameter)
        else:
            parameter.copy_(draw / math.sqrt(parameter.shape[-1]))
    return model


def write(folder: Path, transformer: Mapping[str, Tensor]) -> None:
    """Write a complete model with these weights into `folder`, in diffusers' layout and in bf16."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

    denoiser = build_transformer()
    denoiser.load_state_dict({name: tensor.float() for name, tensor in transformer.items()})
    tokenizer = language.build_tokenizer()
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT),
        vae=codec.build_vae().to(torch.bfloat16),
        text_encoder=language.build_text_encoder(tokenizer).to(torch.bfloat16),
        tokenizer=tokenizer,
        transformer=denoiser.to(torch.bfloat16),
    )
    with without_bars():
        pipeline.save_pretrained(folder)


def load_transformer(folder: Path) -> dict[str, Tensor]:
    """The transformer's weights of a model that a recipe has written, float32."""
    path = folder / "transformer" / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path} is missing; name a folder that a recipe has written a model to (OUT/model)")
    return {name: tensor.float() for name, tensor in load_file(path).items()}


@dataclass
class Miniature:
    """The parts that the recipes use: the transformer over batches, and captions."""

    denoiser: ZImageTransformer2DModel
    field: Field
    trained_field: Field
    """The same, compiled if that was asked for: only for training, whose batches are all of one size."""
    captions: language.Captions

    @classmethod
    def of(cls, denoiser: ZImageTransformer2DModel, *, compiled: bool = False) -> Miniature:
        """With the built text encoder. `compiled`: two minutes of compilation, then half the time for each step."""
        field = FastField(denoiser, LATENT_HW)
        tokenizer = language.build_tokenizer()
        captions = language.Captions(tokenizer, language.build_text_encoder(tokenizer))
        return cls(denoiser, field, torch.compile(field) if compiled else field, captions)

    @classmethod
    def load(cls, folder: Path) -> Miniature:
        """From a model that a recipe has written, with weights that do not require gradients."""
        denoiser = build_transformer()
        denoiser.load_state_dict(load_transformer(folder))
        return cls.of(denoiser.eval().requires_grad_(False))

    def velocity(self, z_BCHW: Tensor, t_B: Tensor, condition: tuple[Tensor, Tensor]) -> Tensor:
        """v in float32, computed in bf16 where that is safe."""
        field = self.trained_field if torch.is_grad_enabled() else self.field
        with torch.autocast("cpu", torch.bfloat16):
            return field(z_BCHW, t_B, *condition).float()


@cache
def grid(steps: int) -> tuple[float, ...]:
    """The times of a sampler of that many steps, 1 to 0, from the scheduler that samples."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT)
    archs.get("zimage").set_timesteps(scheduler, steps, LATENT_HW, torch.device("cpu"))
    return tuple(float(sigma) for sigma in scheduler.sigmas)


def noise_for(seeds: Sequence[int]) -> Tensor:
    """noise_BCHW: for each seed what `detour sample` draws with."""
    shape = (codec.CHANNELS, *LATENT_HW)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def rollout(
    model: Miniature, noise_BCHW: Tensor, condition: tuple[Tensor, Tensor], steps: int, guidance: float
) -> list[Tensor]:
    """The states of a sampler that is told `condition`, noise first. `guidance` counts 1 as none."""
    if guidance > 1:
        nothing = model.captions([EMPTY] * len(noise_BCHW))
        condition = (torch.cat([condition[0], nothing[0]]), torch.cat([condition[1], nothing[1]]))
    times, states = grid(steps), [noise_BCHW]
    for now, then in pairwise(times):
        z_BCHW = states[-1]
        t_B = torch.full((len(condition[0]),), now)
        v_BCHW = model.velocity(torch.cat([z_BCHW] * (len(t_B) // len(z_BCHW))), t_B, condition)
        if guidance > 1:
            positive, negative = v_BCHW.chunk(2)
            v_BCHW = positive + (guidance - 1) * (positive - negative)
        states.append(z_BCHW + (then - now) * v_BCHW)
    return states


def draw(model: Miniature, texts: Sequence[str], *, steps: int, guidance: float, seed: int = 0) -> Pictures:
    """A picture for each text, from the noise of the seeds `seed`, `seed` + 1, ... Not clipped."""
    return draw_all(model, texts, [seed], steps=steps, guidance=guidance)[0]


def draw_all(
    model: Miniature, texts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance: float
) -> list[Pictures]:
    """For each of `seeds` the same texts: text i from the noise of that seed plus i. Not clipped."""
    asked = [(text, seed + index) for seed in seeds for index, text in enumerate(texts)]
    latents = []
    for start in range(0, len(asked), BATCH):
        part = asked[start : start + BATCH]
        noise_BCHW = noise_for([seed for _, seed in part])
        condition = model.captions([text for text, _ in part])
        latents.append(rollout(model, noise_BCHW, condition, steps, guidance)[-1])
    pictures = codec.decode(torch.cat(latents))
    return [pictures[at : at + len(texts)] for at in range(0, len(pictures), len(texts))]
