"""Pieces of the miniatures with a UNet: its random weights, and checkpoints that are one file.

Shapes: O out features, I in features, K kernel positions.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from detour.nano import parts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from diffusers import UNet2DConditionModel
    from torch import Tensor

CHANNELS = (32, 32, 48, 48)
"""Of the four stages: 320, 640, 1280, 1280 in the real 1.x and 2.x."""


def unet(*key: int | str, **config: Any) -> UNet2DConditionModel:  # noqa: ANN401  diffusers' options
    """A random UNet whose blocks all take part, with an output of a standard deviation of about one half."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(norm_num_groups=8, **config).eval()
    parts.fill(model, 1.0, *key)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".attn2.to_v" in name or ".attn2.to_out" in name:  # attention averages over the tokens
                parameter.mul_(2.0)
    return model


# ------------------------------------------------------------------------------------------- checkpoints in one file

_RESNET = (
    ("norm1.", "in_layers.0."), ("conv1.", "in_layers.2."), ("time_emb_proj.", "emb_layers.1."),
    ("norm2.", "out_layers.0."), ("conv2.", "out_layers.3."), ("conv_shortcut.", "skip_connection."),
)  # fmt: skip
_OUTSIDE = (
    ("conv_in.", "input_blocks.0.0."), ("conv_norm_out.", "out.0."), ("conv_out.", "out.2."),
    ("time_embedding.linear_1.", "time_embed.0."), ("time_embedding.linear_2.", "time_embed.2."),
    ("add_embedding.linear_1.", "label_emb.0.0."), ("add_embedding.linear_2.", "label_emb.0.2."),
)  # fmt: skip
_LAYERS = 2
"""Of each block of every published UNet."""


def original_unet(folder: Path) -> dict[str, Tensor]:
    """The UNet in `folder` under the names of the original layout, with their prefix."""
    tensors = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    attended = {name.partition(".attentions.")[0] for name in tensors if ".attentions." in name}
    return {f"model.diffusion_model.{_original_name(name, attended)}": tensor for name, tensor in tensors.items()}


def _original_name(name: str, attended: set[str]) -> str:
    """Blocks are numbered through, with the part inside as a second number: resnet, attention, up- or downsampler."""
    for ours, theirs in _OUTSIDE:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    found = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name)
    if found is None:
        kind, index, rest = name.removeprefix("mid_block.").split(".", 2)
        place = int(index) * 2 if kind == "resnets" else 1
        return f"middle_block.{place}.{_inside(kind, rest)}"
    side, block, kind, index, rest = found.groups()
    if side == "down":
        place = int(block) * (_LAYERS + 1) + (int(index) if kind != "downsamplers" else _LAYERS) + 1
        part = "1" if kind == "attentions" else "0"
        return f"input_blocks.{place}.{part}.{_inside(kind, rest)}"
    place = int(block) * (_LAYERS + 1) + (int(index) if kind != "upsamplers" else _LAYERS)
    last = "2" if f"up_blocks.{block}" in attended else "1"
    part = {"resnets": "0", "attentions": "1", "upsamplers": last}[kind]
    return f"output_blocks.{place}.{part}.{_inside(kind, rest)}"


def _inside(kind: str, rest: str) -> str:
    if kind == "downsamplers":
        return rest.replace("conv.", "op.")
    for ours, theirs in _RESNET if kind == "resnets" else ():
        rest = rest.replace(ours, theirs)
    return rest


_VAE = (
    (r"^(en|de)coder\.conv_norm_out\.", r"\1coder.norm_out."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
    (r"\.down_blocks\.(\d)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)


def original_vae(folder: Path) -> dict[str, Tensor]:
    """The VAE in `folder` under the names of the original layout, with their prefix."""
    return dict(_vae_tensors(load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")))


def _vae_tensors(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        there = re.sub(r"\.up_blocks\.(\d)\.", lambda found: f".up.{3 - int(found[1])}.", name)  # counted from below
        if ".up." in there:
            there = there.replace(".resnets.", ".block.").replace(".upsamplers.0.", ".upsample.")
        for pattern, replacement in _VAE:
            there = re.sub(pattern, replacement, there)
        attention = ".mid.attn_1." in there and there.endswith("weight") and tensor.ndim == 2
        yield f"first_stage_model.{there}", tensor[:, :, None, None] if attention else tensor  # 1 x 1 convolutions


def original_clip(folder: Path, component: str, prefix: str) -> dict[str, Tensor]:
    """A text encoder in `folder` under names that begin with `prefix`: OpenCLIP's where that ends in `.model.`."""
    tensors = load_file(folder / component / "model.safetensors")
    named = {f"text_model.{name}" if not name.startswith("text_") else name: t for name, t in tensors.items()}
    return {prefix + name: t for name, t in (_openclip(named) if prefix.endswith(".model.") else named).items()}


_OPENCLIP = (
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.embeddings.token_embedding.", "token_embedding."),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
    (".self_attn.out_proj.", ".attn.out_proj."),
)


def _openclip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == "text_projection.weight":
            found["text_projection"] = tensor.T.contiguous()
            continue
        there = name
        for ours, theirs in _OPENCLIP:
            there = there.replace(ours, theirs)
        if ".self_attn.q_proj." in there:  # q, k and v are one there
            fused = torch.cat([tensors[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            found[re.sub(r"\.self_attn\.q_proj\.(\w+)$", r".attn.in_proj_\1", there)] = fused
        elif ".self_attn." not in there:
            found[there] = tensor
    return found


def save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
