"""Adapters on layers that are one in another layout: put together for it, and taken apart again.

Layers with common inputs are one there, their outputs under another (`nn.original.Held`), and so are the changes that
adapters make to them. With ranks of their own for each,

    A = [A_1; A_2; ...]    B = diag(B_1, B_2, ...)    so that    B A = [B_1 A_1; B_2 A_2; ...],

and nothing is lost. The same holds for the two products of a LoHa; DoRA's norms follow each other. An adapter that was
trained on the fused layer has a B without that form: then each layer gets all of A, and its own rows of B.

Shapes: O out features, I in features, R rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from detour.nn.original import Held

    Parts = Mapping[str, Tensor]
    """A module's tensors by PEFT's names."""

_DOWN = ("lora_A.weight", "hada_w1_b", "hada_w2_b")
"""Factors (R, I)."""
_UP = ("lora_B.weight", "hada_w1_a", "hada_w2_a")
"""Factors (O, R)."""


def put_together(parts: Sequence[Parts | None], held: Held) -> dict[str, Tensor]:
    """One module for several layers, in the order of `held`; None stands for a layer without adapter.

    Ranks become those of the largest. ValueError for a DoRA that has no norms for some layer, and for a LoKr.
    """
    there = {index: own for index, own in enumerate(parts) if own is not None}
    first, example = next(iter(there.items()))
    if len(parts) == 1 and not held.swapped:
        return dict(example)
    if any(name.startswith("lokr_") for name in example):
        raise ValueError(f"a LoKr of {', '.join(held.layers)} cannot be put together")
    if any(name not in _DOWN + _UP for name in example) and len(there) < len(parts):
        raise ValueError(f"a DoRA needs norms for all of {', '.join(held.layers)}, which are one layer there")
    rank = max(own[down].shape[0] for own in there.values() for down in _DOWN if down in own)
    unit = next(example[up].shape[0] for up in _UP if up in example) // held.shares[first]
    fused: dict[str, Tensor] = {}
    for name, tensor in example.items():
        if name in _DOWN:
            blank = tensor.new_zeros(rank, tensor.shape[1])
            fused[name] = torch.cat([blank if own is None else _padded(own[name], rank, 0) for own in parts])
        elif name in _UP:
            columns = rank * len(parts)
            fused[name] = tensor.new_zeros(unit * sum(held.shares), columns)
            for index, own in there.items():
                start = unit * sum(held.shares[:index])
                block = fused[name].narrow(0, start, unit * held.shares[index]).narrow(1, rank * index, rank)
                block.copy_(_padded(own[name], rank, 1))
        else:
            fused[name] = torch.cat([own[name] for own in there.values()])
    return {name: tensor if name in _DOWN else _turned(tensor, held) for name, tensor in fused.items()}


def take_apart(parts: Parts, held: Held) -> list[dict[str, Tensor] | None]:
    """A module for each layer of `held`; None for a layer that it does not act on.

    ValueError where the sizes do not fit, and for a LoKr.
    """
    if any(name.startswith("lokr_") for name in parts):
        raise ValueError("a LoKr of a layer that is several here cannot be taken apart")
    down, up = (next(parts[name] for name in kind if name in parts) for kind in (_DOWN, _UP))
    if held.inputs and down.shape[1] * sum(held.shares) != up.shape[0] * held.inputs:
        raise ValueError(f"a layer of {down.shape[1]} inputs and {up.shape[0]} outputs is none of this model's")
    rows = {name: held.rows(tensor) for name, tensor in parts.items() if name not in _DOWN}
    own = _own_ranks([rows[name] for name in _UP if name in rows], len(held.layers))
    found: list[dict[str, Tensor] | None] = []
    for index in range(len(held.layers)):
        piece = {name: parts[name] if name in _DOWN else rows[name][index] for name in parts}
        found.append(_narrowed(piece, index * own, own) if own else piece)
    return found


def _own_ranks(ups: Sequence[Sequence[Tensor]], count: int) -> int:
    """Ranks of each layer where every B is made of blocks; 0 where one is not."""
    rank = ups[0][0].shape[1]
    if count == 1 or rank % count:
        return 0
    own = rank // count
    for rows in ups:
        for index, row in enumerate(rows):
            if bool(row[:, : index * own].any()) or bool(row[:, (index + 1) * own :].any()):
                return 0
    return own


def _narrowed(piece: Parts, start: int, own: int) -> dict[str, Tensor] | None:
    """A layer's own ranks, without those that only fill up; None where all do."""
    cut = {
        name: tensor.narrow(0 if name in _DOWN else 1, start, own) if name in _DOWN + _UP else tensor
        for name, tensor in piece.items()
    }
    used = torch.zeros(own, dtype=torch.bool)
    for name, tensor in cut.items():
        if name in _DOWN + _UP:
            used |= tensor.cpu().ne(0).any(1 if name in _DOWN else 0)
    if not used.any() and all(name in _DOWN + _UP for name in cut):
        return None
    last = max(1, int(used.nonzero().max()) + 1) if used.any() else 1
    return {
        name: tensor.narrow(0 if name in _DOWN else 1, 0, last) if name in _DOWN + _UP else tensor
        for name, tensor in cut.items()
    }


def _padded(tensor: Tensor, rank: int, axis: int) -> Tensor:
    missing = rank - tensor.shape[axis]
    if not missing:
        return tensor
    shape = [missing if side == axis else size for side, size in enumerate(tensor.shape)]
    return torch.cat([tensor, tensor.new_zeros(shape)], axis)


def _turned(tensor: Tensor, held: Held) -> Tensor:
    """Rows in the order of the other layout. Exchanging halves is its own inverse."""
    return tensor.roll(tensor.shape[0] // 2, 0) if held.swapped else tensor
