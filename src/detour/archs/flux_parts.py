"""Pieces of FLUX and its relatives: names of the original layout, structure from shapes, packing, left-out guidance.

Shapes: B batch, C channels, H W latent height and width, L tokens, D features.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from detour import UserError
from detour.archs import parts
from detour.nn.lora_keys import WholeBlocks
from detour.nn.original import Layout

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from detour.archs.base import Condition
    from detour.weights import ModelSource

ORIGINAL = Layout(
    {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "~norm_out.linear",  # shift and scale there, scale and shift here
    }
    | {
        f"double_blocks.{{}}.{theirs}": " ".join(f"transformer_blocks.{{}}.{name}" for name in ours.split())
        for theirs, ours in {
            "img_mod.lin": "norm1.linear",
            "txt_mod.lin": "norm1_context.linear",
            "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
            "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
            "img_attn.proj": "attn.to_out.0",
            "txt_attn.proj": "attn.to_add_out",
            "img_attn.norm.query_norm": "attn.norm_q",
            "img_attn.norm.key_norm": "attn.norm_k",
            "txt_attn.norm.query_norm": "attn.norm_added_q",
            "txt_attn.norm.key_norm": "attn.norm_added_k",
            "img_mlp.0": "ff.net.0.proj",
            "img_mlp.2": "ff.net.2",
            "txt_mlp.0": "ff_context.net.0.proj",
            "txt_mlp.2": "ff_context.net.2",
        }.items()
    }
    | {
        f"single_blocks.{{}}.{theirs}": " ".join(f"single_transformer_blocks.{{}}.{name}" for name in ours.split())
        for theirs, ours in {
            "modulation.lin": "norm.linear",
            "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp:4",
            "linear2": "proj_out",
            "norm.query_norm": "attn.norm_q",
            "norm.key_norm": "attn.norm_k",
        }.items()
    },
    foreign=("vae.", "first_stage_model.", "text_encoders.", "cond_stage_model."),
)

KOHYA_BLOCKS = WholeBlocks(
    formats=("kohya",),
    layers={
        "double_blocks": (
            "img_mod.lin", "img_attn.qkv", "img_attn.proj", "img_mlp.0", "img_mlp.2",
            "txt_mod.lin", "txt_attn.qkv", "txt_attn.proj", "txt_mlp.0", "txt_mlp.2",
        ),
        "single_blocks": ("modulation.lin", "linear1", "linear2"),
    },
    rows={"attn.to_q": 3072, "proj_mlp": 12288},
)  # fmt: skip
"""What diffusers' reader of kohya's files takes for granted; layers outside the blocks it would leave out unsaid."""

_CHANNELS = {
    64: "FLUX.1 or Flex.1 (model.arch: flux, flex1)",
    128: "FLUX.1 Depth or Canny, which cannot be trained here",
    196: "Flex.2 (model.arch: flex2)",
    384: "FLUX.1 Fill, which cannot be trained here",
}
"""Packed channels that published transformers of this kind take."""


def config_of(source: ModelSource, title: str) -> dict[str, Any]:
    """The transformer's config: from its folder, or for a single file from the shapes in it. UserError for another."""
    from detour.weights import component_config

    if source.single_file is not None:
        return _from_shapes(source.single_file, title)
    return component_config(source.component("transformer"), "_class_name", "FluxTransformer2DModel")


def check_channels(name: str, config: Mapping[str, Any], title: str, expected: int) -> None:
    """Refuse a transformer of this kind that is told other things than the architecture's."""
    found = config.get("in_channels", 64)
    if found != expected:
        looks = _CHANNELS.get(found, "no model that is known here")
        raise UserError(
            f"{name}: its transformer takes {found} channels for each token, where {title} takes {expected}; it looks "
            f"like {looks}"
        )


def _from_shapes(file: Path, title: str) -> dict[str, Any]:
    import torch

    from detour.weights import tensor_shapes

    stored = tensor_shapes([file])
    shapes: dict[str, torch.Size] = {}
    try:
        for key, shape in stored.items():
            shapes |= {name: t.shape for name, t in ORIGINAL.tensors(key, torch.empty(shape, device="meta"))}
        dim, packed = shapes["x_embedder.weight"]
        head = shapes["single_transformer_blocks.0.attn.norm_q.weight"][0]
        text, pooled = (shapes[f"{name}.weight"][1] for name in ("context_embedder", _TEXT))
        out = shapes["proj_out.weight"][0]
    except (KeyError, ValueError) as error:
        raise parts.not_a_checkpoint(file, stored, title) from error

    def count(blocks: str) -> int:
        return len({name.split(".")[1] for name in shapes if name.startswith(blocks)})

    return {
        "in_channels": packed,
        "out_channels": out,
        "num_layers": count("transformer_blocks."),
        "num_single_layers": count("single_transformer_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": dim // head,
        "joint_attention_dim": text,
        "pooled_projection_dim": pooled,
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        "axes_dims_rope": [head // 8, head * 7 // 16, head * 7 // 16],  # 16, 56, 56 of 128
    }


def packed(latents_BCHW: Tensor) -> Tensor:
    """tokens_BLD: each 2 x 2 positions, row by row, all four of a channel together."""
    B, C, H, W = latents_BCHW.shape
    patches = latents_BCHW.reshape(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(B, H // 2 * (W // 2), C * 4)


def unpacked(tokens_BLD: Tensor, latent_HW: tuple[int, int]) -> Tensor:
    """latents_BCHW from what `packed` makes."""
    H, W = latent_HW
    B, _, D = tokens_BLD.shape
    patches = tokens_BLD.reshape(B, H // 2, W // 2, D // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(B, D // 4, H, W)


def positions(latent_HW: tuple[int, int]) -> Tensor:
    """(L, 3): 0, row and column of each token."""
    import torch

    rows, columns = torch.meshgrid(torch.arange(latent_HW[0] // 2), torch.arange(latent_HW[1] // 2), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()


def told(condition: Condition, latent_HW: tuple[int, int]) -> Tensor:
    """(33, H, W): what Flex.2 is told of pictures, by the condition or, where it says nothing, by its maker's defaults.

    That is a picture with a hole (zeros), where its hole is (ones: everywhere), and a picture to follow (zeros).
    """
    import torch

    zeros_CHW = torch.zeros(16, *latent_HW)
    return torch.cat(
        [
            condition.get("inpaint_CHW", zeros_CHW),
            condition.get("hole_1HW", torch.ones(1, *latent_HW)).to(zeros_CHW),
            condition.get("control_CHW", zeros_CHW),
        ]
    )


_TEXT = "time_text_embed.text_embedder.linear_1"


@cache
def optional_guidance() -> type[nn.Module]:
    """The embedding of time, guidance and pooled prompt, from which guidance may be left out.

    Without guidance the sum is that of models without its embedding: (time, pooled) instead of (time, guidance,
    pooled), as the transformer calls it when it is told none.
    """
    from diffusers.models import embeddings

    whole, without = (
        embeddings.CombinedTimestepGuidanceTextProjEmbeddings,
        embeddings.CombinedTimestepTextProjEmbeddings,
    )

    class OptionalGuidance(whole):  # type: ignore[misc, valid-type]
        def forward(self, timestep_B: Tensor, *rest: Tensor) -> Tensor:
            embedded_BD: Tensor = (whole if len(rest) == 2 else without).forward(self, timestep_B, *rest)
            return embedded_BD

    return OptionalGuidance
