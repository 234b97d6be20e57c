"""A complete random AuraFlow in miniature, in the folder layout of the real one: 1.3 M parameters, 3 MB in bf16.

Every part is of the real class (AuraFlowTransformer2DModel, UMT5 encoder, Llama tokenizer, AutoencoderKL, flow
scheduler). The transformer is scaled so that every block takes part and a LoRA can make the loss fall; the VAE is built
by hand and gives back exact 8 x 8 block means (`parts.build_vae`).

Files are a pure function of the seed, byte for byte; the global random state is left as it was.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from detour import UserError
from detour.nano import parts
from detour.nn.quiet import without_bars

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import AuraFlowTransformer2DModel

DTYPE = torch.bfloat16
JOINT, SINGLE, HEADS, HEAD, TEXT_DIM = 2, 3, 4, 24, 32  # feed-forward: 4 * 96 * 2 / 3 = 256
POSITIONS = 1024  # 32 x 32 patches: pictures of up to 512 x 512 pixels
_VARIANTS = ("", "0.3", "0.2", "pony-v7")


def write(folder: Path, arch: str = "auraflow", variant: str = "", *, seed: int = 0) -> None:
    """Write the miniature into `folder` in the diffusers layout. The variants are of one structure."""
    if arch != "auraflow" or variant not in _VARIANTS:
        raise UserError(f"detour nano: {arch}:{variant} is not known here; allowed: auraflow and its variants")
    from diffusers import AuraFlowPipeline, FlowMatchEulerDiscreteScheduler
    from transformers import UMT5EncoderModel

    with torch.random.fork_rng(devices=[]):  # constructors draw initial weights, all of which are replaced
        tokenizer = parts.llama_tokenizer()
        text = parts.t5_encoder(UMT5EncoderModel, len(tokenizer), "nano auraflow", seed, "text", width=TEXT_DIM)
        pipeline = AuraFlowPipeline(
            tokenizer=tokenizer,
            text_encoder=text.to(DTYPE),
            vae=parts.build_vae(4, scaling=0.13025, shift=None, quant_conv=True).to(DTYPE),
            transformer=_build_transformer(seed).to(DTYPE),
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.73),
        )
    with without_bars():
        pipeline.save_pretrained(folder)


def _build_transformer(seed: int) -> AuraFlowTransformer2DModel:
    """Variance-preserving weights, gates of random sign, an output of a standard deviation of about one half."""
    from diffusers import AuraFlowTransformer2DModel

    model = AuraFlowTransformer2DModel(
        num_mmdit_layers=JOINT,
        num_single_dit_layers=SINGLE,
        attention_head_dim=HEAD,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_DIM,
        caption_projection_dim=HEADS * HEAD,
        pos_embed_max_size=POSITIONS,
    ).eval()
    for name, parameter, draw in parts.drawn(model, "nano auraflow", seed, "transformer"):
        if name == "pos_embed.pos_embed":
            parameter.copy_(draw * 0.3)
        elif name == "register_tokens":
            parameter.copy_(draw)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            gain = 0.5 if name.startswith(("proj_out", "norm_out")) else 1.0
            if ".add_v_proj." in name:
                gain = 5.0  # a prompt is a few tokens among 264, the rest of which are zeros
            parameter.copy_(draw * gain / math.sqrt(parameter.shape[-1]))
    return model
