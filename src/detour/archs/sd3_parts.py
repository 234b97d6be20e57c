"""Checkpoints of Stable Diffusion 3 that are one file: names of the original layout, structure from shapes, encoders.

Shapes: D features, N positions.
"""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING, Any

from detour.archs import ldm, parts
from detour.nn.original import Layout, in_blocks

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from detour.weights import ModelSource, Placement

ORIGINAL = Layout(
    {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "~norm_out.linear",  # shift and scale there, scale and shift here
    }
    | in_blocks(
        "joint_blocks.{}",
        "transformer_blocks.{}",
        {
            "x_block.adaLN_modulation.1": "norm1.linear",
            "x_block.attn.qkv": "attn.to_q attn.to_k attn.to_v",
            "x_block.attn.ln_q": "attn.norm_q",
            "x_block.attn.ln_k": "attn.norm_k",
            "x_block.attn.proj": "attn.to_out.0",
            "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
            "x_block.attn2.ln_q": "attn2.norm_q",
            "x_block.attn2.ln_k": "attn2.norm_k",
            "x_block.attn2.proj": "attn2.to_out.0",
            "x_block.mlp.fc1": "ff.net.0.proj",
            "x_block.mlp.fc2": "ff.net.2",
            "context_block.adaLN_modulation.1": "norm1_context.linear",
            "context_block.attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
            "context_block.attn.ln_q": "attn.norm_added_q",
            "context_block.attn.ln_k": "attn.norm_added_k",
            "context_block.attn.proj": "attn.to_add_out",
            "context_block.mlp.fc1": "ff_context.net.0.proj",
            "context_block.mlp.fc2": "ff_context.net.2",
        },
    ),
    foreign=("vae.", "first_stage_model.", "text_encoders."),
)
_IN_FILE = {
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
    "text_encoder_3": "text_encoders.t5xxl.transformer.",
}
"""Beginnings of the text encoders' names in an all-in-one file."""


_HEAD = 64
"""Width of an attention head: in the original layout by definition, as many heads as blocks."""


def tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """The transformer's weights in a file of either layout, under diffusers' names."""
    from detour.weights import stream_tensors, tensor_shapes

    swapped = _swapped(tensor_shapes([file]))
    for stored, whole in stream_tensors([file]):
        for name, tensor in ORIGINAL.tensors(stored, whole):
            if name == "pos_embed":
                yield "pos_embed.pos_embed", tensor
            else:
                yield name, tensor.roll(len(tensor) // 2, 0) if stored.endswith(swapped) else tensor


def _swapped(stored: Iterable[str]) -> tuple[str, ...]:
    """Endings of what modulates the text in the last block: shift and scale there, scale and shift here.

    The other blocks have gates besides, and one order in both layouts.
    """
    numbers = [int(name.split("joint_blocks.")[1].split(".")[0]) for name in stored if "joint_blocks." in name]
    return tuple(
        f"joint_blocks.{max(numbers, default=0)}.context_block.adaLN_modulation.1.{kind}" for kind in ("weight", "bias")
    )


def config_of(file: Path, title: str) -> dict[str, Any]:
    """The transformer's config, as the shapes in a file say. UserError for another model."""
    import torch

    from detour.weights import tensor_shapes

    stored = tensor_shapes([file])
    shapes: dict[str, torch.Size] = {}
    try:
        for key, shape in stored.items():
            shapes |= {name: t.shape for name, t in ORIGINAL.tensors(key, torch.empty(shape, device="meta"))}
        positions, dim = (shapes["pos_embed"] if "pos_embed" in shapes else shapes["pos_embed.pos_embed"])[1:]
        channels = shapes["pos_embed.proj.weight"][1]
        text = shapes["context_embedder.weight"][1]
        pooled = shapes["time_text_embed.text_embedder.linear_1.weight"][1]
    except (KeyError, ValueError) as error:
        raise parts.not_a_checkpoint(file, stored, title) from error
    norm = shapes.get("transformer_blocks.0.attn.norm_q.weight")
    head = _HEAD if norm is None else norm[0]
    return {
        "in_channels": channels,
        "out_channels": channels,
        "num_layers": len({name.split(".")[1] for name in shapes if name.startswith("transformer_blocks.")}),
        "attention_head_dim": head,
        "num_attention_heads": dim // head,
        "joint_attention_dim": text,
        "caption_projection_dim": dim,
        "pooled_projection_dim": pooled,
        "pos_embed_max_size": isqrt(positions),
        "dual_attention_layers": sorted({int(name.split(".")[1]) for name in shapes if ".attn2." in name}),
        "qk_norm": None if norm is None else "rms_norm",
    }


def load_text_model(source: ModelSource, component: str, cls: str, placement: Placement) -> nn.Module:
    """A text encoder, streamed in: from the single file if it is in there."""

    def rename(name: str) -> str | None:
        return None if name.endswith(".position_ids") else name

    folder, file = source.component(component), ldm.bundle(source, _IN_FILE[component])
    tensors = None if file is None else _text_tensors(file, component)
    return parts.load_text_model(cls, folder, placement, rename, tensors)  # type: ignore[no-any-return]


def _text_tensors(file: Path, component: str) -> Iterator[tuple[str, Tensor]]:
    """A text encoder's weights in an all-in-one file."""
    import torch

    from detour.weights import stream_tensors

    prefix, plain = _IN_FILE[component], component == "text_encoder"
    for stored, tensor in stream_tensors([file]):
        name = stored.removeprefix(prefix)
        if name == stored or (plain and name == "text_projection.weight"):
            continue
        yield name, tensor
        if plain and name == "text_model.final_layer_norm.weight":
            # The vector of CLIP-L is used as it is, which folders say by a projection that is the identity.
            yield "text_projection.weight", torch.eye(len(tensor))
