"""Names of an original layout, in which one layer may hold several of this program's, one under another.

The same table serves the weights of a checkpoint that is one file, and the LoRAs that were trained on such layers. No
torch is imported here, since the tables are part of the architectures' specs.

Shapes: O out features, I in features, R rank, A (R, I), B (O, R).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_ENDINGS = {".weight": ".weight", ".bias": ".bias", ".scale": ".weight"}
"""How a tensor's name ends there, and here."""


@dataclass(frozen=True, slots=True)
class Held:
    """What a layer of the original layout holds."""

    layers: tuple[str, ...]
    """This program's layers, in the order in which their output features follow each other."""
    shares: tuple[int, ...]
    """Of the output features, each layer's part."""
    swapped: bool = False
    """The two halves of its output features are exchanged here."""
    inputs: int = 0
    """Its input features in the shares' unit; 0 where nothing is said of them."""

    def rows(self, tensor: Tensor) -> list[Tensor]:
        """Each layer's part of a tensor whose first axis is O. ValueError where it cannot be divided so."""
        whole = sum(self.shares)
        if tensor.shape[0] % whole:
            raise ValueError(f"{tensor.shape[0]} output features cannot be divided {':'.join(map(str, self.shares))}")
        unit = tensor.shape[0] // whole
        starts = [unit * sum(self.shares[:index]) for index in range(len(self.shares))]
        parts = [tensor.narrow(0, start, unit * share) for start, share in zip(starts, self.shares, strict=True)]
        return [self._ordered(part) for part in parts]

    def _ordered(self, part: Tensor) -> Tensor:
        return part.roll(part.shape[0] // 2, 0) if self.swapped else part


def _pattern(name: str) -> str:
    return re.escape(name).replace(r"\{\}", r"(\d+)")


def _held(text: str, number: str) -> Held:
    """An entry of the table, for a block of that number."""
    words = text.lstrip("~").replace("{}", number).split()
    inputs = int(words.pop().removeprefix("/")) if words and words[-1].startswith("/") else 0
    layers = tuple(word.partition(":")[0] for word in words)
    shares = tuple(int(word.partition(":")[2] or 1) for word in words)
    return Held(layers, shares, text.startswith("~"), inputs)


def in_blocks(there: str, here: str, entries: Mapping[str, str]) -> dict[str, str]:
    """Entries of a table for layers in blocks: `in_blocks("double_blocks.{}", "transformer_blocks.{}", {...})`."""

    def placed(word: str) -> str:
        return word if word.startswith("/") else f"{here}.{word}"

    return {f"{there}.{name}": " ".join(placed(word) for word in held.split()) for name, held in entries.items()}


class Layout:
    """The table of an original layout.

    From names there to names here, `{}` for the number of a block. Several names here, with a share of the output
    features after a colon where it is not 1, are one layer there: `attn.to_q attn.to_k attn.to_v proj_mlp:4`; `/3` at
    the end says that its input features are three such shares, by which models of another shape are told apart. An `~`
    in front says that the halves of the output features are exchanged. What has no place here is the empty string.
    """

    def __init__(self, table: Mapping[str, str], foreign: Sequence[str] = ()) -> None:
        """`foreign` are beginnings of names in all-in-one files that are not the denoiser's."""
        self.table, self.foreign = dict(table), tuple(foreign)

    @property
    def fuses(self) -> bool:
        """Is any layer there several here?"""
        return any(len(_held(there, "").layers) > 1 for there in self.table.values())

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], str]]:
        """Dotted and flat (underscores for dots) patterns of the names there."""
        found = []
        for name, held in self.table.items():
            dotted = _pattern(name)
            found += [(re.compile(dotted), held), (re.compile(dotted.replace(r"\.", "_")), held)]
        return found

    @cached_property
    def _origins(self) -> list[tuple[re.Pattern[str], str]]:
        """Patterns of the names here, with the name there."""
        layers = [(layer, name) for name, held in self.table.items() for layer in _held(held, "{}").layers]
        return [(re.compile(_pattern(layer)), name) for layer, name in layers]

    def find(self, name: str) -> Held | None:
        """What a layer there holds, by its name with dots or with underscores; None for a name not in the table."""
        for pattern, held in self._patterns:
            if (match := pattern.fullmatch(name)) is not None:
                return _held(held, (match.groups() or ("",))[0])
        return None

    def origin(self, layer: str) -> str:
        """The name there of the layer that holds one here: the same where the table has none."""
        for pattern, name in self._origins:
            if (match := pattern.fullmatch(layer)) is not None:
                return name.replace("{}", (match.groups() or ("",))[0])
        return layer

    def tensors(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        """What a tensor of a checkpoint is here: nothing where it is not the denoiser's, itself where it is unknown."""
        if name.startswith(self.foreign) and self.foreign:
            return []
        name = name.removeprefix("model.diffusion_model.").removeprefix("diffusion_model.")
        stem, dot, last = name.rpartition(".")
        held = self.find(stem)
        if held is None or dot + last not in _ENDINGS:
            return [(name, tensor)]
        if not held.layers:
            return []
        ending = _ENDINGS[dot + last]
        return [(layer + ending, part) for layer, part in zip(held.layers, held.rows(tensor), strict=True)]
