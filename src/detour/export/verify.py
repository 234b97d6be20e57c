"""Loads an exported file back with the ecosystem's own loader, before the file is called done.

The loader is diffusers' pipeline mixin, run on a stand-in for the denoiser: linear layers of the same names and sizes
whose weights are one number seen many times, so that a model of 6 billion parameters takes no memory. What diffusers
does with a file depends on the layers' names and sizes alone. Then every layer that took a part of the adapter is
compared with what was exported: the layers must be the same, and what is added to each.

What diffusers does not load (LoHa, architectures without a mixin) goes through PEFT's own functions; ComfyUI's DoRA,
for which there is no loader to be had, through this program's reader alone. `Proof` says which it was. ComfyUI itself
is not a package that can be installed: its keys are checked against the list that its rules give.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from detour import UserError
from detour.export.reading import added_shape, parse
from detour.lora_formats import DORA_SCALE, MAGNITUDE, LoraFile, by_module, module_key, peft_options
from detour.nn.quiet import quiet_imports
from detour.weights import read_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from detour.archs.base import ArchSpec
    from detour.export.reading import Shapes
    from detour.lora_formats import BaseWeight, Format, Kind

ADAPTER = "proof"
_REFUSALS = (UserError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)
"""What readers, diffusers and PEFT raise on files they refuse or trip over."""


class NotProvenError(UserError):
    """A file that was written does not load as what was trained. It is not kept."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """What loading a file back has shown."""

    loader: str
    """Who loaded it."""
    modules: int
    """Layers that took a part of it, all of them those that were exported."""


def layer_shapes(denoiser: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) features of each linear layer of a denoiser, with or without an adapter on it, quantised or not."""
    with quiet_imports():
        from peft.tuners.tuners_utils import BaseTunerLayer

    shapes: dict[str, tuple[int, int]] = {}
    wrapped: tuple[str, ...] = ()
    for name, module in denoiser.named_modules():
        base = module
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            wrapped += (f"{name}.",)
        if isinstance(base, nn.Linear) and not name.startswith(wrapped):
            shapes[name] = (base.out_features, base.in_features)
    return shapes


def base_weights(denoiser: nn.Module) -> BaseWeight:
    """The frozen weight of a layer by its name, dequantised: what a DoRA's norms are relative to in ComfyUI's keys."""
    with quiet_imports():
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.integrations import dequantize_module_weight

    def weight(name: str) -> Tensor:
        module = denoiser.get_submodule(name)
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        W_OI: Tensor = dequantize_module_weight(base)
        return W_OI

    return weight


def own_shapes(lora: LoraFile) -> dict[str, tuple[int, int]]:
    """The layers that a file itself implies, where no model is at hand."""
    return {name: added_shape(parts, lora.kind) for name, parts in by_module(lora.tensors).items()}


def verify(path: Path, lora: LoraFile, spec: ArchSpec, fmt: Format, shapes: Shapes) -> Proof:
    """Load a file written in a format back, and compare it with the adapter it was written from.

    `shapes` are those of the denoiser's layers. Raises NotProvenError.
    """
    tensors, metadata = read_tensors(path)
    if difference := set(tensors) ^ _keys(lora, spec, fmt):
        raise NotProvenError(f"its keys are not those of the format {fmt}: {_some(difference)}")
    dtypes = {tensor.dtype for key, tensor in tensors.items() if not key.endswith(".alpha")}
    dtype = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    try:
        _compare("Detour", lora, own := parse(path, tensors, metadata, spec, shapes), dtype)
        loader, back = _load(path, own, spec, fmt, shapes)
    except NotProvenError:
        raise
    except _REFUSALS as error:
        raise NotProvenError(f"it does not load ({type(error).__name__}: {str(error)[:300]})") from error
    _compare(loader, lora, back, dtype)
    return Proof(loader=loader, modules=len(back.ranks))


def _load(path: Path, own: LoraFile, spec: ArchSpec, fmt: Format, shapes: Shapes) -> tuple[str, LoraFile]:
    """Who loads such a file, and what becomes of it; `own` is what this program's reader has made of it."""
    if fmt == "comfy" and own.kind == "dora":
        return "Detour", own
    if own.kind == "loha" or not spec.diffusers_loader:
        return "PEFT", _through_peft(own, shapes)
    return f"diffusers.loaders.{spec.diffusers_loader}", _through_diffusers(path, own.kind, spec, shapes)


def _keys(lora: LoraFile, spec: ArchSpec, fmt: Format) -> set[str]:
    """The keys that a format's readers look for, by their rules."""
    renamed: dict[Format, dict[str, str]] = {
        "comfy": {MAGNITUDE: DORA_SCALE},
        "kohya": {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"},
        "diffusers": {},
    }
    keys = set()
    for module, parts in by_module(lora.tensors).items():
        endings = [renamed[fmt].get(part, part) for part in parts] + (["alpha"] if fmt != "diffusers" else [])
        keys |= {f"{module_key(module, spec, fmt)}.{ending}" for ending in endings}
    return keys


class _StandIn(nn.Module):
    """Linear layers of given names and sizes, each of whose weights is one zero seen out x in times."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        for name, (out, inside) in shapes.items():
            *parents, last = name.split(".")
            module: nn.Module = self
            for parent in parents:
                if parent not in dict(module.named_children()):
                    module.add_module(parent, nn.Module())
                module = module.get_submodule(parent)
            linear = nn.Linear(inside, out, bias=False, device="meta")
            linear.weight = nn.Parameter(torch.zeros(()).expand(out, inside), requires_grad=False)
            module.add_module(last, linear)


def _through_diffusers(path: Path, kind: Kind, spec: ArchSpec, shapes: Shapes) -> LoraFile:
    """What `pipeline.load_lora_weights` makes of a file."""
    with quiet_imports():
        from diffusers import loaders
        from diffusers.loaders.peft import PeftAdapterMixin

    class Denoiser(_StandIn, PeftAdapterMixin):  # type: ignore[misc]
        pass

    denoiser = Denoiser(shapes)

    class Pipeline(getattr(loaders, spec.diffusers_loader)):  # type: ignore[misc]
        hf_device_map = None
        components: ClassVar[dict[str, nn.Module]] = {spec.denoiser: denoiser}

    pipeline = Pipeline()
    setattr(pipeline, spec.denoiser, denoiser)
    with _quiet("diffusers"), _quiet("peft"):
        pipeline.load_lora_weights(str(path), adapter_name=ADAPTER, low_cpu_mem_usage=True, local_files_only=True)
    return _loaded(denoiser, kind)


def _through_peft(lora: LoraFile, shapes: Shapes) -> LoraFile:
    """What PEFT's own functions make of an adapter."""
    with quiet_imports():
        from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    config = {"lokr": LoKrConfig, "loha": LoHaConfig}.get(lora.kind, LoraConfig)(**peft_options(lora))
    denoiser = _StandIn(shapes)
    inject_adapter_in_model(config, denoiser, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    result = set_peft_model_state_dict(denoiser, lora.tensors, ADAPTER, low_cpu_mem_usage=True)
    if result.unexpected_keys:
        raise ValueError(f"unexpected keys: {_some(result.unexpected_keys)}")
    return _loaded(denoiser, lora.kind)


def _loaded(denoiser: nn.Module, kind: Kind) -> LoraFile:
    """The adapter that sits on a model's layers."""
    from peft import get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {name: module for name, module in denoiser.named_modules() if isinstance(module, BaseTunerLayer)}
    if not layers:
        raise ValueError("no layer took any of it")
    tensors = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER)
    if missing := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise ValueError(f"nothing was loaded for {_some(missing)}")
    ranks = {name: int(layer.r[ADAPTER]) for name, layer in layers.items()}
    alphas = {name: layer.scaling[ADAPTER] * ranks[name] for name, layer in layers.items()}
    return LoraFile(tensors=tensors, kind=kind, ranks=ranks, alphas=alphas)


def _compare(loader: str, lora: LoraFile, back: LoraFile, dtype: torch.dtype) -> None:
    """Both must act on the same layers and add the same to each.

    What a layer adds is the scale times a product of its tensors, so a loader may move a factor from one to another:
    each tensor must be a multiple of the original, and the multiples must make up for the scale.
    """
    if set(lora.ranks) != set(back.ranks):
        counts = f"{len(back.ranks)} layers, {len(lora.ranks)} were exported"
        raise NotProvenError(
            f"{loader} loads it on {counts}; they differ in {_some(set(lora.ranks) ^ set(back.ranks))}"
        )
    mine, theirs = by_module(lora.tensors), by_module(back.tensors)
    precision = torch.finfo(dtype).eps
    for name, parts in mine.items():
        scale, slack = back.scale(name), 0.0
        for part in set(parts) & set(theirs[name]):
            multiple = _multiple(parts[part], theirs[name][part], dtype)
            if multiple is None or (part == MAGNITUDE and abs(multiple[0] - 1) > precision):
                raise NotProvenError(f"{loader} loads other values for {name}.{part} than were exported")
            if part != MAGNITUDE:
                factor, uncertain = multiple
                scale, slack = scale * factor, slack * (abs(factor) + uncertain) + abs(scale) * uncertain
        if (set(parts) ^ set(theirs[name])) - {MAGNITUDE, DORA_SCALE}:
            raise NotProvenError(f"{loader} loads {sorted(theirs[name])} for {name}, exported were {sorted(parts)}")
        if abs(scale - lora.scale(name)) > 4 * precision * lora.scale(name) + slack:
            trained = f"{lora.scale(name):.6g} (alpha / rank)"
            raise NotProvenError(f"{loader} scales {name} by {scale:.6g}, it was trained with {trained}")


def _multiple(mine: Tensor, theirs: Tensor, dtype: torch.dtype) -> tuple[float, float] | None:
    """The factor between two tensors that are else equal to within the rounding of `dtype`; None if there is none.

    With it comes how far that rounding may have put it off, which is much where `dtype` hardly holds the values: a
    moving average after a few steps has numbers around 1e-8, of which fp16 makes 0 or 6e-8.
    """
    a, b = mine.detach().cpu().float(), theirs.detach().cpu().float()
    if a.numel() != b.numel():
        return None
    b = b.reshape(a.shape)
    square = a.square().sum(dtype=torch.float64)
    factor = float((a * b).sum(dtype=torch.float64) / square) if square > 0 else 1.0
    limits = torch.finfo(dtype)
    tiny = limits.smallest_normal * limits.eps  # the step between the smallest values: 6e-8 in fp16
    close = (b - factor * a).abs() <= 4 * limits.eps * abs(factor) * a.abs() + tiny
    uncertain = float(tiny * a.abs().sum(dtype=torch.float64) / square) if square > 0 else 0.0
    return (factor, uncertain) if bool(close.all()) else None


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without a library's warnings: what they are about is checked here, layer by layer."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
