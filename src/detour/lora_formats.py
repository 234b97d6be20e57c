"""LoRA files: the formats that people exchange, and the one form that is used inside.

Inside, a LoRA is a `LoraFile`: PEFT's tensor names without prefix and adapter name, with rank and alpha of each module.
Weights are kept as they were trained; what they add to a layer is scaled by alpha / rank. Formats differ in how they
say alpha, and that is where files load silently wrong (tried with diffusers 0.42.1 and PEFT 0.21.2, read in ComfyUI):

| format    | keys                                                    | alpha                                         |
|-----------|---------------------------------------------------------|-----------------------------------------------|
| comfy     | `diffusion_model.<module>.lora_A.weight`, `lora_B`      | `<module>.alpha`; without it alpha = rank     |
| diffusers | `transformer.<module>.lora_A.weight`, `lora_B`          | JSON in the header; an `.alpha` key is refused |
| kohya     | `lora_unet_<module with _>.lora_down.weight`, `lora_up` | `<module>.alpha`; without it alpha = rank     |

- LoKr with both factors whole: PEFT scales it, every other loader does not, so the scale is folded into `lokr_w1`.
- DoRA: diffusers drops `dora_scale` and draws another picture, but reads PEFT's `lora_magnitude_vector`. ComfyUI's
  `dora_scale` is relative to the norm of W, PEFT's magnitude is the norm of W + dW itself, so the ratio of the two
  norms is folded in, for which W must be at hand.
- LoHa: diffusers refuses it, ComfyUI reads it.
- kohya's names: ComfyUI does not map `lora_unet_..._to_q` (and k, v, out) of Z-Image, so it loads the rest alone.
- Stable Diffusion: ComfyUI does not read diffusers' layers under `diffusion_model.`, but under kohya's names, so its
  format has those, with every kind of adapter; diffusers reads LoRA and DoRA alone.
- Original names: ComfyUI knows some models' layers by the names of their original program alone, and so do diffusers'
  loaders of files that begin with `diffusion_model.`. Layers that are one there (q, k and v) are put together and taken
  apart without loss (`nn.fused`). Some of those loaders refuse alpha, or files without every layer of a block.
- What each architecture has is in its spec (`archs.base.LoraKeys`): tables of names, formats, alpha.

Shapes: O out features, I in features, R rank.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from detour import UserError
from detour.nn.fused import put_together
from detour.nn.lora_keys import LoraFormat
from detour.nn.original import Held

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from detour.archs.base import ArchSpec
    from detour.config.job import NetworkConfig

    BaseWeight = Callable[[str], Tensor]
    """The frozen weight (O, I) of a module, by its name."""

Kind = Literal["lora", "dora", "lokr", "loha"]
Format = LoraFormat

MAGNITUDE = "lora_magnitude_vector"
"""DoRA's norms as PEFT names them in files and `nn.lora.state` does."""
DORA_SCALE = "dora_scale"
"""DoRA's norms as ComfyUI reads them: only in files, and not to be turned back without the model's weights."""

_KOHYA_PARTS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
_PART = re.compile(
    r"^(?P<module>.+?)\.(?P<part>lora_[AB]\.weight|lora_magnitude_vector|dora_scale|lokr_w[12](_[ab])?|hada_w[12]_[ab])$"
)
_REQUIRED: dict[Kind, tuple[frozenset[str], ...]] = {
    "lora": (frozenset({"lora_A.weight", "lora_B.weight"}),),
    "dora": tuple(frozenset({"lora_A.weight", "lora_B.weight", norm}) for norm in (MAGNITUDE, DORA_SCALE)),
    "lokr": tuple(
        frozenset(w1 + w2)
        for w1 in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for w2 in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    ),
    "loha": (frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),),
}
"""The tensors that a module has, for each kind of adapter (LoKr's factors may each be whole or a product)."""

_UNSUPPORTED: dict[tuple[Kind, Format], str] = {
    ("loha", "diffusers"): "diffusers loads LoRA, DoRA and LoKr, but refuses a LoHa",
    ("dora", "kohya"): "diffusers drops the norms of a DoRA in kohya's keys and draws another picture",
    ("lokr", "kohya"): "no loader finds the layers of a LoKr under kohya's names",
    ("loha", "kohya"): "no loader finds the layers of a LoHa under kohya's names",
}
_UNSUPPORTED_FLAT = {("dora", "kohya"): _UNSUPPORTED["dora", "kohya"]}
"""The same where ComfyUI reads kohya's names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraFile:
    """An adapter of any kind, in the form used inside."""

    tensors: dict[str, Tensor]
    """By PEFT's name without prefix and adapter name: `layers.0.attention.to_q.lora_A.weight`. Those of a text encoder
    have its component before them, and no `text_model.`: `text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight`."""
    kind: Kind
    ranks: dict[str, int]
    """Module -> rank. Nominal for a LoKr with whole factors."""
    alphas: dict[str, float]
    """Module -> alpha; what the module adds is scaled by alpha / rank."""
    format: Format | Literal["peft"] | None = None
    """What it was read from."""
    metadata: dict[str, str] = field(default_factory=dict)
    """The file's header as it stands."""
    notes: tuple[str, ...] = ()
    """What a reader should know: assumptions that were made, features that are missing."""

    @property
    def modules(self) -> list[str]:
        """Names of the layers it acts on."""
        return list(self.ranks)

    @property
    def rank(self) -> int:
        """The rank that most modules have."""
        return int(_usual(self.ranks.values()))

    @property
    def alpha(self) -> float:
        """The alpha that most modules of that rank have."""
        return _usual(self.alphas[name] for name, rank in self.ranks.items() if rank == self.rank)

    def scale(self, module: str) -> float:
        """What the module adds is multiplied by this."""
        return self.alphas[module] / self.ranks[module]

    def for_training(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Tensors and scales as `nn.lora.load_pretrained` takes them. UserError for a DoRA that is not PEFT's."""
        if any(name.endswith(f".{DORA_SCALE}") for name in self.tensors):
            raise UserError(
                "this DoRA's norms are written for ComfyUI and cannot be turned back without the model's weights, so "
                "training cannot start from it; take the file in the format diffusers"
            )
        return self.tensors, {module: self.scale(module) for module in self.modules}


def from_training(tensors: Mapping[str, Tensor], network: NetworkConfig) -> LoraFile:
    """The adapter as it is trained: tensors named as by `nn.lora.state`, one rank and alpha for all modules."""
    if network.type == "full":
        raise ValueError("a full fine-tune has no adapter; see export_full")
    modules = by_module(tensors)
    for name, parts in modules.items():
        found = kind_of(parts)
        if found != network.type:
            raise ValueError(f"{name} holds {sorted(parts)}, which is no {network.type}")
    alpha = network.linear if network.linear_alpha is None else network.linear_alpha
    return LoraFile(
        tensors=dict(tensors),
        kind=network.type,
        ranks=dict.fromkeys(modules, network.linear),
        alphas=dict.fromkeys(modules, float(alpha)),
    )


def by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Module -> part (`lora_A.weight`) -> tensor. ValueError for names that are not as in `LoraFile.tensors`."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _PART.match(name)
        if match is None:
            raise ValueError(f"{name}: not the name of an adapter's tensor")
        modules.setdefault(match["module"], {})[match["part"]] = tensor
    return modules


def kind_of(parts: Iterable[str]) -> Kind | None:
    """The kind of adapter whose module has exactly these tensors."""
    return next((kind for kind, allowed in _REQUIRED.items() if frozenset(parts) in allowed), None)


def whole(parts: Iterable[str]) -> bool:
    """Is this a LoKr module with both factors stored whole? Only PEFT scales such a module by alpha / rank."""
    return {"lokr_w1", "lokr_w2"} <= set(parts)


def with_adapter(W_OI: Tensor, parts: Mapping[str, Tensor], scale: float, strength: float = 1.0) -> Tensor:
    """A layer's weight with a module of an adapter merged in, float32. `scale` is its alpha / rank.

    A strength other than 1 goes that part of the way from the weight to the merged one.
    """
    given = {part: tensor.to(W_OI.device).float() for part, tensor in parts.items()}
    kind = kind_of(parts)
    if kind == "lokr":
        left, right = (_whole_factor(given, factor) for factor in ("lokr_w1", "lokr_w2"))
        merged_OI = W_OI + scale * torch.kron(left, right)
    elif kind == "loha":
        first, second = (given[f"hada_w{n}_a"] @ given[f"hada_w{n}_b"] for n in (1, 2))
        merged_OI = W_OI + scale * first * second
    else:
        merged_OI = W_OI + scale * (given["lora_B.weight"] @ given["lora_A.weight"])
    if MAGNITUDE in given:
        norm_O = torch.linalg.vector_norm(merged_OI, dim=1)
        merged_OI = merged_OI * (given[MAGNITUDE] / norm_O)[:, None]
    elif DORA_SCALE in given:  # relative to the norms of the weight itself, see `_for_comfy`
        merged_OI = merged_OI * (given[DORA_SCALE] / torch.linalg.vector_norm(W_OI, dim=1)[:, None])
    return W_OI + strength * (merged_OI - W_OI)


def _whole_factor(parts: Mapping[str, Tensor], factor: str) -> Tensor:
    return parts[factor] if factor in parts else parts[f"{factor}_a"] @ parts[f"{factor}_b"]


def unsupported(kind: Kind, fmt: Format, spec: ArchSpec) -> str | None:
    """Why a kind of adapter of an architecture cannot be carried by a format, or None where it can."""
    if (reason := _reason(kind, fmt, spec)) is None:
        return None
    able = [other for other in get_args(Format) if _reason(kind, other, spec) is None]
    advice = f"use {' or '.join(able)}" if able else f"no other format carries one of {spec.title} either"
    return f"{kind} in the format {fmt}: {reason}; {advice}"


def _reason(kind: Kind, fmt: Format, spec: ArchSpec) -> str | None:
    if fmt not in spec.lora_keys.formats:
        return f"no loader reads a LoRA of {spec.title} under such names"
    original = spec.lora_keys.original
    if kind == "lokr" and fmt in spec.lora_keys.original_in and original is not None and original.fuses:
        return f"layers of {spec.title} are one layer under such names, which LoKrs of them cannot become"
    if fmt == "diffusers" and spec.diffusers_loader and kind not in spec.diffusers_kinds:
        return f"diffusers refuses a {kind} of {spec.title}"
    return (_UNSUPPORTED_FLAT if is_flat("comfy", spec) else _UNSUPPORTED).get((kind, fmt))


def is_flat(fmt: Format, spec: ArchSpec) -> bool:
    """Does a format write names in kohya's way: underscores for dots, `lora_down` and `lora_up`?"""
    return fmt == "kohya" or (fmt == "comfy" and spec.lora_keys.comfy_prefix.endswith("_"))


def to_format(
    lora: LoraFile,
    spec: ArchSpec,
    fmt: Format,
    *,
    dtype: torch.dtype | None = None,
    base_weight: BaseWeight | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and format-specific header of a file in a format; `dtype` None keeps each tensor's.

    `base_weight` is needed for a DoRA in the comfy format. UserError where the format cannot carry the adapter, or the
    dtype its values.
    """
    if (reason := unsupported(lora.kind, fmt, spec)) is not None:
        raise UserError(reason)
    if fmt != "comfy" and any(name.endswith(f".{DORA_SCALE}") for name in lora.tensors):
        raise UserError(
            f"this DoRA's norms are written for ComfyUI and cannot be turned back without the model's weights, so not "
            f"into the format {fmt}. Start from a file that was saved in that format (save.formats: [{fmt}])"
        )
    modules = by_module(lora.tensors)
    if fmt != "diffusers":
        modules = {name: _for_comfy(lora, name, parts, base_weight) for name, parts in modules.items()}
    file: dict[str, Tensor] = {}
    for stem, (parts, alpha) in _stems(lora, modules, spec, fmt).items():
        for part, tensor in parts.items():
            file[f"{stem}.{file_part(part, spec, fmt)}"] = _cast(f"{stem}.{part}", tensor, dtype)
        if alpha is not None:
            file[f"{stem}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    return file, _diffusers_header(lora, spec) if fmt == "diffusers" else {}


def _stems(
    lora: LoraFile, modules: Mapping[str, dict[str, Tensor]], spec: ArchSpec, fmt: Format
) -> dict[str, tuple[dict[str, Tensor], float | None]]:
    """What stands in a file under each module's name there: tensors, and alpha where the format has it."""
    keys, groups = spec.lora_keys, dict[str, list[str]]()
    for module in modules:
        groups.setdefault(module_key(module, spec, fmt), []).append(module)
    found: dict[str, tuple[dict[str, Tensor], float | None]] = {}
    for stem, members in groups.items():
        held = _held(members[0], spec, fmt)
        if set(members) - set(held.layers):
            raise ValueError(f"{fmt}: {', '.join(members)} have the same name in this format")
        parts, scale, alpha = _united(lora, modules, held)
        if fmt != "diffusers" and fmt not in keys.alpha_in and not whole(parts):
            parts = _multiplied(parts, scale)
        found[stem] = (parts, alpha if fmt in keys.alpha_in else None)
    return found


def _held(module: str, spec: ArchSpec, fmt: Format) -> Held:
    """The layers that stand in a file together with this one."""
    keys = spec.lora_keys
    if keys.original is None or fmt not in keys.original_in:
        return Held((module,), (1,))
    return keys.original.find(keys.original.origin(module)) or Held((module,), (1,))


def _united(
    lora: LoraFile, modules: Mapping[str, dict[str, Tensor]], held: Held
) -> tuple[dict[str, Tensor], float, float]:
    """The module of a layer, or of several that are one in the file, with its scale and its alpha."""
    there = [name for name in held.layers if name in modules]
    scales = {lora.scale(name) for name in there}
    if len(held.layers) == 1:
        return put_together([modules[there[0]]], held), lora.scale(there[0]), lora.alphas[there[0]]
    own = {name: modules[name] if len(scales) == 1 else _multiplied(modules[name], lora.scale(name)) for name in there}
    try:
        parts = put_together([own.get(name) for name in held.layers], held)
    except ValueError as error:
        raise UserError(f"{error}; train them together, or use the format diffusers") from error
    scale = scales.pop() if len(scales) == 1 else 1.0
    rank = next(parts[name].shape[0] for name in ("lora_A.weight", "hada_w1_b") if name in parts)
    return parts, scale, scale * rank


def _multiplied(parts: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A module that adds `scale` times as much."""
    factor = next(name for name in ("lora_B.weight", "lokr_w1", "lokr_w1_a", "hada_w1_a") if name in parts)
    return parts if scale == 1 else parts | {factor: (parts[factor].float() * scale).to(parts[factor].dtype)}


def module_key(module: str, spec: ArchSpec, fmt: Format) -> str:
    """A module's name in a file. Several layers that are one in the original layout have the same."""
    keys = spec.lora_keys
    if component := keys.text_model_of(module):
        layer = f"text_model.{module.removeprefix(f'{component}.')}"  # as in every file, whatever the class has
        return keys.text[component] + layer.replace(".", "_") if is_flat(fmt, spec) else f"{component}.{layer}"
    if keys.original is not None and fmt in keys.original_in:
        module = keys.original.origin(module)
    if is_flat(fmt, spec):
        return kohya_prefix(keys.kohya_prefix) + module.replace(".", "_")
    return dotted(keys.comfy_prefix if fmt == "comfy" else keys.diffusers_prefix) + module


def dotted(prefix: str) -> str:
    """A prefix of dotted names, ending in its dot."""
    return prefix.rstrip(".") + "." if prefix else ""


def kohya_prefix(prefix: str) -> str:
    """A prefix of kohya's names, ending in its underscore."""
    return prefix.rstrip("_") + "_"


def file_part(part: str, spec: ArchSpec, fmt: Format) -> str:
    """The name of a module's tensor in a file."""
    return _KOHYA_PARTS.get(part, part) if is_flat(fmt, spec) else part


def _for_comfy(
    lora: LoraFile, module: str, parts: dict[str, Tensor], base_weight: BaseWeight | None
) -> dict[str, Tensor]:
    """A module's tensors as ComfyUI, and whoever reads kohya's names, computes with them."""
    if whole(parts):
        return _multiplied(parts, lora.scale(module))  # loaders do not scale whole factors
    if MAGNITUDE not in parts:
        return parts
    if base_weight is None:
        raise UserError(
            f"{module}: a DoRA in the format comfy needs the model's weights, as ComfyUI counts its norms relative to "
            f"theirs. Save it from training (save.formats: [comfy]), or use the format diffusers"
        )
    W_OI = base_weight(module).detach().float()
    A_RI, B_OR = (parts[part].detach().to(W_OI.device).float() for part in ("lora_A.weight", "lora_B.weight"))
    norm_O = torch.linalg.vector_norm(W_OI + lora.scale(module) * (B_OR @ A_RI), dim=1)
    relative_O = torch.linalg.vector_norm(W_OI, dim=1) / norm_O
    scale_O = parts[MAGNITUDE].detach().to(W_OI.device).float() * relative_O
    rest = {part: tensor for part, tensor in parts.items() if part != MAGNITUDE}
    return rest | {DORA_SCALE: scale_O[:, None]}


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    value = tensor.detach().to(device="cpu", dtype=dtype)
    if torch.isfinite(value).all():
        return value
    if not torch.isfinite(tensor).all():
        raise UserError(f"{name} holds values that are not finite; this adapter cannot be used. Take an earlier save")
    largest = tensor.detach().abs().max().item()
    raise UserError(f"{name} holds values up to {largest:.3g}, too much for {dtype}; set save.dtype to bf16 or fp32")


def diffusers_refuses(lora: LoraFile, spec: ArchSpec, fmt: Format) -> str | None:
    """Why diffusers' loader does not take an adapter in a format that ComfyUI reads, or None where it does."""
    asked = spec.lora_keys.whole_blocks
    if asked is None or fmt not in asked.formats:
        return None
    blocks: dict[tuple[str, int], set[str]] = {}
    for module, parts in by_module(lora.tensors).items():
        rows = next((rows for ending, rows in asked.rows.items() if module.endswith(f".{ending}")), None)
        if rows is not None and parts["lora_B.weight"].shape[0] != rows:
            return f"it knows the published sizes only, of which {module} is not"
        name = module if spec.lora_keys.original is None else spec.lora_keys.original.origin(module)
        match = re.fullmatch(r"([^.]+)\.(\d+)\.(.+)", name)
        if match is None or match[1] not in asked.layers:
            return f"it does not know {module} there"
        blocks.setdefault((match[1], int(match[2])), set()).add(match[3])
    for (kind, index), layers in blocks.items():
        if layers != set(asked.layers[kind]) or (index and (kind, index - 1) not in blocks):
            return f"it asks for every layer of every block, and some of {kind}.{index} (or all before it) are missing"
    return None


def _diffusers_header(lora: LoraFile, spec: ArchSpec) -> dict[str, str]:
    """The `lora_adapter_metadata` from which diffusers builds PEFT's configuration; without it alpha would be lost."""
    packed: dict[str, Any] = {}
    for component in sorted({spec.lora_keys.text_model_of(module) for module in lora.modules}):
        prefix = f"{component}." if component else dotted(spec.lora_keys.diffusers_prefix)
        options = peft_options(of_component(lora, spec, component))
        if component:  # some classes of transformers have `text_model.` before their layers
            for pattern in ("rank_pattern", "alpha_pattern"):
                options[pattern] = {name.removeprefix("^"): value for name, value in options[pattern].items()}
        packed |= {prefix + option: value for option, value in options.items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(packed, indent=2, sort_keys=True)}


def of_component(lora: LoraFile, spec: ArchSpec, component: str) -> LoraFile:
    """The part of an adapter that is on a text encoder (empty: on the denoiser), by the component's own names."""
    start = f"{component}." if component else ""
    own = [module for module in lora.modules if spec.lora_keys.text_model_of(module) == component]
    tensors = {name: tensor for name, tensor in lora.tensors.items() if spec.lora_keys.text_model_of(name) == component}
    return replace(
        lora,
        tensors={name.removeprefix(start): tensor for name, tensor in tensors.items()},
        ranks={module.removeprefix(start): lora.ranks[module] for module in own},
        alphas={module.removeprefix(start): lora.alphas[module] for module in own},
    )


def peft_options(lora: LoraFile) -> dict[str, Any]:
    """Arguments of PEFT's `LoraConfig`, `LoKrConfig` or `LoHaConfig` that give this adapter's layers."""
    if lora.kind == "lokr":
        return _lokr_options(lora)
    options = {
        "r": lora.rank,
        "rank_pattern": _pattern(lora.ranks, lora.rank),
        "alpha_pattern": _pattern(lora.alphas, lora.alpha),
        "target_modules": sorted(lora.modules),
    }
    if lora.kind == "loha":
        return options | {"alpha": _number(lora.alpha)}
    return options | {"lora_alpha": _number(lora.alpha), "use_dora": lora.kind == "dora"}


def _lokr_options(lora: LoraFile) -> dict[str, Any]:
    """PEFT chooses the form of each factor from the rank, so a whole right factor needs one as large as its side."""
    modules = by_module(lora.tensors)
    ranks = {
        name: max(parts["lokr_w2"].shape) if "lokr_w2" in parts else lora.ranks[name] for name, parts in modules.items()
    }
    alphas = {name: lora.scale(name) * rank for name, rank in ranks.items()}
    rank, alpha = _usual(ranks.values()), _usual(alphas.values())
    return {
        "r": _number(rank),
        "alpha": _number(alpha),
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
        "target_modules": sorted(modules),
        "decompose_both": any("lokr_w1_a" in parts for parts in modules.values()),
        "decompose_factor": _decompose_factor(modules),
    }


def _decompose_factor(modules: dict[str, dict[str, Tensor]]) -> int:
    """The one factor from which PEFT splits every layer's sides as they are split here."""
    from peft.tuners.lokr.layer import factorization

    sides: set[tuple[int, int]] = set()
    for parts in modules.values():
        (left_o, left_i), (right_o, right_i) = (lokr_shape(parts, factor) for factor in ("lokr_w1", "lokr_w2"))
        sides |= {(left_o, right_o), (left_i, right_i)}
    for factor in (-1, *sorted({left for left, _ in sides})):
        if all(factorization(left * right, factor) == (left, right) for left, right in sides):
            return factor
    raise UserError(
        "this LoKr splits its layers in ways that no single factor gives; the format diffusers cannot say so, use comfy"
    )


def lokr_shape(parts: Mapping[str, Tensor], factor: str) -> tuple[int, int]:
    """Shape of a LoKr factor (`lokr_w1`, `lokr_w2`), stored whole or as a product."""
    if factor in parts:
        return (parts[factor].shape[0], parts[factor].shape[1])
    return (parts[f"{factor}_a"].shape[0], parts[f"{factor}_b"].shape[1])


def _usual(values: Iterable[float]) -> float:
    """The most frequent value, the largest of several: the same whatever their order."""
    return max(Counter(values).items(), key=lambda item: (item[1], item[0]))[0]


def _pattern(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """PEFT's exceptions: a regular expression for each module that differs from the usual value."""
    return {f"^{re.escape(name)}": _number(value) for name, value in values.items() if value != usual}


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value
