"""Random Stable Diffusion XL, SSD-1B and Vega in miniature, in the folder layout of the real ones.

Every part is of the real class, and the UNets have the real blocks: three stages, of which the first has no attention;
in SSD-1B and Vega a middle of one residual block, and 34 and 15 transformer blocks, in SSD-1B of other numbers from one
attention to the next. Only SDXL's attentions of ten transformer blocks have three, to save time: 28 instead of 70. The
VAE is built by hand (`parts.build_vae`). About 1 M parameters in each UNet, 3 MB for the whole.

Files are a pure function of the seed, byte for byte; the global random state is left as it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from detour import UserError
from detour.nano import ldm, parts
from detour.nn.quiet import without_bars

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from diffusers import UNet2DConditionModel

DTYPE = torch.bfloat16
TEXT_DIMS = (24, 40)
"""Of the two text encoders: 768 and 1280 in the real ones."""
SIZE_DIM = 8
"""Features of each of the six numbers about sizes: 256 in the real ones."""
_LEVELS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
_UNET: Mapping[str, Any] = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [32, 40, 24],  # most transformer blocks are on the last stage
    "attention_head_dim": [4, 5, 3],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "cross_attention_dim": sum(TEXT_DIMS),
    "addition_time_embed_dim": SIZE_DIM,
    "projection_class_embeddings_input_dim": TEXT_DIMS[1] + 6 * SIZE_DIM,
}
_BLOCKS: dict[str, dict[str, Any]] = {
    "sdxl": {"transformer_layers_per_block": [1, 2, 3]},
    "ssd": {
        "transformer_layers_per_block": [1, 2, 4],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
    },
    "vega": {"transformer_layers_per_block": [1, 1, 2], "mid_block_type": "UNetMidBlock2D"},
}
_EULER = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
_SCHEDULERS: dict[str, Mapping[str, object]] = {
    "base": _EULER,
    "turbo": {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
    "lightning": _EULER,  # these two come with the base model's and are sampled otherwise
    "hyper": _EULER,
}


def write(folder: Path, arch: str = "sdxl", variant: str = "", *, seed: int = 0) -> None:
    """Write the miniature into `folder` in the diffusers layout, ready for `from_pretrained`."""
    variant = variant or "base"
    if arch not in _BLOCKS or variant not in (_SCHEDULERS if arch == "sdxl" else ("base",)):
        allowed = ", ".join([f"sdxl:{name}" for name in _SCHEDULERS] + ["ssd", "vega"])
        raise UserError(f"detour nano: {arch}:{variant} is not known here; allowed: {allowed}")
    import diffusers
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    key, scheduler = (f"nano {arch}", seed), _SCHEDULERS[variant]
    with torch.random.fork_rng(devices=[]):  # constructors draw initial weights, all of which are replaced
        tokenizers = [parts.clip_tokenizer(pad) for pad in ("<|endoftext|>", "!")]
        texts = [
            parts.clip_text(cls, len(tokenizers[0]), *key, f"text {place}", width=TEXT_DIMS[place]).to(DTYPE)
            for place, cls in enumerate((CLIPTextModel, CLIPTextModelWithProjection))
        ]
        pipeline = diffusers.StableDiffusionXLPipeline(
            scheduler=getattr(diffusers, str(scheduler["_class_name"])).from_config(_LEVELS | dict(scheduler)),
            vae=parts.build_vae(4, scaling=0.13025, shift=None, quant_conv=True).to(DTYPE),
            text_encoder=texts[0],
            text_encoder_2=texts[1],
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=_build_unet(arch, *key).to(DTYPE),
            add_watermarker=False,
        )
    with without_bars():
        pipeline.save_pretrained(folder)


def _build_unet(arch: str, *key: int | str) -> UNet2DConditionModel:
    """What a transformer block adds is damped, as there are chains of ten: a LoRA's effect would else be chaotic."""
    unet = ldm.unet(*key, "unet", **_UNET, **_BLOCKS[arch])
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.endswith((".to_out.0.weight", ".ff.net.2.weight")):
                parameter.mul_(0.3)
    return unet


def write_original(path: Path, folder: Path, *, bundled: bool = True) -> None:
    """Write the model in `folder` as a single file in the original layout; `bundled` with VAE and text encoders."""
    tensors = ldm.original_unet(folder)
    if bundled:
        tensors |= ldm.original_vae(folder)
        tensors |= ldm.original_clip(folder, "text_encoder", "conditioner.embedders.0.transformer.")
        tensors |= ldm.original_clip(folder, "text_encoder_2", "conditioner.embedders.1.model.")
    ldm.save(path, tensors)
