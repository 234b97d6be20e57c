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
from types import SimpleNamespace
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from detour import UserError
from detour.export.reading import added_shape, parse
from detour.lora_formats import (
    DORA_SCALE,
    MAGNITUDE,
    LoraFile,
    by_module,
    diffusers_refuses,
    file_part,
    is_flat,
    module_key,
    peft_options,
)
from detour.nn.fused import take_apart
from detour.nn.quiet import quiet_imports, without_bars
from detour.nn.together import Together
from detour.weights import read_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from detour.archs.base import ArchSpec
    from detour.export.reading import Shapes
    from detour.lora_formats import BaseWeight, Format, Kind

_Value = TypeVar("_Value")
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
        module = denoiser.get_submodule(denoiser.from_file(name) if isinstance(denoiser, Together) else name)
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
    if not spec.diffusers_loader and fmt == "diffusers":
        return "PEFT", _through_peft(own, shapes, stored=read_tensors(path)[0])
    renamed = is_flat(fmt, spec) or fmt in spec.lora_keys.original_in  # by loaders that know LoRA's tensors alone
    unread = own.kind not in spec.diffusers_kinds or (own.kind == "lokr" and renamed)
    if unread or not spec.diffusers_loader or diffusers_refuses(own, spec, fmt):
        return "PEFT", _through_peft(own, shapes)
    back = _through_diffusers(path, own, spec, shapes)
    if fmt in spec.lora_keys.original_in:
        back = _apart(back, spec)
    return f"diffusers.loaders.{spec.diffusers_loader}", back


def _keys(lora: LoraFile, spec: ArchSpec, fmt: Format) -> set[str]:
    """The keys that a format's readers look for, by their rules."""
    keys = set()
    for module, parts in by_module(lora.tensors).items():
        written = [DORA_SCALE if part == MAGNITUDE and fmt == "comfy" else part for part in parts]
        endings = [file_part(part, spec, fmt) for part in written]
        endings += ["alpha"] if fmt != "diffusers" and fmt in spec.lora_keys.alpha_in else []
        keys |= {f"{module_key(module, spec, fmt)}.{ending}" for ending in endings}
    return keys


class _Part(nn.Module):
    """A module whose parts may be had by their number, as those of a list."""

    def __getitem__(self, index: int) -> nn.Module:
        return self.get_submodule(str(index))


class _StandIn(nn.Module):
    """Linear layers of given names and sizes, each of whose weights is one zero seen out x in times."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        for name, (out, inside) in shapes.items():
            *parents, last = name.split(".")
            module: nn.Module = self
            for parent in parents:
                if parent not in dict(module.named_children()):
                    module.add_module(parent, _Part())
                module = module.get_submodule(parent)
            linear = nn.Linear(inside, out, bias=False, device="meta")
            linear.weight = nn.Parameter(torch.zeros(()).expand(out, inside), requires_grad=False)
            module.add_module(last, linear)


def _clip(shapes: Shapes, *, projects: bool) -> nn.Module:
    """A text encoder of transformers with layers of these sizes, whose weights are one zero seen many times."""
    with quiet_imports():
        from accelerate import init_empty_weights
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    width = shapes["encoder.layers.0.self_attn.q_proj"][1]
    config = CLIPTextConfig(
        hidden_size=width,
        projection_dim=width,
        intermediate_size=shapes["encoder.layers.0.mlp.fc1"][0],
        num_hidden_layers=len({name.split(".")[2] for name in shapes if name.startswith("encoder.layers.")}),
        num_attention_heads=1,
    )
    with init_empty_weights(include_buffers=False):
        model: nn.Module = (CLIPTextModelWithProjection if projects else CLIPTextModel)(config)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False))
    return model


def _through_diffusers(path: Path, own: LoraFile, spec: ArchSpec, shapes: Shapes) -> LoraFile:
    """What `pipeline.load_lora_weights` makes of a file."""
    with quiet_imports():
        from diffusers import loaders
        from diffusers.loaders.peft import PeftAdapterMixin

    class Denoiser(_StandIn, PeftAdapterMixin):  # type: ignore[misc]
        # Asked of UNets, to count blocks in the original names, and of Wan, whether it starts from pictures.
        config = SimpleNamespace(layers_per_block=2, image_dim=None)

    keys = spec.lora_keys
    of: dict[str, dict[str, tuple[int, int]]] = {component: {} for component in ("", *keys.text)}
    for name, shape in shapes.items():
        component = keys.text_model_of(name)
        of[component][name.removeprefix(f"{component}.")] = shape
    denoiser = Denoiser(of[""])
    parts: dict[str, nn.Module | None] = {name: None for name in spec.components if name.startswith("text_encoder")}
    told = [component for component in keys.text if any(keys.text_model_of(name) == component for name in own.modules)]
    encoders = {component: _clip(of[component], projects=component.endswith("_2")) for component in told}
    parts |= encoders | {spec.denoiser: denoiser}

    class Pipeline(getattr(loaders, spec.diffusers_loader)):  # type: ignore[misc]
        hf_device_map = None
        components: ClassVar[dict[str, nn.Module | None]] = parts

    pipeline = Pipeline()
    for name, part in parts.items():
        setattr(pipeline, name, part)
    with _quiet("diffusers"), _quiet("peft"), without_bars():
        pipeline.load_lora_weights(str(path), adapter_name=ADAPTER, low_cpu_mem_usage=True, local_files_only=True)
    on_denoiser = any(not keys.text_model_of(name) for name in own.modules)
    found = _loaded(denoiser, own.kind) if on_denoiser else LoraFile(tensors={}, kind=own.kind, ranks={}, alphas={})
    for component, encoder in encoders.items():
        back = _loaded(encoder, own.kind)
        found.tensors.update(_on(component, back.tensors))
        found.ranks.update(_on(component, back.ranks))
        found.alphas.update(_on(component, back.alphas))
    return found


def _on(component: str, named: Mapping[str, _Value]) -> dict[str, _Value]:
    """By the names that layers of a text encoder have in a `LoraFile`."""
    return {f"{component}.{name.removeprefix('text_model.')}": value for name, value in named.items()}


def _through_peft(lora: LoraFile, shapes: Shapes, stored: dict[str, Tensor] | None = None) -> LoraFile:
    """What PEFT's own functions make of an adapter.

    `stored` are the tensors of a file as they are, to be loaded on a `PeftModel`, whose names must be theirs.
    """
    with quiet_imports():
        from peft import (
            LoHaConfig,
            LoKrConfig,
            LoraConfig,
            get_peft_model,
            inject_adapter_in_model,
            set_peft_model_state_dict,
        )

    config = {"lokr": LoKrConfig, "loha": LoHaConfig}.get(lora.kind, LoraConfig)(**peft_options(lora))
    model: nn.Module = _StandIn(shapes)
    denoiser = model
    if stored is None:
        inject_adapter_in_model(config, denoiser, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    else:
        model = get_peft_model(denoiser, config, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    result = set_peft_model_state_dict(model, stored or lora.tensors, ADAPTER, low_cpu_mem_usage=True)
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


def _apart(back: LoraFile, spec: ArchSpec) -> LoraFile:
    """An adapter as it was before its layers became one: a loader gives each of them all ranks of the whole."""
    assert spec.lora_keys.original is not None
    modules, origins = by_module(back.tensors), dict[str, list[str]]()
    for name in modules:
        origins.setdefault(spec.lora_keys.original.origin(name), []).append(name)
    found = {name: dict(parts) for name, parts in modules.items()}
    for origin, names in origins.items():
        held = spec.lora_keys.original.find(origin)
        if held is None or len(held.layers) == 1 or set(names) != set(held.layers):
            continue
        A, *others = (modules[name]["lora_A.weight"] for name in held.layers)
        if not all(torch.equal(A, other) for other in others):
            continue
        B = torch.cat([modules[name]["lora_B.weight"] for name in held.layers])
        for name, own in zip(held.layers, take_apart({"lora_A.weight": A, "lora_B.weight": B}, held), strict=True):
            if own is None:
                del found[name]
            else:
                found[name] |= own
    ranks = {name: parts["lora_A.weight"].shape[0] for name, parts in found.items()}
    return LoraFile(
        tensors={f"{name}.{part}": tensor for name, parts in found.items() for part, tensor in parts.items()},
        kind=back.kind,
        ranks=ranks,
        alphas={name: back.scale(name) * rank for name, rank in ranks.items()},
    )


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
        if not all(bool(tensor.any()) for tensor in parts.values()):
            continue  # adds nothing at any scale, such as a layer that never got a gradient
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
