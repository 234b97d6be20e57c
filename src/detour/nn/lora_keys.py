"""How LoRA files name the layers of a model: data of an architecture's spec. No torch is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from detour.nn.original import Layout

LoraFormat = Literal["comfy", "diffusers", "kohya"]
CLIP_LAYERS = r"encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
"""Layers of a CLIP text encoder that are trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WholeBlocks:
    """Files that diffusers' loader takes only where they hold every layer of each block and no layer else.

    ComfyUI takes any, so a file that does not is written, and said to be for ComfyUI alone.
    """

    formats: tuple[LoraFormat, ...]
    layers: Mapping[str, tuple[str, ...]]
    """By the name of the blocks: the layers of each, as the file has them (`layers` -> `attention.qkv`, ...)."""
    rows: Mapping[str, int] = field(default_factory=dict)
    """Output features that the loader takes for granted, of layers whose names end so (`attn.to_q`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraKeys:
    """How a module's name is written in each LoRA file format.

    A comfy prefix that ends in `_` says that ComfyUI reads kohya's names: underscores for dots, `lora_down`, `lora_up`.
    """

    comfy_prefix: str
    diffusers_prefix: str
    kohya_prefix: str
    formats: tuple[LoraFormat, ...] = ("comfy", "diffusers", "kohya")
    """The formats that its users' loaders read. The others are read here, but not written."""
    original: Layout | None = None
    """Names of the original layout, in which LoRAs of it are found too: read in the formats comfy and kohya."""
    original_in: tuple[LoraFormat, ...] = ()
    """Formats that are written in those names, layers that are one there put together."""
    alpha_in: tuple[LoraFormat, ...] = ("comfy", "kohya")
    """Formats with an alpha for each layer. In others its scale is multiplied into the weights, because diffusers'
    loader refuses alpha there (its own format has it in the header)."""
    whole_blocks: WholeBlocks | None = None
    """What diffusers' loader asks of files in some formats."""
    text: Mapping[str, str] = field(default_factory=dict)
    """Text encoders that can be trained, by component, and what kohya's names of their layers begin with. The
    architecture's text encoders are then `archs.parts.TextModels`."""
    text_layers: str = ""
    """Regular expression of their linear layers that are trained, without the `text_model.` that some classes have."""

    def text_model_of(self, module: str) -> str:
        """The text encoder that an adapter's module is on; empty for the denoiser, whose modules have bare names."""
        return next((component for component in self.text if module.startswith(f"{component}.")), "")
