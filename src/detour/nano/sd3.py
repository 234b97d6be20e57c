"""A complete random Stable Diffusion 3 in miniature, in the folder layout of the real one: 1 M parameters, 3.5 MB.

Every part is of the real class (SD3Transformer2DModel, two CLIPs, T5, AutoencoderKL, flow scheduler). Structure is that
of the variant: 3.5 has norms on queries and keys, its medium model a second attention in the first half of its blocks;
3 medium has neither, and heads of the real width. The transformer is scaled so that every block takes part and a LoRA
can make the loss fall; the VAE is built by hand and gives back exact 8 x 8 block means (`parts.build_vae`).

Files are a pure function of the seed, byte for byte; the global random state is left as it was.
Shapes: D features.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from detour import UserError
from detour.archs.sd3_parts import ORIGINAL
from detour.nano import ldm, parts
from detour.nn.quiet import without_bars

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import SD3Transformer2DModel
    from torch import Tensor

DTYPE = torch.bfloat16
CLIP_DIM, T5_DIM = 32, 96
"""CLIP's two are 64 wide together and padded to T5's width (768 + 1280 to 4096 in the real one)."""
POSITIONS = 32  # patches along a side: pictures of up to 512 x 512 pixels
_LARGE: dict[str, Any] = {"num_layers": 3, "num_attention_heads": 3, "attention_head_dim": 32, "qk_norm": "rms_norm"}
STRUCTURE: dict[str, dict[str, Any]] = {
    "medium": {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 64},
    "3.5-medium": _LARGE | {"dual_attention_layers": (0, 1)},
    "3.5-large": _LARGE,
    "3.5-large-turbo": _LARGE,
}


def write(folder: Path, arch: str = "sd3", variant: str = "", *, seed: int = 0) -> None:
    """Write the miniature of a variant into `folder` in the diffusers layout, ready for `from_pretrained`."""
    variant = variant or "3.5-large"
    if arch != "sd3" or variant not in STRUCTURE:
        known = ", ".join(f"sd3:{name}" for name in STRUCTURE)
        raise UserError(f"detour nano: {arch}:{variant} is not known here; allowed: {known}")
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    with torch.random.fork_rng(devices=[]):  # constructors draw initial weights, all of which are replaced
        tokenizers = {
            "tokenizer": parts.clip_tokenizer(),
            "tokenizer_2": parts.clip_tokenizer(pad="!"),
            "tokenizer_3": parts.t5_tokenizer(512),
        }
        words = len(tokenizers["tokenizer"])
        clip, clip_2 = (
            parts.clip_text(CLIPTextModelWithProjection, words, "nano sd3", seed, name, width=CLIP_DIM)
            for name in ("text", "text 2")
        )
        with torch.no_grad():
            nn.init.eye_(clip.text_projection.weight)  # as published
        t5 = parts.t5_encoder(T5EncoderModel, len(tokenizers["tokenizer_3"]), "nano sd3", seed, "text 3", width=T5_DIM)
        pipeline = StableDiffusion3Pipeline(
            text_encoder=clip.to(DTYPE),
            text_encoder_2=clip_2.to(DTYPE),
            text_encoder_3=t5.to(DTYPE),
            vae=parts.build_vae(16, scaling=1.5305, shift=0.0609).to(DTYPE),
            transformer=_build_transformer(STRUCTURE[variant], seed).to(DTYPE),
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
            **tokenizers,
        )
    with without_bars():
        pipeline.save_pretrained(folder)


def write_original(path: Path, folder: Path, *, prefix: str = "model.diffusion_model.", bundled: bool = True) -> None:
    """Write the model in `folder` as a single file in the original layout; `bundled`: with VAE and text encoders."""
    tensors = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    last = max(int(name.split(".")[1]) for name in tensors if name.startswith("transformer_blocks."))
    original: dict[str, Tensor] = {prefix + "pos_embed": tensors.pop("pos_embed.pos_embed")}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        there = ORIGINAL.origin(layer)
        held = ORIGINAL.find(there)
        if held is None:
            original[prefix + name] = tensor
        elif layer == held.layers[0]:
            whole = torch.cat([tensors[f"{part}.{kind}"] for part in held.layers])
            if held.swapped or layer == f"transformer_blocks.{last}.norm1_context.linear":
                whole = whole.roll(len(whole) // 2, 0)
            original[f"{prefix}{there}.{kind}"] = whole
    if bundled:
        original |= ldm.original_vae(folder)
        for component, name in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g"), ("text_encoder_3", "t5xxl")):
            stored = load_file(folder / component / "model.safetensors")
            original |= {f"text_encoders.{name}.transformer.{key}": tensor for key, tensor in stored.items()}
        del original["text_encoders.clip_l.transformer.text_projection.weight"]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in original.items()}, path, metadata={"format": "pt"})


def _build_transformer(structure: dict[str, Any], seed: int) -> SD3Transformer2DModel:
    """Variance-preserving weights, gates half open, an output of a standard deviation of about one half."""
    from diffusers import SD3Transformer2DModel

    width = structure["num_attention_heads"] * structure["attention_head_dim"]
    model = SD3Transformer2DModel(
        joint_attention_dim=T5_DIM,
        caption_projection_dim=width,
        pooled_projection_dim=2 * CLIP_DIM,
        pos_embed_max_size=POSITIONS,
        **structure,
    ).eval()
    gates_D = torch.tensor([0.0, 0.0, 0.5]).repeat_interleave(width)  # shift, scale, gate of each part of a block
    for name, parameter, draw in parts.drawn(model, "nano sd3", seed, "transformer"):
        if name.endswith("bias"):
            gated = ".norm1" in name and len(parameter) > 2 * width  # the last block has no gates for the text
            parameter.copy_(gates_D.repeat(len(parameter) // len(gates_D)) if gated else torch.zeros_like(parameter))
        elif parameter.ndim == 1:
            nn.init.ones_(parameter)
        else:
            gain = 0.5 if name.startswith(("proj_out", "norm_out")) or ".norm1" in name else 1.0
            parameter.copy_(draw * gain / math.sqrt(parameter[0].numel()))
    return model
