"""Writes what was trained: LoRA files in the formats of `lora_formats`, and whole models in diffusers' layout.

A file appears under its name only after it was loaded back with the ecosystem's own loader (`verify`). The same weights
and the same metadata give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from detour import UserError, files
from detour.export.container import chunks, serialise, with_hashes
from detour.export.inspection import inspect_file
from detour.export.metadata import Origin, describe
from detour.export.reading import read_lora
from detour.export.verify import NotProvenError, Proof, base_weights, layer_shapes, own_shapes, verify
from detour.lora_formats import LoraFile, diffusers_refuses, from_training, is_flat, to_format
from detour.nn.together import to_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from detour.archs.base import ArchSpec
    from detour.config.job import DType
    from detour.export.reading import Shapes
    from detour.lora_formats import BaseWeight, Format

__all__ = [
    "Base", "LoraFile", "NotProvenError", "Origin", "Written",
    "convert", "describe", "export_full", "from_training", "inspect_file", "read_lora", "write_lora",
]  # fmt: skip

DTYPES: dict[DType, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHARD_BYTES = 5_000_000_000
_OF_A_FORMAT = ("format", "lora_adapter_metadata")
_WEIGHTS = "diffusion_pytorch_model"


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """The model that an adapter belongs to, as far as exporting must know it."""

    spec: ArchSpec
    shapes: Shapes
    """Its linear layers."""
    weight: BaseWeight | None = None
    """Their weights, which a DoRA in the comfy format needs."""

    @classmethod
    def of(cls, trained: nn.Module, spec: ArchSpec) -> Base:
        """The model at hand, with or without the adapter on it: the denoiser, or it and text encoders together."""
        return cls(spec=spec, shapes=to_file(trained, layer_shapes(trained)), weight=base_weights(trained))


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """A file that was written and proven."""

    path: Path
    sha256: str
    proof: Proof
    notes: tuple[str, ...]
    """What its users should know."""
    checked: str = ""
    """What the caller's own check has found."""


def write_lora(
    path: Path,
    lora: LoraFile,
    base: Base,
    fmt: Format,
    *,
    dtype: DType | None,
    metadata: Mapping[str, str],
    check: Callable[[Path], str] | None = None,
) -> Written:
    """Write a LoRA in a format, whole and proven or not at all. `dtype` None keeps the tensors' own.

    `check` is a further proof, of the finished file before it takes its name; it says what it has found.
    UserError where the format cannot carry the adapter; NotProvenError where it does not load as it was trained.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: a LoRA's file must end in .safetensors")
    tensors, header = to_format(lora, base.spec, fmt, dtype=dtype and DTYPES[dtype], base_weight=base.weight)
    kept = {key: value for key, value in metadata.items() if key not in _OF_A_FORMAT}
    data = serialise(tensors, with_hashes(tensors, kept | {"format": "pt"} | header))
    with files.new_file(path) as tmp:
        tmp.write_bytes(data)
        try:
            proof = verify(tmp, lora, base.spec, fmt, base.shapes)
            checked = "" if check is None else check(tmp)
        except NotProvenError as error:
            raise NotProvenError(f"{path} was not kept: {error}") from error
    notes, digest = _notes(lora, base.spec, fmt), hashlib.sha256(data).hexdigest()
    return Written(path=path, sha256=digest, proof=proof, notes=notes, checked=checked)


def convert(source: Path, target: Path, spec: ArchSpec, fmt: Format, shapes: Shapes | None = None) -> Written:
    """Write a LoRA file of any format in another, with weights, alpha and metadata as they are.

    `shapes` are the layers of the model, where it is at hand; otherwise the file's own sizes are taken for them.
    """
    lora = read_lora(source, spec, shapes)
    base = Base(spec=spec, shapes=own_shapes(lora) if shapes is None else shapes)
    written = write_lora(target, lora, base, fmt, dtype=None, metadata=lora.metadata)
    return Written(path=target, sha256=written.sha256, proof=written.proof, notes=lora.notes + written.notes)


def _notes(lora: LoraFile, spec: ArchSpec, fmt: Format) -> tuple[str, ...]:
    """What another program than the format's own makes of the file."""
    notes = []
    if fmt == "diffusers" and "comfy" in spec.lora_keys.original_in:
        notes.append(f"ComfyUI does not know diffusers' names of {spec.title}; give it comfy")
    elif fmt == "diffusers" and any(lora.scale(name) != 1 for name in lora.modules):
        notes.append("alpha differs from the rank: ComfyUI does not read it in the format diffusers; give it comfy")
    if fmt == "diffusers" and lora.kind == "dora":
        notes.append("ComfyUI does not read a DoRA's norms in the format diffusers; give it comfy")
    if fmt == "comfy" and lora.kind == "dora":
        notes.append("diffusers drops a DoRA's norms in the format comfy; give it diffusers")
    if fmt == "comfy" and lora.kind not in spec.diffusers_kinds:
        what = {"loha": "LoHa", "lokr": "LoKr"}.get(lora.kind, lora.kind)
        notes.append(f"diffusers refuses a {what}; ComfyUI reads it")
    if fmt == "kohya" and not is_flat("comfy", spec) and fmt not in spec.lora_keys.original_in:
        notes.append("ComfyUI may find only a part of the layers by kohya's names; give it comfy")
    if lora.kind == "lora" and (reason := diffusers_refuses(lora, spec, fmt)):
        notes.append(f"for ComfyUI alone: diffusers does not load it, since {reason}; give it the format diffusers")
    return tuple(notes)


def export_full(
    denoiser: nn.Module, folder: Path, spec: ArchSpec, dtype: DType, *, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Write a trained denoiser as `<folder>/<component>/` in diffusers' layout, whole and read back, or not at all.

    The folder can stand in for the component of a model in diffusers' layout. Returns `<folder>/<component>`.
    """
    target = DTYPES[dtype]
    weights = denoiser.state_dict()
    if adapters := [name for name in weights if ".base_layer." in name]:
        raise ValueError(f"the denoiser has an adapter on it ({adapters[0]}); write_lora exports that")
    shards = list(_shards(weights, target, shard_bytes))
    with files.new_directory(folder, lambda tmp: _check_full(tmp / spec.denoiser, denoiser, target)) as tmp:
        place = tmp / spec.denoiser
        place.mkdir()
        files.write_json(place / "config.json", _config(denoiser))
        where: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            file = f"{_WEIGHTS}{part}.safetensors"
            cast_weights = {name: _cast(weights[name], target) for name in names}
            files.write_chunks(place / file, chunks(cast_weights, {"format": "pt"}))
            where |= dict.fromkeys(names, file)
        if len(shards) > 1:
            total = sum(tensor.numel() * target.itemsize for tensor in weights.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            files.write_json(place / f"{_WEIGHTS}.safetensors.index.json", index)
    return folder / spec.denoiser


def _shards(weights: Mapping[str, Tensor], dtype: torch.dtype, limit: int) -> Iterator[list[str]]:
    """Names of the tensors of each file, in the model's order."""
    names: list[str] = []
    size = 0
    for name, tensor in weights.items():
        added = tensor.numel() * dtype.itemsize
        if names and size + added > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += added
    yield names


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)


def _config(denoiser: nn.Module) -> dict[str, Any]:
    """diffusers' configuration without the folder that the model came from."""
    config: dict[str, Any] = json.loads(cast("Any", denoiser).to_json_string())
    config.pop("_name_or_path", None)
    return config


def _check_full(folder: Path, denoiser: nn.Module, dtype: torch.dtype) -> None:
    """diffusers reads the folder, and every value is the one that was trained."""
    loaded = cast("Any", type(denoiser)).from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    back: dict[str, Tensor] = loaded.state_dict()
    weights = denoiser.state_dict()
    if set(back) != set(weights):
        raise NotProvenError(f"{folder}: diffusers reads other weights than were written")
    for name, tensor in weights.items():
        if not torch.equal(_cast(tensor, dtype), back[name]):
            raise NotProvenError(f"{folder}: diffusers reads {name} with other values than were written")
