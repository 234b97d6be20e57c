"""The original names of the layers of Stable Diffusion XL's UNet, in which its LoRAs are written and exchanged."""

from __future__ import annotations

from detour.nn.original import Layout, in_blocks

_STAGES, _LAYERS = 3, 2
_EMBEDDERS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_PARTS = (
    *(f"attn{number}.to_{part}" for number in (1, 2) for part in ("q", "k", "v", "out.0")),
    "ff.net.0.proj", "ff.net.2",
)  # fmt: skip
_ATTENTION = ("proj_in", "proj_out", *(f"transformer_blocks.{{}}.{part}" for part in _PARTS))


def _table() -> dict[str, str]:
    """There blocks are numbered through, each a residual block (0) with the attention (1) that follows it."""
    places = {"middle_block.0": ("mid_block", 0), "middle_block.2": ("mid_block", 1)}
    for stage in range(_STAGES):
        first = stage * (_LAYERS + 1)
        places |= {f"input_blocks.{first + i + 1}.0": (f"down_blocks.{stage}", i) for i in range(_LAYERS)}
        places |= {f"output_blocks.{first + i}.0": (f"up_blocks.{stage}", i) for i in range(_LAYERS + 1)}
    table = dict(_EMBEDDERS)
    for there, (here, index) in places.items():
        table[f"{there}.emb_layers.1"] = f"{here}.resnets.{index}.time_emb_proj"
        if there != "middle_block.2":
            attention = f"{there.removesuffix('.0')}.1"
            table |= in_blocks(attention, f"{here}.attentions.{index}", {name: name for name in _ATTENTION})
    return table


ORIGINAL = Layout(_table())
