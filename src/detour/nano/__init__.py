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

    `zimage` is trained (`nano.trained`) unless `random` asks for random weights, which the others always have. With a
    trained turbo come its training adapter (`training_adapter.safetensors`) and pictures of a concept that it does not
    know (`dataset/`); with the others, unless `random`, a drawn dataset. `arch` may name a variant (`zimage:base`).
    """
    name, _, variant = arch.partition(":")
    module = next((module for known, module in _MODULES.items() if known == name), None)
    if module is None:
        raise UserError(f"detour nano: there is no miniature of {arch!r}; there is one of {', '.join(NAMES)}")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder to write the miniature into")
    written = {"model": folder}
    if name == "zimage" and not random:
        return written | _write_trained(folder, variant, seed)
    import_module(module).write(folder, name, variant, seed=seed)
    if not random:
        from detour.nano import drawn

        written["dataset"] = folder / "dataset"
        drawn.write_dataset(written["dataset"], size=128, seed=seed)
    return written


def _write_trained(folder: Path, variant: str, seed: int) -> dict[str, Path]:
    from detour.nano import concepts, trained

    trained.write(folder, variant)
    written = {"dataset": folder / "dataset"}
    concepts.write_dataset(written["dataset"], "zig", seed=seed)
    if trained.VARIANTS[variant] == "turbo":
        written["training adapter"] = folder / "training_adapter.safetensors"
        trained.write_adapter(written["training adapter"])
    return written
