"""Miniature models and a drawn dataset, so that everything can be tried and tested without a download."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detour import UserError

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ("zimage",)
"""Architectures with a miniature."""


def write(folder: Path, arch: str = "zimage", *, seed: int = 0, random: bool = False) -> dict[str, Path]:
    """Write the miniature of an architecture into `folder`, in diffusers' layout; what was written, by name.

    For `zimage` a training adapter and the drawn dataset come with it (`training_adapter.safetensors`, `dataset/`),
    unless `random` asks for the bare model. None of it is trained yet: weights are random, and so is the adapter.
    """
    if arch not in NAMES:
        raise UserError(f"detour nano: there is no miniature of {arch!r}; there is one of {', '.join(NAMES)}")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder to write the miniature into")
    from detour.nano import drawn, zimage

    zimage.write(folder, seed=seed)
    written = {"model": folder}
    if not random:
        written |= {"training adapter": folder / "training_adapter.safetensors", "dataset": folder / "dataset"}
        zimage.write_adapter(written["training adapter"], folder, seed=seed)
        drawn.write_dataset(written["dataset"], size=128, seed=seed)
    return written
