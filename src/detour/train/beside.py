"""Models and LoRAs beside the one that is trained: the base of `delta`, the model to draw with, the patch.

Found and checked in full before a weight is read (`find`), loaded like the trained model (`load`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from detour import UserError, archs, files, weights
from detour.draw import read_lora
from detour.nn import lora
from detour.nn.training_adapter import TrainingAdapter, linear_shapes
from detour.train.teachers import Base

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from detour.archs.base import Arch
    from detour.config.job import TrainProcess
    from detour.draw import Added
    from detour.nn.adapter_file import Pair
    from detour.weights import ModelSource, Placement

    Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Second:
    """Another model of the architecture."""

    source: ModelSource
    denoiser: nn.Module
    """On the meta device."""

    def load(self, arch: Arch, placement: Placement) -> nn.Module:
        """Its denoiser with its weights, frozen."""
        weights.materialise(self.denoiser, arch.denoiser_tensors(self.source), placement, where=self.source.name)
        return self.denoiser


@dataclass(frozen=True)
class Beside:
    """What a job names besides the trained model; most name nothing."""

    base: Second | None = None
    change: Mapping[str, Pair] | None = None
    """What the LoRA of `delta` adds to the base."""
    deployed: Second | None = None
    patch: Mapping[str, Pair] | None = None
    patch_sha256: str | None = None

    def load_base(self, arch: Arch, placement: Placement) -> Base | None:
        """The base with its LoRA as a branch."""
        if self.base is None or self.change is None:
            return None
        denoiser = self.base.load(arch, placement)
        change = TrainingAdapter(self.change, "factored", dtype=placement.dtype).to(placement.device)
        change.attach(denoiser)
        return Base(denoiser, change)

    def load_deployed(self, arch: Arch, placement: Placement, attach: Callable[[nn.Module], None]) -> nn.Module | None:
        """The model to draw with, in main memory; `attach` puts what is trained on it.

        To be called before the trained model is loaded, so that both are never on the card at once meanwhile.
        """
        if self.deployed is None:
            return None
        denoiser = self.deployed.load(arch, placement).to("cpu")
        attach(denoiser)
        lora.train_mode(denoiser, False)
        return denoiser

    def branch(self, placement: Placement) -> TrainingAdapter | None:
        """The patch; not on any model yet."""
        if self.patch is None:
            return None
        return TrainingAdapter(self.patch, "factored", dtype=placement.dtype).to(placement.device)


def find(process: TrainProcess, arch: Arch, denoiser: nn.Module, layers: Sequence[str]) -> Beside:
    """Find and check what a resolved process names; `denoiser` is the trained one, `layers` those that are trained."""
    preserve, shapes = process.preserve, linear_shapes(denoiser)
    base = change = deployed = patch = None
    if preserve.delta is not None:
        base = _second("preserve.delta.model", preserve.delta.model, arch, shapes, list(shapes))
        change = _plain("preserve.delta.lora", preserve.delta.lora, arch, linear_shapes(base.denoiser))
    if preserve.deploy_on is not None:
        deployed = _second("preserve.deploy_on", preserve.deploy_on, arch, shapes, layers)
        name, _ = archs.drawn_variant(process)
        archs.check_variant(arch.spec, name, deployed.denoiser.config)  # type: ignore[arg-type]
    if preserve.distill_patch is not None:
        drawn = shapes if deployed is None else linear_shapes(deployed.denoiser)
        patch = _plain("preserve.distill_patch", preserve.distill_patch, arch, drawn)
    return Beside(
        base=base,
        change=None if change is None else change.pairs(),
        deployed=deployed,
        patch=None if patch is None else patch.pairs(),
        patch_sha256=None if patch is None else files.sha256_file(patch.path),
    )


def _second(option: str, place: str, arch: Arch, shapes: Shapes, layers: Sequence[str]) -> Second:
    """A model whose denoiser has these layers of the trained one, in the same shapes."""
    spec = arch.spec
    alone = place.endswith(".safetensors")  # one file holds the denoiser, and nothing of the scheduler
    try:
        source = weights.find_model(
            place,
            components=(spec.denoiser,) if alone else (spec.denoiser, "scheduler"),
            denoiser=spec.denoiser,
        )
        denoiser = arch.build_denoiser(source)
        if alone:
            weights.tensor_shapes([source.single_file] if source.single_file is not None else [])
        else:
            weights.tensor_shapes(weights.component_files(source.component(spec.denoiser)))
    except UserError as error:
        raise type(error)(f"{option}: {error}") from error
    own = linear_shapes(denoiser)
    others = [name for name in layers if own.get(name) != shapes[name]]
    if others:
        raise UserError(
            f"{option}: {place} is built otherwise than the trained model: {len(others)} of {len(layers)} layers, "
            f"such as {others[0]}"
        )
    return Second(source, denoiser)


def _plain(option: str, text: str, arch: Arch, shapes: Shapes) -> Added:
    """A plain LoRA, which can be a branch beside the weights."""
    try:
        added = read_lora(text, arch, shapes, option)
    except UserError as error:
        raise error if str(error).startswith(option) else type(error)(f"{option}: {error}") from error
    if added.file.kind != "lora":
        raise UserError(f"{option}: {added.path} is a {added.file.kind}; only a plain LoRA can be put on and taken off")
    return added
