"""Wan 2.1's row of the table of architectures."""

from typing import Any

import torch
from torch import Tensor, nn

from arch_row import Row
from detour.archs.base import ArchSpec
from detour.sample import Request


class _WanTruth(nn.Module):
    """Noise minus clean: what a perfect Wan returns."""

    def __init__(self, clean_BCHW: Tensor, noise_BCHW: Tensor) -> None:
        super().__init__()
        self.field = noise_BCHW - clean_BCHW
        self.dtype = clean_BCHW.dtype
        self.times: list[float] = []

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool) -> Any:
        self.times.append(timestep[0].item())
        assert len(hidden_states) == len(timestep) == len(encoder_hidden_states)
        assert encoder_hidden_states.shape[1] == 512 and not return_dict
        return (self.field.expand_as(hidden_states),)


def _draw(pipeline: Any, request: Request, spec: ArchSpec) -> Tensor:
    latents: Tensor = pipeline(
        prompt=request.prompt,
        negative_prompt=request.negative if request.guidance > 1 else None,
        width=request.width,
        height=request.height,
        num_frames=request.frames,
        num_inference_steps=request.steps,
        guidance_scale=spec.diffusers_guidance(request.guidance),
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="latent",
    ).frames
    return latents


def _full_size() -> nn.Module:
    """config.json of Wan-AI/Wan2.1-T2V-1.3B-Diffusers. The 14B has 40 heads, ffn_dim 13824 and 40 layers.

    The text encoder of both is UMT5-XXL: d_model 4096, d_ff 10240, d_kv 64, 64 heads, 24 layers, vocabulary 256384.
    """
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=12,
        attention_head_dim=128,
        in_channels=16,
        out_channels=16,
        text_dim=4096,
        freq_dim=256,
        ffn_dim=8960,
        num_layers=30,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=1e-6,
        rope_max_seq_len=1024,
    )


ROWS = [
    Row(
        name="wan21",
        pipeline="WanPipeline",
        native_truth=_WanTruth,
        lora_blocks=2 * 10,
        lora_all=2 * 10 + 6,
        full_size=_full_size,
        full_parameters=1_418_996_800,  # the sum over the published files, "1.42B" on the model's page
        full_lora_blocks=30 * 10,
        draw=_draw,
        guidances=(1.0, 5.0),
        recovers=1e-4,  # UniPC starts at sigma 1 - 1e-6
    ),
]
