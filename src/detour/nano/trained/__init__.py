"""The trained miniature Z-Image: weights that ship with the package, made by `detour.nano.recipes`.

`turbo` draws in 8 steps without guidance; `base` is what both were distilled from and needs guidance and
many steps; `training_adapter` makes an ordinary model of `turbo`. docs/miniature.md has their figures.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file

from detour import UserError, files
from detour.nano.recipes import miniature

if TYPE_CHECKING:
    from torch import Tensor

HERE = Path(__file__).parent
VARIANTS = {"": "turbo", "turbo": "turbo", "base": "base", "deturbo": "base"}
"""Whose weights a variant of the architecture has. The miniature was not de-distilled: its base stands for that too."""
ADAPTER = HERE / "training_adapter.safetensors"


def weights(name: str) -> dict[str, Tensor]:
    """Weights of the transformer, bf16: of `turbo` or `base`."""
    return load_file(HERE / f"{name}.safetensors")


def write(folder: Path, variant: str = "") -> None:
    """Write a complete trained model into `folder`, in diffusers' layout."""
    if variant not in VARIANTS:
        raise UserError(f"detour nano: zimage:{variant} is not known here; allowed: zimage and its variants")
    miniature.write(folder, weights(VARIANTS[variant]))


def write_adapter(path: Path) -> None:
    """Write the turbo's training adapter."""
    files.write_bytes(path, ADAPTER.read_bytes())
