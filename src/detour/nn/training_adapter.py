"""The training adapter: a LoRA D that turns a distilled model into an ordinary one while something else is trained.

On while training, taken away while sampling, never part of what is trained or saved. Two ways, one object:

    factored  on: W x + D x     removed: W x        W stays bit for bit the distilled model, removal is exact
    merged    on: (W + D) x     removed: (W + D) x - D x    no cost in training; W + D was rounded: nearly exact

The branch D x = s B (A x) is added by forward hooks, outside the model's parameters and state, in the type that the
layer puts out (bf16 products accumulate in float32). Hooks sit on the layer that has the name when `attach` is called:
a plain or quantised linear layer, or PEFT's wrapper around one. Attach after `lora.attach`: under a DoRA the branch
would otherwise be scaled by the DoRA's magnitudes.

A backward pass that recomputes activations belongs in the same context as its forward pass.

Shapes: x (..., in), A (rank, in), B (out, rank), W (out, in).
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from detour import UserError
from detour.files import sha256_file
from detour.nn.adapter_file import Keys, Pair, read_adapter
from detour.nn.lowrank import add_low_rank

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

Mode = Literal["factored", "merged"]


def linear_shapes(denoiser: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer by name; works on the meta device."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Linear)
    }


def load_training_adapter(
    path: Path, shapes: Mapping[str, tuple[int, int]], keys: Keys, mode: Mode, *, dtype: torch.dtype
) -> TrainingAdapter:
    """Read and check an adapter, before the model's weights are loaded.

    `shapes` are the model's (`linear_shapes`), `dtype` is what its weights are held in before any quantising: the
    rounding of merged weights is measured against it. Raises UserError for anything but a whole LoRA of this model.
    """
    return TrainingAdapter(read_adapter(path, shapes, keys), mode, dtype=dtype, sha256=sha256_file(path))


@dataclass(frozen=True, slots=True)
class MergeError:
    """What rounding W + D to the weights' type did, over all merged layers together (before any quantising)."""

    weights: float
    """|(M - D) - W| / |W|, M the rounded merged weights: how far the model is from itself once D is removed."""
    adapter: float
    """|(M - W) - D| / |D|: the share of the adapter that rounding has falsified."""
    kept: float
    """<M - W, D> / <D, D>: how much of the adapter survived; 1 is all of it."""

    def __str__(self) -> str:
        return (
            f"removing the merged training adapter leaves the weights off by {self.weights:.2%} "
            f"({self.adapter:.1%} of the adapter); {self.kept:.1%} of the adapter survived rounding"
        )


@dataclass(frozen=True, slots=True)
class _Sums:
    """Squared norms of one layer, from which `MergeError` is added up."""

    error: float
    """(M - W) - D"""
    weights: float
    """W, as held in the model's type"""
    adapter: float
    """D"""
    change: float
    """M - W"""


class _Branch:
    """D x of one layer, with copies of its factors where and how the layer computes."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.A, self.B = pair.A, self._scaled(pair.B.dtype)

    def _scaled(self, dtype: torch.dtype) -> Tensor:
        """s B, multiplied in float32."""
        return (self.pair.B.float() * self.pair.scale).to(dtype)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Copies of the factors in this place and type, always made from the file's own."""
        if (self.A.device, self.A.dtype) != (device, dtype):
            self.A, self.B = self.pair.A.to(device, dtype), self._scaled(dtype).to(device)

    def add_to(self, y: Tensor, x: Tensor, sign: float) -> Tensor:
        """`y + sign D x`, in the type of y, which may be overwritten."""
        self.to(y.device, y.dtype)
        return add_low_rank(y, x.to(y.dtype), self.A, self.B, sign)


class TrainingAdapter:
    """One adapter for one model, in one of two modes (see the top of the file)."""

    def __init__(self, pairs: Mapping[str, Pair], mode: Mode, *, dtype: torch.dtype, sha256: str = "") -> None:
        """`pairs` by layer name, as `read_adapter` returns them."""
        self.mode: Mode = mode
        self.dtype = dtype
        self.sha256 = sha256
        """Of the file, for the LoRA's metadata."""
        self._branches = {name: _Branch(pair) for name, pair in pairs.items()}
        self._merged: dict[str, _Sums] = {}
        self._removals = 0
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def names(self) -> list[str]:
        """The layers it acts on."""
        return list(self._branches)

    @property
    def active(self) -> bool:
        """Is the model the ordinary one now (training), or the distilled one (sampling)?"""
        return self._removals == 0

    @contextmanager
    def removed(self) -> Iterator[None]:
        """The distilled model inside. May be nested; an exception puts the adapter back as well."""
        self._removals += 1
        try:
            yield
        finally:
            self._removals -= 1

    @contextmanager
    def present(self) -> Iterator[None]:
        """The ordinary model inside, wherever one is."""
        removals, self._removals = self._removals, 0
        try:
            yield
        finally:
            self._removals = removals

    def patch(self, name: str, tensor: Tensor) -> Tensor:
        """For `weights.Placement.patch`: the parameter of that name, merged (float32) where mode and name say so.

        Placement rounds it to the model's type and quantises it. In factored mode every tensor stays what it is.
        """
        branch = self._branches.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if self.mode == "factored" or branch is None:
            return tensor
        W, D = tensor.float(), branch.pair.delta().to(tensor.device)
        merged = W + D
        held = W.to(self.dtype).float()
        change = merged.to(self.dtype).float() - held
        sums = _Sums(error=_square(change - D), weights=_square(held), adapter=_square(D), change=_square(change))
        self._merged[name.removesuffix(".weight")] = sums
        return merged

    @property
    def merge_error(self) -> MergeError | None:
        """How exact removal is, measured while merging; None in factored mode, where it is exact."""
        if not self._merged:
            return None
        sums = self._merged.values()
        error, weights, adapter = sum(s.error for s in sums), sum(s.weights for s in sums), sum(s.adapter for s in sums)
        along = (sum(s.change for s in sums) + adapter - error) / 2
        return MergeError(weights=(error / weights) ** 0.5, adapter=(error / adapter) ** 0.5, kept=along / adapter)

    def attach(self, denoiser: nn.Module) -> None:
        """Add the branches to the model, which must have been loaded through `patch` in merged mode.

        Raises UserError for what merging cannot be combined with: the merged weights would become part of the result.
        """
        if self._hooks:
            raise ValueError("this adapter is attached already")
        layers = {name: denoiser.get_submodule(name) for name in self._branches}
        if self.mode == "merged":
            self._check_merged(denoiser, layers)
        self._hooks = [self._hook(name, layer) for name, layer in layers.items()]

    def _check_merged(self, denoiser: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        unpatched = [name for name in layers if name not in self._merged]
        if unpatched:
            raise ValueError(f"{len(unpatched)} layers were not merged ({unpatched[0]}); load the model through patch")
        reason = None
        if any(".lora_magnitude_vector." in name for name, _ in denoiser.named_parameters()):
            reason = "network.type: dora measures its magnitudes on the base weights"
        elif any(parameter.requires_grad for layer in layers.values() for parameter in _own_weight(layer)):
            reason = "network.type: full trains and saves the base weights"
        if reason is not None:
            raise UserError(f"{reason}, so the adapter must not be merged into them; use assistant_lora_mode: factored")

    def _hook(self, name: str, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        branch = self._branches[name]

        def add(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if self.active == (self.mode == "merged"):
                return None  # the output as it is: W x for factored, (W + D) x for merged
            return branch.add_to(output, args[0], 1.0 if self.mode == "factored" else -1.0)

        return layer.register_forward_hook(add)

    def detach(self) -> None:
        """Take the branches off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def to(self, device: torch.device) -> TrainingAdapter:
        """Move the branches, in the model's type. They also follow the layers' outputs by themselves."""
        for branch in self._branches.values():
            branch.to(device, self.dtype)
        return self


def _square(tensor: Tensor) -> float:
    """Squared Frobenius norm, added up in float64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def _own_weight(layer: nn.Module) -> Iterator[nn.Parameter]:
    """The weight of a plain linear layer; nothing of PEFT's wrappers, whose base is frozen."""
    return (parameter for name, parameter in layer.named_parameters(recurse=False) if name == "weight")
