"""What a new job of each architecture starts with: one preset for each variant, from its spec.

Facts that the engine does not need stand here: what people call a variant, and what fits on a card with 24 GB.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from detour import archs
from detour.config.job import DatasetConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from detour.archs.base import ArchSpec, Variant

START = "zimage:turbo"
"""The preset of an empty form."""

_Part = Literal["denoiser", "text"]


@dataclass(frozen=True, slots=True)
class _Known:
    title: str
    size: tuple[int, int] = (1024, 1024)
    """Width and height in pixels of the pictures that it was made for."""
    eight_bits: tuple[_Part, ...] = ()
    """What is held in 8 bits: a denoiser from 6 billion weights on, a text encoder from 2 billion on."""


_BOTH: tuple[_Part, ...] = ("denoiser", "text")
_KNOWN: Mapping[str, _Known] = {
    "sd1:v1-5": _Known("Stable Diffusion 1.5", (512, 512)),
    "sd1:lcm": _Known("Dreamshaper 8 LCM", (512, 512)),
    "sd2:v2-1": _Known("Stable Diffusion 2.1", (768, 768)),
    "sd2:v2-1-base": _Known("Stable Diffusion 2.1 base", (512, 512)),
    "sd2:turbo": _Known("SD Turbo", (512, 512)),
    "sd3:medium": _Known("Stable Diffusion 3 medium", eight_bits=("text",)),
    "sd3:3.5-medium": _Known("Stable Diffusion 3.5 medium", eight_bits=("text",)),
    "sd3:3.5-large": _Known("Stable Diffusion 3.5 large", eight_bits=_BOTH),
    "sd3:3.5-large-turbo": _Known("Stable Diffusion 3.5 large Turbo", eight_bits=_BOTH),
    "sdxl:base": _Known("Stable Diffusion XL"),
    "sdxl:turbo": _Known("SDXL Turbo", (512, 512)),
    "sdxl:lightning": _Known("SDXL Lightning, 4 steps"),
    "sdxl:hyper": _Known("Hyper-SDXL, 1 step"),
    "vega:base": _Known("Segmind Vega"),
    "ssd:base": _Known("Segmind SSD-1B"),
    "pixart:1024": _Known("PixArt-alpha", eight_bits=("text",)),
    "pixart:512": _Known("PixArt-alpha 512", (512, 512), eight_bits=("text",)),
    "pixart:lcm": _Known("PixArt-alpha LCM", eight_bits=("text",)),
    "pixart_sigma:1024": _Known("PixArt-Sigma", eight_bits=("text",)),
    "pixart_sigma:512": _Known("PixArt-Sigma 512", (512, 512), eight_bits=("text",)),
    "pixart_sigma:2k": _Known("PixArt-Sigma 2K", (2048, 2048), eight_bits=("text",)),
    "auraflow:0.3": _Known("AuraFlow 0.3", eight_bits=("denoiser",)),
    "auraflow:0.2": _Known("AuraFlow 0.2", eight_bits=("denoiser",)),
    "auraflow:pony-v7": _Known("Pony V7", eight_bits=("denoiser",)),
    "flux:dev": _Known("FLUX.1 dev", eight_bits=_BOTH),
    "flux:schnell": _Known("FLUX.1 schnell", eight_bits=_BOTH),
    "flex1:alpha": _Known("Flex.1 alpha", eight_bits=_BOTH),
    "flex2:preview": _Known("Flex.2 preview", eight_bits=_BOTH),
    "lumina2:base": _Known("Lumina 2", eight_bits=("text",)),
    "wan21:1.3b": _Known("Wan 2.1 1.3B", (832, 480), eight_bits=("text",)),
    "wan21:14b": _Known("Wan 2.1 14B", (832, 480), eight_bits=_BOTH),
    "wan21:14b_4step": _Known("Wan 2.1 14B, 4 steps", (832, 480), eight_bits=_BOTH),
    "zimage:turbo": _Known("Z-Image Turbo", eight_bits=_BOTH),
    "zimage:base": _Known("Z-Image", eight_bits=_BOTH),
    "zimage:deturbo": _Known("Z-Image De-Turbo", eight_bits=_BOTH),
}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What a job of a variant starts with."""

    name: str
    """As `model.arch` says it, `zimage:turbo`."""
    title: str
    distilled: bool
    steps: int
    """Denoising steps."""
    adapter: bool
    """It has a training adapter that its users take."""
    licence: str
    resolution: tuple[int, ...]
    """Of its datasets."""
    values: dict[str, Any]
    """Its options, from the process down. None: the option is left out."""

    @property
    def other_resolution(self) -> dict[str, Any]:
        """What a new dataset says of its resolution: nothing where it is the default."""
        usual = DatasetConfig.model_fields["resolution"].default
        return {} if list(self.resolution) == usual else {"resolution": list(self.resolution)}


@cache
def presets() -> tuple[Preset, ...]:
    """One for each variant that the specs know: those with a training adapter first, then the other distilled ones."""
    specs = [archs.spec(name) for name in archs.built()]
    found = [_preset(facts, name, variant) for facts in specs for name, variant in facts.variants.items()]
    return tuple(sorted(found, key=lambda preset: (not preset.adapter, not preset.distilled)))


def _preset(facts: ArchSpec, variant_name: str, variant: Variant) -> Preset:
    name = f"{facts.name}:{variant_name}"
    known = _KNOWN.get(name) or _Known(f"{facts.title} {variant_name}")
    kind = "flowmatch" if facts.objective == "flow" else "ddpm"
    width, height = known.size
    return Preset(
        name=name,
        title=known.title + (" (with training adapter)" if variant.adapter else ""),
        distilled=variant.distilled,
        steps=variant.steps,
        adapter=variant.adapter is not None,
        licence=variant.licence or facts.licence,
        resolution=(min(known.size),),
        values={
            "model.arch": name,
            "model.variant": None,
            "model.name_or_path": variant.repo,
            "model.extras_name_or_path": variant.extras_repo,
            "model.assistant_lora_path": variant.adapter,
            "model.quantize": "denoiser" in known.eight_bits,
            "model.qtype": "float8",
            "model.quantize_te": "text" in known.eight_bits,
            "model.low_vram": "denoiser" in known.eight_bits,
            "train.noise_scheduler": kind,
            "train.timestep_type": variant.timestep_type,
            "sample.sampler": kind,
            "sample.sample_steps": variant.steps,
            "sample.guidance_scale": int(variant.guidance) if variant.guidance.is_integer() else variant.guidance,
            "sample.width": width,
            "sample.height": height,
        },
    )
