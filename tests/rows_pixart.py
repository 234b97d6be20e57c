"""Rows of PixArt-alpha and PixArt-Sigma in the table of architectures."""

from typing import Any

import torch
from torch import Tensor, nn

from arch_row import Row
from detour.archs.base import ArchSpec
from detour.sample import Request

_LEVELS = torch.cumprod(1 - torch.linspace(0.0001, 0.02, 1000), 0)
"""a^2 of PixArt's noise levels."""


class _PixArtTruth(nn.Module):
    """The noise in any state of a clean picture, and what is dropped of a real one's answer."""

    def __init__(self, clean_BCHW: Tensor, told_size: bool) -> None:
        super().__init__()
        self.clean_BCHW, self.dtype = clean_BCHW, clean_BCHW.dtype
        self.use_additional_conditions = told_size

    def forward(
        self,
        state_BCHW: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        timestep: Tensor,
        added_cond_kwargs: dict[str, Tensor | None],
        return_dict: bool,
    ) -> Any:
        assert encoder_hidden_states.shape[:2] == encoder_attention_mask.shape and not return_dict
        assert (added_cond_kwargs["resolution"] is not None) == self.use_additional_conditions
        assert torch.equal(timestep, timestep.round())
        alpha = _LEVELS[timestep.long()].reshape(-1, 1, 1, 1)
        noise_BCHW = (state_BCHW - alpha.sqrt() * self.clean_BCHW) / (1 - alpha).sqrt()
        return (torch.cat([noise_BCHW, torch.full_like(noise_BCHW, 7.0)], dim=1),)


def _draw(pipeline: Any, request: Request, spec: ArchSpec) -> Tensor:
    latents: Tensor = pipeline(
        prompt=request.prompt,
        negative_prompt=request.negative if request.guidance > 1 else "",
        width=request.width,
        height=request.height,
        num_inference_steps=request.steps,
        guidance_scale=spec.diffusers_guidance(request.guidance),
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="latent",
        clean_caption=False,
        use_resolution_binning=False,
    ).images
    return latents


def _full(**config: Any) -> nn.Module:
    """config.json of PixArt-alpha/PixArt-XL-2-1024-MS and PixArt-alpha/PixArt-Sigma-XL-2-1024-MS.

    The text encoder of both is that of T5 1.1 XXL: d_model 4096, d_ff 10240, d_kv 64, 64 heads, 24 layers, vocabulary
    32128.
    """
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=28,
        cross_attention_dim=1152,
        attention_bias=True,
        sample_size=128,
        patch_size=2,
        caption_channels=4096,
        **config,
    )


ROWS = [
    Row(
        name="pixart",
        pipeline="PixArtAlphaPipeline",
        native_truth=lambda clean, _: _PixArtTruth(clean, told_size=True),
        lora_blocks=3 * 10,
        lora_all=3 * 10 + 3 * 2 + 4,  # three embedders, adaln_single's own layer, caption projection, the last layer
        full_size=_full,
        full_parameters=611_349_152,  # "0.6B"
        full_lora_blocks=28 * 10,
        draw=_draw,
        guidances=(1.0, 4.5),
        recovers=1e-4,  # the first level has a signal of 0.006, by which rounding is divided
    ),
    Row(
        name="pixart_sigma",
        pipeline="PixArtSigmaPipeline",
        native_truth=lambda clean, _: _PixArtTruth(clean, told_size=False),
        lora_blocks=3 * 10,
        lora_all=3 * 10 + 2 + 4,
        full_size=lambda: _full(use_additional_conditions=False, interpolation_scale=2),
        full_parameters=610_856_096,  # "0.6B"
        full_lora_blocks=28 * 10,
        draw=_draw,
        guidances=(1.0, 4.5),
        recovers=1e-4,
    ),
]
