"""Writes the page of architectures from their specs, so that it cannot drift: a test compares the page with this.

python -m detour.archs.reference > docs/architectures.md
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from detour import archs
from detour.archs.base import DynamicShift

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detour.archs.base import ArchSpec, Variant

COMMAND = "python -m detour.archs.reference > docs/architectures.md"

_INTRO = f"""\
# Architectures

<!-- Written by `{COMMAND}`; change the specs in src/detour/archs/ instead. -->

`model.arch` names an architecture, or one of its variants after a colon (`zimage:base`); the first variant below is
meant when none is named, or the one whose repository `model.name_or_path` names. `detour archs --json` prints the
same. A model is a folder in the diffusers layout, a hub id, or, where the table says so, a single `.safetensors` file
in the original layout with `model.extras_name_or_path` for what it lacks.

Guidance counts 1 as none for every architecture. *Distilled* variants draw in the few steps that are given; they lose
that when trained plainly, which is what a training adapter (`model.assistant_lora_path`) is for.
"""


def markdown() -> str:
    """The page."""
    specs = [archs.spec(name) for name in archs.built()]
    overview = [_overview(spec) for spec in specs]
    head = ["architecture", "predicts", "latents", "sizes divisible by", "prompt", "LoRA formats", "licence"]
    variants = [_variant(spec, name, spec.variants[name]) for spec in specs for name in _ordered(spec)]
    head_of_variants = ["variant", "repository", "distilled", "steps", "guidance", "times", "usual training adapter"]
    return "\n".join(
        [
            _INTRO,
            _table(head, overview),
            "",
            "## Variants",
            "",
            _table(head_of_variants, variants),
            "",
            "`make archs` runs the example of each on a miniature of its model, from pictures to a LoRA that the",
            "ecosystem's own loader has loaded back, and prints a table.",
            "",
        ]
    )


def _ordered(spec: ArchSpec) -> list[str]:
    return sorted(spec.variants, key=lambda name: name != spec.default_variant)


def _overview(spec: ArchSpec) -> list[str]:
    predicts = {"flow": "flow", "eps": "noise", "v": "velocity"}[spec.objective]
    if spec.objective == "flow":
        shift = "by size" if isinstance(spec.shift, DynamicShift) else f"{spec.shift:g}"
        predicts += f", shift {shift}"
    video = "" if spec.frame_factor is None else f", video 1 + {spec.frame_factor} n frames"
    return [
        f"`{spec.name}` {spec.title}",
        predicts,
        f"{spec.latent_channels} x 1/{spec.spatial_factor}{video}",
        f"{spec.bucket_divisibility} px",
        f"{spec.text_tokens} tokens",
        ", ".join(spec.lora_keys.formats),
        spec.licence,
    ]


def _variant(spec: ArchSpec, name: str, variant: Variant) -> list[str]:
    return [
        f"`{spec.name}:{name}`",
        variant.repo,
        "yes" if variant.distilled else "",
        str(variant.steps),
        f"{variant.guidance:g}",
        variant.timestep_type,
        variant.adapter or "",
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.stdout.write(markdown())
