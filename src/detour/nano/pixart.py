"""A complete random PixArt (alpha or Sigma) in miniature, in the folder layout of the real one: 0.6 M parameters, 2 MB.

Every part is of the real class (PixArtTransformer2DModel, T5 encoder and tokenizer, AutoencoderKL, DPM-Solver). The
transformer is scaled so that every block takes part and a LoRA can make the loss fall; the VAE is built by hand and
gives back exact 8 x 8 block means (`parts.build_vae`).

Files are a pure function of the seed, byte for byte; the global random state is left as it was.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from detour import UserError
from detour.nano import parts
from detour.nn.quiet import without_bars

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import PixArtTransformer2DModel

DTYPE = torch.bfloat16
LAYERS, HEADS, HEAD, TEXT_DIM = 3, 4, 24, 32
SCALING = {"pixart": 0.18215, "pixart_sigma": 0.13025}  # of the real VAEs
STRUCTURE: dict[str, dict[str, dict[str, Any]]] = {
    "pixart": {
        "1024": {"sample_size": 128},
        "512": {"sample_size": 64},
        "lcm": {"sample_size": 128},
    },
    "pixart_sigma": {
        "1024": {"sample_size": 128, "interpolation_scale": 2, "use_additional_conditions": False},
        "512": {"sample_size": 64, "interpolation_scale": 1, "use_additional_conditions": False},
        "2k": {"sample_size": 256, "interpolation_scale": 4, "use_additional_conditions": False},
    },
}
"""Entries of the published configurations in which they differ."""
_BETAS = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}


def write(folder: Path, arch: str = "pixart", variant: str = "", *, seed: int = 0) -> None:
    """Write the miniature of a variant into `folder` in the diffusers layout, ready for `from_pretrained`."""
    variant = variant or "1024"
    if variant not in STRUCTURE.get(arch, ()):
        known = ", ".join(f"{name}:{one}" for name, variants in STRUCTURE.items() for one in variants)
        raise UserError(f"detour nano: {arch}:{variant} is not known here; allowed: {known}")
    from diffusers import DPMSolverMultistepScheduler, LCMScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline
    from transformers import T5EncoderModel

    pipeline_class = PixArtAlphaPipeline if arch == "pixart" else PixArtSigmaPipeline
    with torch.random.fork_rng(devices=[]):  # constructors draw initial weights, all of which are replaced
        tokenizer = parts.t5_tokenizer(512)
        text = parts.t5_encoder(T5EncoderModel, len(tokenizer), "nano", arch, seed, "text", width=TEXT_DIM)
        pipeline = pipeline_class(
            tokenizer=tokenizer,
            text_encoder=text.to(DTYPE),
            vae=parts.build_vae(4, scaling=SCALING[arch], shift=None, quant_conv=True).to(DTYPE),
            transformer=_build_transformer(STRUCTURE[arch][variant], "nano", arch, seed).to(DTYPE),
            scheduler=LCMScheduler(**_BETAS) if variant == "lcm" else DPMSolverMultistepScheduler(**_BETAS),
        )
    with without_bars():
        pipeline.save_pretrained(folder)


def _build_transformer(structure: dict[str, Any], *key: int | str) -> PixArtTransformer2DModel:
    """Variance-preserving weights, gates half open, an output of a standard deviation of about one half."""
    from diffusers import PixArtTransformer2DModel

    width = HEADS * HEAD
    model = PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD,
        num_layers=LAYERS,
        cross_attention_dim=width,
        caption_channels=TEXT_DIM,
        **structure,
    ).eval()
    for name, parameter, draw in parts.drawn(model, *key, "transformer"):
        if name == "scale_shift_table":
            nn.init.zeros_(parameter)
        elif name.endswith("scale_shift_table"):  # shift, scale, gate: of self-attention, then of feed-forward
            parameter.copy_(torch.tensor([0.0, 0.0, 0.5, 0.0, 0.0, 0.5])[:, None].expand_as(parameter))
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            gain = 0.5 if name.startswith(("proj_out", "adaln_single.linear")) else 1.0
            parameter.copy_(draw * gain / math.sqrt(parameter[0].numel()))
    return model
