"""Miniature models and a drawn dataset, so that everything can be tried and tested without a download."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from detour import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from detour.config.job import ModelArch

_MODULES: dict[ModelArch, str] = {
    "sd3": "detour.nano.sd3",
    "auraflow": "detour.nano.auraflow",
    "pixart": "detour.nano.pixart",
    "pixart_sigma": "detour.nano.pixart",
    "sd1": "detour.nano.sd",
    "sd2": "detour.nano.sd",
    "flex1": "detour.nano.flux",
    "flex2": "detour.nano.flux",
    "flux": "detour.nano.flux",
    "lumina2": "detour.nano.lumina2",
    "wan21": "detour.nano.wan21",
    "zimage": "detour.nano.zimage",
    "sdxl": "detour.nano.sdxl",
    "vega": "detour.nano.sdxl",
    "ssd": "detour.nano.sdxl",
}
NAMES = tuple(_MODULES)
"""Architectures with a miniature."""


def write(folder: Path, arch: str = "zimage", *, seed: int = 0, random: bool = False) -> dict[str, Path]:
    """Write the miniature of an architecture into `folder`, in diffusers' layout; what was written, by name.

    The drawn dataset comes with it (`dataset/`), and for `zimage` a training adapter (`training_adapter.safetensors`),
    unless `random` asks for the bare model. None of it is trained yet: weights are random, and so is the adapter.
    `arch` may name a variant whose structure differs (`flux:schnell`).
    """
    name, _, variant = arch.partition(":")
    module = next((module for known, module in _MODULES.items() if known == name), None)
    if module is None:
        raise UserError(f"detour nano: there is no miniature of {arch!r}; there is one of {', '.join(NAMES)}")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder to write the miniature into")
    from detour.nano import drawn, zimage

    import_module(module).write(folder, name, variant, seed=seed)
    written = {"model": folder}
    if random:
        return written
    if name == "zimage":
        written["training adapter"] = folder / "training_adapter.safetensors"
        zimage.write_adapter(written["training adapter"], folder, seed=seed)
    written["dataset"] = folder / "dataset"
    drawn.write_dataset(written["dataset"], size=128, seed=seed)
    return written
