"""Rows of Stable Diffusion 1 and 2 in the table of architectures."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from arch_row import Row
from unet_truth import UNetTruth


def _truth(predicts: Any, clean_BCHW: Tensor, noise_BCHW: Tensor) -> nn.Module:
    return UNetTruth(clean_BCHW, predicts)


def _full(**config: Any) -> nn.Module:
    """`unet/config.json` as published; what is not said there or here is diffusers' default."""
    from diffusers import UNet2DConditionModel

    stages = {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "norm_num_groups": 32}
    return UNet2DConditionModel(**(stages | config))


ROWS = [
    Row(
        name="sd1",
        pipeline="StableDiffusionPipeline",
        native_truth=partial(_truth, "eps"),
        lora_blocks=16 * 10,  # transformers, each with two attentions and a feed-forward
        lora_all=16 * 10 + 22 + 2,  # time_emb_proj of the residual blocks, time_embedding
        full_size=partial(_full, cross_attention_dim=768, attention_head_dim=8),
        full_parameters=859_520_964,
        full_lora_blocks=16 * 10,
        reaching=128,
        recovers=0.2,  # PNDM ends at the first level, at 3 % noise (`set_alpha_to_one: false`)
    ),
    Row(
        name="sd2",
        pipeline="StableDiffusionPipeline",
        native_truth=partial(_truth, "v"),
        lora_blocks=16 * 12,  # and their linear layers at both ends
        lora_all=16 * 12 + 22 + 2,
        full_size=partial(
            _full, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
        ),
        full_parameters=865_910_724,
        full_lora_blocks=16 * 12,
        reaching=128,
        recovers=0.2,  # as DDIM does
    ),
]
