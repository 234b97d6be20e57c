"""Which model a file belongs to, as far as the names of its tensors tell: for messages and for `detour inspect`."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_UNET = r"(down|up|mid|input|output|middle)_blocks?_"

# Tried in this order on names in which every dot is an underscore, so that kohya's names are covered too.
_SIGNS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("Stable Diffusion XL", re.compile(rf"lora_te2_|{_UNET}.*transformer_blocks_[1-9]|add_embedding")),
    ("Stable Diffusion 1 or 2", re.compile(rf"{_UNET}|lora_te_text_model")),
    ("Qwen-Image", re.compile(r"transformer_blocks_\d+_(img|txt)_(mod|mlp)")),
    ("AuraFlow", re.compile(r"joint_transformer_blocks_|single_transformer_blocks_\d+_ff_linear")),
    ("FLUX", re.compile(r"single_transformer_blocks_\d+_(attn|proj|norm)|(double|single)_blocks_\d+_")),
    ("Stable Diffusion 3", re.compile(r"joint_blocks_\d+_|transformer_blocks_\d+_attn_(add_|to_add)")),
    ("PixArt", re.compile(r"transformer_blocks_\d+_attn2_|adaln_single")),
    ("Wan 2", re.compile(r"(^|_)blocks_\d+_(self_attn|cross_attn|attn1|attn2|ffn)_")),
    ("Lumina 2", re.compile(r"(layers|refiner)_\d+_(attn_to|feed_forward_linear|adaLN_modulation_1)_?")),
    ("Lumina 2", re.compile(r"time_caption_embed")),
    ("Z-Image", re.compile(r"(layers|refiner)_\d+_attention_to_(q|k|v|out)|cap_pad_token|all_x_embedder")),
    ("Z-Image or Lumina 2 in the original layout", re.compile(r"(layers|refiner)_\d+_attention_(qkv|out)")),
    ("Z-Image", re.compile(r"(layers|refiner)_\d+_(adaLN_modulation|feed_forward_w[123])")),
    ("FLUX, Stable Diffusion 3 or Qwen-Image", re.compile(r"transformer_blocks_\d+_attn_to_")),
)

_PREFIX = re.compile(r"^(base_model\.model\.)?(transformer|diffusion_model|unet)\.")
"""Not a part of names: `transformer.blocks` would look like `transformer_blocks`."""
_NUMBERS = re.compile(r"(?<=\.)\d+(?=\.|$)")


def guess(names: Iterable[str]) -> str | None:
    """Title of the model whose layers have such names, or None."""
    flat = [_PREFIX.sub("", name).replace(".", "_") for name in names]
    return next((title for title, sign in _SIGNS if any(sign.search(name) for name in flat)), None)


def count_by_family(modules: Iterable[str]) -> dict[str, int]:
    """How many layers of each kind: `layers.*.attention.to_q` -> 30. A number at the end (`to_out.0`) is a name."""
    return dict(sorted(Counter(_family(module) for module in modules).items()))


def _family(module: str) -> str:
    head, dot, tail = module.rpartition(".")
    if tail.isdigit() and dot:
        return f"{_NUMBERS.sub('*', head)}.{tail}"
    return _NUMBERS.sub("*", module)
