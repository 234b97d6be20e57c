"""Read a training adapter's file and check it in full against the model, before the model is loaded.

The file is a plain LoRA in any of the spellings in use (m is a linear layer's name, such as `layers.0.attention.to_q`):

    <prefix>m.lora_A.weight  <prefix>m.lora_B.weight       prefix: ComfyUI's, diffusers', PEFT's or none
    <prefix>m.lora_down.weight  <prefix>m.lora_up.weight   (or `lora.down`, `lora.up`; kohya's prefix writes m with `_`)
    <prefix>m.alpha                                        optional; without it alpha is the rank, a scale of 1

Or m is a layer of the model's original layout, which may hold several of its layers (`double_blocks.0.img_attn.qkv`).

A wrong adapter must never train: every layer must exist, fit, be complete and finite, and whole families of layers must
be there. Existing toolkits print missing keys and go on with half an adapter.

Shapes: A (rank, in), B (out, rank).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, Protocol

import torch

from detour import UserError
from detour.nn.fused import take_apart
from detour.weights import read_tensors

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from detour.nn.original import Layout

    Alphas = Sequence[tuple[re.Pattern[str], float]]
    """Pattern for a layer's whole name, alpha; the first that fits counts."""

_SUFFIXES = {
    ".lora_A.weight": "A", ".lora_B.weight": "B",
    ".lora_A.default.weight": "A", ".lora_B.default.weight": "B",
    ".lora_down.weight": "A", ".lora_up.weight": "B",
    ".lora.down.weight": "A", ".lora.up.weight": "B",
    ".alpha": "alpha",
}  # fmt: skip
_OTHER_KINDS = {".lokr_": "LoKr", ".hada_": "LoHa", "lora_magnitude_vector": "DoRA", "dora_scale": "DoRA"}
_PEFT_PREFIX, _ORIGINAL_PREFIX = "base_model.model.", "diffusion_model."
_INDEX = re.compile(r"(?<![^.])\d+(?![^.])")
"""A part of a dotted name that is a number."""
_SHOWN = 3
"""Names quoted in an error."""


class Keys(Protocol):
    """How files write a module's name (`archs.base.LoraKeys`)."""

    @property
    def comfy_prefix(self) -> str:
        """Such as `diffusion_model.`."""

    @property
    def diffusers_prefix(self) -> str:
        """Such as `transformer.`."""

    @property
    def kohya_prefix(self) -> str:
        """Such as `lora_unet_`."""

    @property
    def original(self) -> Layout | None:
        """Names of the original layout, where files use them too."""


@dataclass(frozen=True, slots=True)
class Pair:
    """What the adapter adds to one layer: `scale * B A`."""

    A: Tensor
    B: Tensor
    scale: float

    def delta(self) -> Tensor:
        """`scale * B A` (out, in), float32."""
        return self.scale * (self.B.float() @ self.A.float())


def read_adapter(path: Path, shapes: Mapping[str, tuple[int, int]], keys: Keys) -> dict[str, Pair]:
    """The adapter's pairs by layer, in the model's order.

    `shapes` are (out, in) of every linear layer of the model. Raises UserError, naming the file, for anything that is
    not a whole LoRA of this very model.
    """
    tensors, header = read_tensors(path)
    stems = _parts(path, tensors)
    modules = _resolve(path, stems, shapes, keys)
    alphas = _header_alphas(path, header, keys)
    pairs = {name: _pair(path, name, modules[name], shapes[name], alphas) for name in shapes if name in modules}
    if not any(bool(pair.A.any()) and bool(pair.B.any()) for pair in pairs.values()):
        _fail(path, "it is all zero: it would change nothing")
    _check_holes(path, pairs, shapes)
    return pairs


def _fail(path: Path, problem: str) -> NoReturn:
    raise UserError(f"training adapter {path}: {problem}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f", ... ({len(names)} in all)" if len(names) > _SHOWN else "")


def _parts(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The file's tensors by the name they give their layer, then by part: A, B, alpha."""
    if not tensors:
        _fail(path, "it holds no tensors")
    stems: dict[str, dict[str, Tensor]] = defaultdict(dict)
    strange: list[str] = []
    for key, tensor in tensors.items():
        suffix = next((suffix for suffix in _SUFFIXES if key.endswith(suffix)), None)
        if suffix is None:
            strange.append(key)
            continue
        stem, part = key.removesuffix(suffix), _SUFFIXES[suffix]
        if part in stems[stem]:
            _fail(path, f"{stem} has two tensors for the same half, under different names")
        stems[stem][part] = tensor
    if strange:
        kind = next((kind for mark, kind in _OTHER_KINDS.items() if any(mark in key for key in strange)), None)
        if kind is not None:
            _fail(path, f"it is a {kind} (it holds {_some(strange)}); a training adapter must be a plain LoRA")
        if not stems:
            _fail(path, f"it is not a LoRA: it holds {_some(strange)}; is it a whole model?")
        _fail(path, f"it holds tensors that no LoRA has: {_some(strange)}")
    return stems


def _resolve(
    path: Path, stems: Mapping[str, dict[str, Tensor]], shapes: Mapping[str, tuple[int, int]], keys: Keys
) -> dict[str, dict[str, Tensor]]:
    """The same by the model's names; every layer of the file must be in the model, once."""
    by_kohya: dict[str, list[str]] = defaultdict(list)
    for name in shapes:
        by_kohya[keys.kohya_prefix + name.replace(".", "_")].append(name)
    modules: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    for stem, parts in stems.items():
        plain = (stem.removeprefix(prefix) for prefix in (keys.comfy_prefix, keys.diffusers_prefix, _PEFT_PREFIX, ""))
        names = {name for name in plain if name in shapes} | set(by_kohya.get(stem, ()))
        if len(names) > 1:
            _fail(path, f"{stem} could be any of {_some(sorted(names))}; use the file with dotted names")
        found = {name: parts for name in names} or _taken_apart(path, stem, parts, keys)
        if not found or not found.keys() <= shapes.keys():
            unknown.append(stem)
        elif twice := found.keys() & modules.keys():
            _fail(path, f"it holds the layer {min(twice)} twice, under different prefixes")
        else:
            modules |= found
    if unknown:
        _fail(
            path,
            f"it was made for another model: {len(modules)} of its {len(stems)} layers are in this one, "
            f"and there is no {_some(unknown)}; layers here are named like {_some(list(shapes)[::-1])}",
        )
    return modules


def _taken_apart(path: Path, stem: str, parts: dict[str, Tensor], keys: Keys) -> dict[str, dict[str, Tensor]]:
    """The model's layers that a layer of its original layout holds, each with its parts; none where it is no such."""
    beginnings = (keys.comfy_prefix, keys.diffusers_prefix, _ORIGINAL_PREFIX, _PEFT_PREFIX, keys.kohya_prefix, "")
    start = next(prefix for prefix in beginnings if stem.startswith(prefix))
    held = keys.original.find(stem.removeprefix(start)) if keys.original is not None else None
    if held is None:
        return {}
    if not {"A", "B"} <= parts.keys() or parts["A"].ndim != 2 or parts["B"].ndim != 2:
        return dict.fromkeys(held.layers, parts)  # which `_pair` will refuse
    try:
        pieces = take_apart({"lora_A.weight": parts["A"], "lora_B.weight": parts["B"]}, held)
    except ValueError as error:
        _fail(path, f"it was made for another model: {stem}: {error}")
    found: dict[str, dict[str, Tensor]] = {}
    for layer, piece in zip(held.layers, pieces, strict=True):
        if piece is not None:
            A, B = piece["lora_A.weight"], piece["lora_B.weight"]
            share = A.shape[0] / parts["A"].shape[0]  # alpha / rank stays what it is
            found[layer] = {"A": A, "B": B} | ({"alpha": parts["alpha"] * share} if "alpha" in parts else {})
    return found


def _header_alphas(path: Path, header: Mapping[str, str], keys: Keys) -> Alphas:
    """The alphas that diffusers writes into the header instead of tensors: for some layers first, then for all.

    Left unread, a file whose alpha is not its rank would train at the wrong strength.
    """
    if "lora_adapter_metadata" not in header:
        return []
    try:
        config = json.loads(header["lora_adapter_metadata"])
        known = {key.removeprefix(keys.diffusers_prefix): value for key, value in config.items()}
        # PEFT's rule for patterns: the last parts of the name, or a regular expression for them.
        some = known.get("alpha_pattern", {}).items()
        alphas = [(re.compile(rf"(.*\.)?({pattern})"), float(alpha)) for pattern, alpha in some]
        if "lora_alpha" in known:
            alphas.append((re.compile(".*"), float(known["lora_alpha"])))
    except (ValueError, TypeError, AttributeError, re.error) as error:
        _fail(path, f"its header has a lora_adapter_metadata that cannot be understood ({error})")
    if known.get("use_rslora"):
        _fail(path, "it is an rsLoRA (alpha / sqrt(rank)); save it again with its scale multiplied into lora_B")
    return alphas


def _pair(path: Path, name: str, parts: Mapping[str, Tensor], shape: tuple[int, int], alphas: Alphas) -> Pair:
    """One layer's pair, checked."""
    missing = [half for half in ("A", "B") if half not in parts]
    if missing:
        what = {"A": "lora_A (down)", "B": "lora_B (up)"}[missing[0]]
        _fail(path, f"{name} is incomplete: its {what} is missing; is the download complete?")
    A, B, (out_features, in_features) = parts["A"], parts["B"], shape
    if A.ndim != 2 or B.ndim != 2 or A.shape[1] != in_features or B.shape[0] != out_features:
        found = f"A is {_shape(A)} and B {_shape(B)}"
        wanted = f"A rank x {in_features} and B {out_features} x rank"
        _fail(path, f"it was made for another model: {name} needs {wanted}, but {found}")
    rank = A.shape[0]
    if rank != B.shape[1] or rank == 0:
        _fail(path, f"{name}: its halves have different ranks ({rank} and {B.shape[1]})")
    alpha = _alpha(path, name, parts, alphas, rank)
    if not all(bool(torch.isfinite(half).all()) for half in (A, B)):
        _fail(path, f"{name} holds values that are not finite; fetch it again")
    return Pair(A, B, alpha / rank)


def _alpha(path: Path, name: str, parts: Mapping[str, Tensor], alphas: Alphas, rank: int) -> float:
    """The layer's own alpha, else the header's, else the rank."""
    if "alpha" in parts:
        if parts["alpha"].numel() != 1:
            _fail(path, f"{name}: its alpha is not one number but {_shape(parts['alpha'])}")
        alpha = float(parts["alpha"])
    else:
        alpha = next((alpha for pattern, alpha in alphas if pattern.fullmatch(name)), float(rank))
    if not 0 < abs(alpha) < float("inf"):
        _fail(path, f"{name}: its alpha is {alpha}, which leaves nothing of the adapter")
    return alpha


def _shape(tensor: Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape) or "a number"


def hole(layers: Container[str], shapes: Mapping[str, tuple[int, int]]) -> str | None:
    """What an adapter for these layers lacks, in words, or None where it is whole.

    Layers that differ in their numbers only are a family; an adapter has a whole family or none of it.
    """
    families: dict[str, list[str]] = defaultdict(list)
    for name in shapes:
        families[_INDEX.sub("*", name)].append(name)
    for family, names in families.items():
        missing = [name for name in names if name not in layers]
        if 0 < len(missing) < len(names):
            return f"of the {len(names)} layers {family}, {len(missing)} are missing ({_some(missing)})"
    return None


def _check_holes(path: Path, pairs: Mapping[str, Pair], shapes: Mapping[str, tuple[int, int]]) -> None:
    if (lacking := hole(pairs, shapes)) is not None:
        advice = "is the download complete, and is it an adapter for this variant of the model?"
        _fail(path, f"it is incomplete: {lacking}; {advice}")
