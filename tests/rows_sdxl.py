"""Rows of Stable Diffusion XL and its kin in the table of architectures."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from arch_row import Row
from unet_truth import UNetTruth


def _truth(clean_BCHW: Tensor, noise_BCHW: Tensor) -> nn.Module:
    return UNetTruth(clean_BCHW, "eps")


def _full(**blocks: Any) -> nn.Module:
    """`unet/config.json` as published; what is not said there or here is diffusers' default.

    Which blocks SSD-1B and Vega have was checked against the names of all of their 944 and 564 tensors, as listed in
    ai-toolkit's key maps (toolkit/keymaps/stable_diffusion_ssd.json and ..._vega.json at commit 27a03a91). Text
    encoders of all three: CLIP-L (12 layers of 768 features, 123,060,480 parameters) and OpenCLIP-bigG (32 of 1280,
    694,659,840).
    """
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        layers_per_block=2,
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        **blocks,
    )


def _row(
    name: str, *, parameters: int, layers: int, others: int, blocks: dict[str, Any], small: int | None = None
) -> Row:
    """`small`: layers of the miniature, where it has not as many transformer blocks as the real one."""
    small = layers if small is None else small
    return Row(
        name=name,
        pipeline="StableDiffusionXLPipeline",
        native_truth=_truth,
        lora_blocks=small,
        lora_all=small + others,
        full_size=partial(_full, **blocks),
        full_parameters=parameters,
        full_lora_blocks=layers,
    )


ROWS = [
    _row(
        "sdxl",
        parameters=2_567_463_684,
        layers=70 * 10 + 11 * 2,  # transformer blocks; both ends of the attentions
        small=28 * 10 + 11 * 2,
        others=17 + 4,  # time_emb_proj of the residual blocks; time_embedding, add_embedding
        blocks={"transformer_layers_per_block": (1, 2, 10)},
    ),
    _row(
        "vega",
        parameters=745_225_604,  # "745M" on its page
        layers=15 * 10 + 10 * 2,
        others=16 + 4,
        blocks={"transformer_layers_per_block": (1, 1, 2), "mid_block_type": "UNetMidBlock2D"},
    ),
    _row(
        "ssd",
        parameters=1_331_334_404,  # "1.3B" on its page
        layers=34 * 10 + 10 * 2,
        others=16 + 4,
        blocks={
            "transformer_layers_per_block": (1, 2, 4),
            "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
            "mid_block_type": "UNetMidBlock2D",
        },
    ),
]
