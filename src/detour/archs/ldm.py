"""Pieces that the families of Stable Diffusion share: their UNet, CLIP, and checkpoints that are one file.

Such a file is in the original layout of latent diffusion (`model.diffusion_model.input_blocks...`) and may hold the VAE
(`first_stage_model.`) and the text encoders besides, which then come from it; or it is the UNet alone, in either
layout. Names are translated by diffusers' own converters, tensor by tensor, so that no second copy of the weights is
made. What shapes do not tell (heads, groups of a norm) is the published configuration's or, with a local folder as
extras, that of its UNet.

Shapes: B batch, C channels, H W latent height and width, L tokens, D features.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from detour import UserError
from detour.archs import parts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch import Tensor, nn

    from detour.archs.base import Condition
    from detour.config.job import TimestepType
    from detour.weights import ModelSource, Placement

_ATTENTIONS = r"((down|up)_blocks\.\d+|mid_block)\.attentions\.\d+"
LORA_BLOCKS_CONV = rf"{_ATTENTIONS}\.transformer_blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))"
"""Linear layers of the transformers of a UNet in which these begin and end with 1 x 1 convolutions (1.x)."""
LORA_BLOCKS = rf"({LORA_BLOCKS_CONV}|{_ATTENTIONS}\.proj_(in|out))"
"""The same of a UNet with `use_linear_projection` (2.x, XL): what other trainers put a LoRA on."""
_EMBEDDERS = r"((time|add)_embedding\.linear_[12]|((down|up)_blocks\.\d+|mid_block)\.resnets\.\d+\.time_emb_proj)"
LORA_ALL = rf"({LORA_BLOCKS}|{_EMBEDDERS})"
QUANTIZE_EXCLUDE = rf"^{_EMBEDDERS}$"
TIMESTEP_TYPES: tuple[TimestepType, ...] = (
    "linear", "sigmoid", "lognorm_blend", "one_step", "two_step", "four_step", "eight_step",
)  # fmt: skip
"""Without those that are made for flow models: `shift`, `weighted` (its weights) and `next_sample`."""
SCHEDULER: Mapping[str, object] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
"""Noise levels of every Stable Diffusion before 3, and its grid."""

UNET, VAE = "model.diffusion_model.", "first_stage_model."
"""Prefixes in an all-in-one file."""
_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Names of the VAE's attention in folders that were saved before 2023."""
_UNTOLD = ("attention_head_dim", "norm_num_groups", "addition_time_embed_dim")
"""What shapes do not tell of a UNet."""


# ------------------------------------------------------------------------------------------------------------- UNet


def build_unet(source: ModelSource, title: str, published: Mapping[str, object]) -> UNet2DConditionModel:
    """The UNet on the meta device, as its config says, or, for a single file, as the shapes in it say.

    `published` holds what shapes do not tell.
    """
    from diffusers import UNet2DConditionModel

    from detour.weights import component_config

    if (file := source.single_file) is not None:
        there = source.extras.find("unet") if source.extras is not None else None
        known = {} if there is None else component_config(there, "_class_name", "UNet2DConditionModel")
        config = {**published, **{key: known[key] for key in _UNTOLD if key in known}, **_told_by_shapes(file, title)}
        unet = parts.on_meta(lambda: UNet2DConditionModel.from_config(config))
    else:
        unet = parts.diffusers_module("UNet2DConditionModel", source.component("unet"))
    _check(unet.config, source.name)
    return unet


def unet_tensors(source: ModelSource, title: str) -> Iterator[tuple[str, Tensor]]:
    """The UNet's weights under diffusers' names, from either layout."""
    from detour.weights import stream_tensors

    if (file := source.single_file) is None:
        yield from parts.folder_tensors(source.component("unet"))
        return
    here = {there: name for name, there in _names(file, title).items()}
    for there, tensor in stream_tensors([file]):
        if there in here:
            yield here[there], tensor


def _check(config: Mapping[str, Any], name: str) -> None:
    """Refuse UNets that want more than a picture, a time and a prompt."""
    if config["in_channels"] != 4:
        raise UserError(
            f"{name}: its UNet takes {config['in_channels']} channels, as inpainting and editing models do; only those "
            f"that draw from a prompt (4 channels) can be trained"
        )
    if config["time_cond_proj_dim"] is not None:
        raise UserError(
            f"{name}: its UNet is told the guidance scale (a latent consistency model), which cannot be trained here; "
            f"use the model it was made from"
        )


def _names(file: Path, title: str) -> dict[str, str]:
    """diffusers' name of each of the UNet's tensors in a single file -> its name there."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    from detour.weights import tensor_shapes

    names = list(tensor_shapes([file]))
    if any(name.startswith("down_blocks.") for name in names):
        return {name: name for name in names}
    prefix = next((p for p in (UNET, "diffusion_model.", "") if f"{p}input_blocks.0.0.weight" in names), None)
    if prefix is None:
        raise parts.not_a_checkpoint(file, names, title)
    there = {UNET + name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    labels = any(name.startswith(f"{UNET}label_emb.") for name in there)
    try:  # the converter moves values without looking at them, so that names can stand for tensors
        found: dict[str, str | None] = convert_ldm_unet_checkpoint(
            there, {"layers_per_block": 2, "addition_embed_type": "text_time" if labels else None}
        )
    except KeyError as error:
        raise UserError(f"{file}: {error} is missing; fetch it again") from error
    if lost := sorted(set(there.values()) - set(found.values())):
        raise UserError(f"{file}: {len(lost)} tensors of its UNet are not {title}'s, such as {lost[0]}")
    return {name: original for name, original in found.items() if original is not None}


def _told_by_shapes(file: Path, title: str) -> dict[str, object]:
    """Entries of the UNet's config that its shapes tell."""
    from detour.weights import tensor_shapes

    stored = tensor_shapes([file])
    shapes = {name: stored[there] for name, there in _names(file, title).items()}

    def deep(block: str) -> list[int]:
        pattern = re.compile(rf"{block}\.attentions\.(\d+)\.transformer_blocks\.(\d+)\.")
        found = [(int(match[1]), int(match[2])) for name in shapes if (match := pattern.match(name))]
        return [max(depth for a, depth in found if a == index) + 1 for index in sorted({a for a, _ in found})]

    def side(kind: str) -> list[list[int]]:
        count = len({name.split(".")[1] for name in shapes if name.startswith(f"{kind}_blocks.")})
        return [deep(rf"{kind}_blocks\.{index}") for index in range(count)]

    def short(depths: list[int]) -> int | list[int]:
        return depths if len(set(depths)) > 1 else depths[0] if depths else 1

    down, up, middle = side("down"), side("up"), deep("mid_block")
    per_block, reverse = [short(block) for block in down], [short(block) for block in up]
    attention = next(name for name in sorted(shapes) if name.endswith("attn2.to_k.weight"))
    labels = shapes.get("add_embedding.linear_1.weight")
    plain_middle = "UNetMidBlock2D" if any(name.startswith("mid_block.") for name in shapes) else None
    return {
        "in_channels": shapes["conv_in.weight"][1],
        "out_channels": shapes["conv_out.weight"][0],
        "block_out_channels": [shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(len(down))],
        "layers_per_block": len({name.split(".")[3] for name in shapes if name.startswith("down_blocks.0.resnets.")}),
        "down_block_types": ["CrossAttnDownBlock2D" if block else "DownBlock2D" for block in down],
        "up_block_types": ["CrossAttnUpBlock2D" if block else "UpBlock2D" for block in up],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if middle else plain_middle,
        "transformer_layers_per_block": per_block,
        "reverse_transformer_layers_per_block": None if reverse == per_block[::-1] else reverse,
        "cross_attention_dim": shapes[attention][1],
        "use_linear_projection": all(len(shapes[n]) == 2 for n in shapes if n.endswith(".proj_in.weight")),
        "addition_embed_type": "text_time" if labels else None,
        "projection_class_embeddings_input_dim": labels[1] if labels else None,
        "time_cond_proj_dim": shapes.get("time_embedding.cond_proj.weight", (None, None))[1],
    }


# -------------------------------------------------------------------------------------------------- VAE and encoders


def bundle(source: ModelSource, prefix: str) -> Path | None:
    """The single file, where it holds tensors whose names begin so."""
    from detour.weights import tensor_shapes

    file = source.single_file
    return file if file is not None and any(name.startswith(prefix) for name in tensor_shapes([file])) else None


def load_vae(source: ModelSource, dtype: torch.dtype, device: torch.device, *, upcast: bool = False) -> AutoencoderKL:
    """The VAE, frozen and in eval mode: from the single file if it is in there.

    `upcast`: in float32 whatever `dtype` says, where its config has `force_upcast`.
    """
    import torch

    from detour.weights import Placement, materialise

    folder = source.component("vae")
    vae = parts.diffusers_module("AutoencoderKL", folder)
    file = bundle(source, VAE)
    tensors = _vae_folder(folder) if file is None else _vae_in(file, vae.config)
    if upcast and vae.config.force_upcast:
        dtype = torch.float32
    materialise(vae, tensors, Placement(dtype, device), where=str(file or folder))
    return vae


def _vae_folder(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in parts.folder_tensors(folder):
        renamed = name
        for old, new in _OLD_ATTENTION.items():
            renamed = renamed.replace(old, new) if ".attentions." in name else renamed
        yield renamed, tensor


def _vae_in(file: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    from detour.weights import stream_tensors

    held = {name: tensor for name, tensor in stream_tensors([file]) if name.startswith(VAE)}  # views of the mapped file
    yield from convert_ldm_vae_checkpoint(held, config).items()


def load_clip(source: ModelSource, component: str, cls: str, prefix: str, placement: Placement) -> nn.Module:
    """A text encoder of transformers' class `cls`, streamed in: from the single file if it is in there.

    `prefix` is that of its tensors in an all-in-one file: of OpenCLIP's names where it ends in `.model.`, else of
    transformers'. Whether names begin with `text_model.` depends on class and version of transformers; both are read.
    """
    folder, file = source.component(component), bundle(source, prefix)

    def rename(name: str) -> str | None:
        if name.endswith((".position_ids", "logit_scale")):
            return None
        return name if cls.endswith("Projection") else name.removeprefix("text_model.")

    tensors = None if file is None else _clip_in(file, prefix, folder)
    return parts.load_text_model(cls, folder, placement, rename, tensors)  # type: ignore[no-any-return]


def _clip_in(file: Path, prefix: str, folder: Path) -> Iterator[tuple[str, Tensor]]:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
    from transformers import CLIPTextConfig

    from detour.weights import stream_tensors

    config = CLIPTextConfig.from_pretrained(folder)
    layer = re.compile(re.escape(prefix) + r"transformer\.resblocks\.(\d+)\.")
    for name, tensor in stream_tensors([file]):
        own = name.removeprefix(prefix)
        if own == name:
            continue
        if not prefix.endswith(".model."):
            yield own if own.startswith("text_model.") else f"text_model.{own}", tensor
        elif own == "text_projection.weight":  # as converters write it; OpenCLIP itself has its transpose
            yield own, tensor
        elif (match := layer.match(name)) is None or int(match[1]) < config.num_hidden_layers:
            # Layers beyond the last that is asked for are in OpenCLIP's file, but not in transformers' model.
            yield from convert_open_clip_checkpoint(SimpleNamespace(config=config), {name: tensor}, prefix).items()


# ------------------------------------------------------------------------------------------------------- prediction


def predict(
    unet: Any,  # noqa: ANN401
    latents_BCHW: Tensor,
    t_B: Tensor,
    conditions: Sequence[Condition],
    added: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """What the UNet predicts, float32. `added` is what it is told besides (`added_cond_kwargs`)."""
    if len(conditions) != len(latents_BCHW):
        raise ValueError(f"{len(latents_BCHW)} pictures, {len(conditions)} conditions")
    out_BCHW: Tensor = unet(
        latents_BCHW.to(unet.dtype),
        parts.levels(t_B).to(latents_BCHW.device),
        encoder_hidden_states=together(conditions, "tokens_LD", latents_BCHW).to(unet.dtype),
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    return out_BCHW.float()


def together(conditions: Sequence[Condition], name: str, like: Tensor) -> Tensor:
    """One tensor of every condition as a batch, on the device of `like`."""
    import torch

    return torch.stack([condition[name] for condition in conditions]).to(like.device)
