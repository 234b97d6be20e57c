"""Reads a LoRA of any format into the form used inside, and refuses what a loader would silently read wrong.

Each layer's name must be one that the architecture has: bare names, other architectures' files and text encoder weights
are errors that say what the file looks like. What had to be assumed (alpha) is said in `LoraFile.notes`.
"""

from __future__ import annotations

import json
import math
import re
from functools import cache
from itertools import count
from typing import TYPE_CHECKING, Any, Literal, cast

from detour import UserError
from detour.lora_formats import (
    DORA_SCALE,
    MAGNITUDE,
    Format,
    Kind,
    LoraFile,
    dotted,
    is_flat,
    kind_of,
    kohya_prefix,
    lokr_shape,
)
from detour.nn.families import guess
from detour.nn.fused import take_apart
from detour.nn.original import Held
from detour.weights import find_file, read_tensors

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from pathlib import Path

    from torch import Tensor

    from detour.archs.base import ArchSpec

    Shapes = Mapping[str, tuple[int, int]]
    """(out, in) features of each linear layer of the denoiser, by name."""

_SOURCE = Format | Literal["peft"]
_KEY = re.compile(
    r"^(?P<stem>.+?)\.(?P<part>lora_[AB](?:\.default)?\.weight|lora_(?:down|up)\.weight|lora\.(?:down|up)\.weight|alpha"
    r"|dora_scale|lora_magnitude_vector(?:\.default)?(?:\.weight)?|lokr_w[12](?:_[ab])?|hada_w[12]_[ab])$"
)
_SAME = {
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "lora.down.weight": "lora_A.weight",
    "lora.up.weight": "lora_B.weight",
    "lora_A.default.weight": "lora_A.weight",
    "lora_B.default.weight": "lora_B.weight",
}
_PAIRS = (
    ("lora_A.weight", "lora_B.weight"),
    ("hada_w1_b", "hada_w1_a"),
    ("hada_w2_b", "hada_w2_a"),
    ("lokr_w1_b", "lokr_w1_a"),
    ("lokr_w2_b", "lokr_w2_a"),
)
"""Factors of a product: the first one's rows are as many as the second one's columns."""
_ADAPTER_LIKE = re.compile(r"lora|lokr|hada|dora|\.alpha$|\.diff(_b)?$")
_TEXT_ENCODER = re.compile(r"^(text_encoder|lora_te\d?_|text_encoders|te\d?\.)")


def read_lora(path: Path, spec: ArchSpec, shapes: Shapes | None = None) -> LoraFile:
    """A LoRA, DoRA, LoKr or LoHa of this architecture from a file in any format.

    `shapes` are the layers of the model at hand; without them a layer's name must fit the architecture's pattern, and
    nothing is known of sizes. UserError for anything that is not wholly understood.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return parse(path, *read_tensors(find_file(str(path), what="LoRA")), spec, shapes)


def parse(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], spec: ArchSpec, shapes: Shapes | None
) -> LoraFile:
    """As `read_lora`, of a file's content; `path` is for messages."""
    stems = _split(path, tensors, spec)
    source, names = _modules(path, stems, spec, shapes, metadata)
    modules, given = _by_layer(path, stems, names)
    kind = _kind(path, modules)
    for name, parts in modules.items():
        _check_shapes(path, name, parts, kind, shapes)
    ranks, alphas, notes = _scales(path, modules, given, _headers(path, metadata, spec, source))
    without = source in ("comfy", "kohya") and source not in spec.lora_keys.alpha_in  # as this program writes it
    if without and not given:
        notes = []
    if source == "diffusers" and given:
        notes.append("alpha keys under diffusers' names: ComfyUI reads them, diffusers itself refuses this file")
    if (said := metadata.get("ss_network_alpha")) and not given and source in ("comfy", "kohya") and not without:
        notes.append(f"the header says ss_network_alpha {said}, which no loader applies without alpha keys")
    return LoraFile(
        tensors={f"{name}.{part}": tensor for name, parts in modules.items() for part, tensor in parts.items()},
        kind=kind,
        ranks=ranks,
        alphas=alphas,
        format=source,
        metadata=metadata,
        notes=tuple(notes),
    )


def adapter_keys(keys: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Key -> (module as the file names it, canonical part), for the keys that are part of an adapter."""
    found: dict[str, tuple[str, str]] = {}
    for key in keys:
        if (match := _KEY.match(key)) is not None:
            part = match["part"]
            found[key] = (match["stem"], MAGNITUDE if part.startswith(MAGNITUDE) else _SAME.get(part, part))
    return found


def prefixes(spec: ArchSpec) -> dict[str, _SOURCE]:
    """What a module's name may start with in a file, and the format that says."""
    keys = spec.lora_keys
    named: dict[str, _SOURCE] = {
        dotted(keys.diffusers_prefix): "diffusers",
        **({} if is_flat("comfy", spec) else {dotted(keys.comfy_prefix): "comfy"}),
        "base_model.model.": "peft",
        kohya_prefix(keys.kohya_prefix): "kohya",
        "lycoris_": "kohya",
        "lora_transformer_": "kohya",
    }
    if keys.original is not None:
        named.setdefault("diffusion_model.", "comfy")
    return named


def text_prefixes(spec: ArchSpec) -> dict[str, tuple[_SOURCE, str]]:
    """What the name of a text encoder's module may start with in a file: the format that says, and the component."""
    found: dict[str, tuple[_SOURCE, str]] = {}
    for component, kohya in spec.lora_keys.text.items():
        found |= {kohya_prefix(kohya): ("kohya", component), f"{component}.": ("diffusers", component)}
    return found


def _split(path: Path, tensors: Mapping[str, Tensor], spec: ArchSpec) -> dict[str, dict[str, Tensor]]:
    """Module as the file names it -> part -> tensor."""
    keys = adapter_keys(tensors)
    if other := [key for key in tensors if key not in keys]:
        if keys or any(_ADAPTER_LIKE.search(key) for key in other):
            raise UserError(
                f"{path}: {len(other)} tensors are of a kind that is not supported ({_some(other)}); LoRA, DoRA, LoKr "
                f"and LoHa of linear layers are"
            )
        looks = guess(other)
        what = f"the weights of a model ({looks})" if looks else "no adapter's tensors"
        raise UserError(f"{path}: not a LoRA; it holds {what}, such as {_some(other)}")
    if not keys:
        raise UserError(f"{path}: empty; no LoRA of {spec.title}")
    stems: dict[str, dict[str, Tensor]] = {}
    for key, (stem, part) in keys.items():
        parts = stems.setdefault(stem, {})
        if part in parts:
            raise UserError(f"{path}: {stem} has {part} twice, under different names; which one counts is not known")
        parts[part] = tensors[key]
    return stems


def _modules(
    path: Path, stems: Collection[str], spec: ArchSpec, shapes: Shapes | None, metadata: Mapping[str, str]
) -> tuple[_SOURCE, dict[str, Held]]:
    """The file's format, and the denoiser's layers that each of its modules acts on."""
    texts = text_prefixes(spec)
    table = {prefix: source for prefix, (source, _) in texts.items()} | prefixes(spec)
    start = {stem: next((p for p in table if stem.startswith(p)), "") for stem in stems}
    sources = {table.get(prefix) for prefix in start.values()}
    if sources - {None} and None not in sources:
        source = cast("_SOURCE", next(iter(sources)))
        if len(sources) > 1:
            raise UserError(f"{path}: names of several formats in one file ({_some(sorted(stems))}); it is ambiguous")
        # Where formats share a prefix, the header tells diffusers' from the others.
        if "lora_adapter_metadata" in metadata and dotted(spec.lora_keys.diffusers_prefix) in start.values():
            source = "diffusers"
        names = {
            stem: _text_layer(stem.removeprefix(prefix), *texts[prefix], spec, shapes)
            if (prefix := start[stem]) in texts
            else _layers(path, stem.removeprefix(prefix), source, spec, shapes)
            for stem in stems
        }
        if None not in names.values():
            found = cast("dict[str, Held]", names)
            layers = [layer for held in found.values() for layer in held.layers]
            if len(set(layers)) != len(layers):
                raise UserError(f"{path}: two entries name the same layer; it is ambiguous which one counts")
            return source, found
        strange = [stem for stem, held in names.items() if held is None]
    else:
        strange = [stem for stem, prefix in start.items() if not prefix]
    raise UserError(_stranger(path, strange, len(stems), spec))


def _layers(path: Path, name: str, source: _SOURCE, spec: ArchSpec, shapes: Shapes | None) -> Held | None:
    """The denoiser's layers that a name in a file means, or None when there are none."""

    def known(layer: str) -> bool:
        return layer in shapes if shapes is not None else re.fullmatch(spec.lora_all, layer) is not None

    if source != "kohya":
        found = [name] if known(name) else []
    elif shapes is not None:
        found = [layer for layer in shapes if layer.replace(".", "_") == name]
    else:
        found = [layer for layer in [with_dots(name, spec.lora_all)] if layer is not None]
    if len(found) > 1:
        raise UserError(f"{path}: {name} may mean {' or '.join(found)}; kohya's names are ambiguous here")
    if found:
        return Held((found[0],), (1,))
    original = spec.lora_keys.original if source in ("comfy", "kohya") else None
    held = None if original is None else original.find(name)
    return held if held is not None and held.layers and all(known(layer) for layer in held.layers) else None


def _text_layer(name: str, source: _SOURCE, component: str, spec: ArchSpec, shapes: Shapes | None) -> Held | None:
    """The layer of a text encoder that a name in a file means, or None when there is none."""
    layer = name.removeprefix("text_model.")
    if source == "kohya":
        layer = with_dots(name.removeprefix("text_model_"), spec.lora_keys.text_layers) or ""
    full = f"{component}.{layer}"
    fits = re.fullmatch(spec.lora_keys.text_layers, layer) is not None and (shapes is None or full in shapes)
    return Held((full,), (1,)) if fits else None


def _by_layer(
    path: Path, stems: Mapping[str, Mapping[str, Tensor]], names: Mapping[str, Held]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors and alphas by the denoiser's layers: modules that act on several are taken apart."""
    modules: dict[str, dict[str, Tensor]] = {}
    given: dict[str, Tensor] = {}
    for stem, found in stems.items():
        held, parts = names[stem], {part: tensor for part, tensor in found.items() if part != "alpha"}
        for layer, own in zip(held.layers, _taken_apart(path, stem, parts, held), strict=True):
            if own is not None:
                modules[layer] = own
            if own is not None and "alpha" in found:
                share = 1.0 if own is parts else (_rank(own) or 1) / (_rank(parts) or 1)  # the scale stays
                given[layer] = found["alpha"] if share == 1.0 else found["alpha"].double() * share
    return modules, given


def _taken_apart(path: Path, stem: str, parts: dict[str, Tensor], held: Held) -> list[dict[str, Tensor] | None]:
    if len(held.layers) == 1 and not held.swapped:
        return [parts]
    _check_shapes(path, stem, parts, _kind(path, {stem: parts}), None)
    try:
        return take_apart(parts, held)
    except ValueError as error:
        raise UserError(f"{path}: {stem}: {error}; is it a LoRA of another model?") from error


def with_dots(flat: str, pattern: str) -> str | None:
    """The name, of those that fit a pattern, that kohya's way of writing underscores for dots has made `flat` of.

    The pattern must write out every dot (`\\.`), as those of architectures do: each that takes part tells its place.
    """
    match = _flat(pattern).fullmatch(flat)
    if match is None:
        return None
    dots = {match.start(group) for group in match.re.groupindex if match[group] is not None}
    return "".join("." if place in dots else letter for place, letter in enumerate(flat))


@cache
def _flat(pattern: str) -> re.Pattern[str]:
    """The pattern of flat names, in which each underscore that was a dot is a group with a name."""
    number = count()
    return re.compile(re.sub(r"\\\.", lambda _: f"(?P<dot{next(number)}>_)", pattern))


def _stranger(path: Path, strange: list[str], total: int, spec: ArchSpec) -> str:
    """What to say about modules that are not this architecture's."""
    if texts := [stem for stem in strange if _TEXT_ENCODER.match(stem)]:
        belong = f"{path}: {len(texts)} of {total} layers belong to a text encoder ({_some(texts)})"
        if any(stem.startswith(tuple(text_prefixes(spec))) for stem in texts):
            return f"{belong} that is not trained here; set train.train_text_encoder: true to go on from them"
        return f"{belong}; LoRAs of {spec.title} act on its {spec.denoiser} alone"
    looks = guess(strange)
    if looks is not None and not spec.title.startswith(looks):
        return f"{path}: not a LoRA of {spec.title}: it looks like {looks} (layers such as {_some(strange)})"
    if any(re.fullmatch(spec.lora_all, stem) for stem in strange):
        return (
            f"{path}: layers without a prefix ({_some(strange)}), which diffusers loads as nothing at all. Save the "
            f"file again with {' or '.join(list(prefixes(spec))[:2])} before each"
        )
    return f"{path}: {len(strange)} of {total} layers are unknown to {spec.title} ({_some(strange)})"


def _kind(path: Path, modules: Mapping[str, Mapping[str, Tensor]]) -> Kind:
    kinds = {name: kind_of(parts) for name, parts in modules.items()}
    if broken := [name for name, kind in kinds.items() if kind is None]:
        parts = ", ".join(sorted(modules[broken[0]])) or "alpha alone"
        raise UserError(f"{path}: {len(broken)} layers are incomplete; {broken[0]} has {parts}")
    if len(set(kinds.values())) > 1:
        raise UserError(
            f"{path}: several kinds of adapter in one file ({', '.join(sorted(map(str, set(kinds.values()))))})"
        )
    return cast("Kind", next(iter(kinds.values())))


def added_shape(parts: Mapping[str, Tensor], kind: Kind) -> tuple[int, int]:
    """(out, in) of what a module adds to its layer's weight."""
    if kind == "lokr":
        (left_o, left_i), (right_o, right_i) = (lokr_shape(parts, factor) for factor in ("lokr_w1", "lokr_w2"))
        return (left_o * right_o, left_i * right_i)
    if kind == "loha":
        return (parts["hada_w1_a"].shape[0], parts["hada_w1_b"].shape[1])
    return (parts["lora_B.weight"].shape[0], parts["lora_A.weight"].shape[1])


def _check_shapes(path: Path, name: str, parts: Mapping[str, Tensor], kind: Kind, shapes: Shapes | None) -> None:
    matrices = {part: tensor for part, tensor in parts.items() if part not in (MAGNITUDE, DORA_SCALE)}
    if wrong := [part for part, tensor in matrices.items() if tensor.ndim != 2 or 0 in tensor.shape]:
        found = list(parts[wrong[0]].shape)
        raise UserError(f"{path}: {name}.{wrong[0]} has the shape {found}; only linear layers are supported")
    for down, up in _PAIRS:
        if down in parts and parts[down].shape[0] != parts[up].shape[1]:
            sides = f"{list(parts[up].shape)} and {list(parts[down].shape)}"
            raise UserError(f"{path}: {name}: {up} and {down} do not fit each other ({sides})")
    added = added_shape(parts, kind)
    norms = [parts[part].numel() for part in (MAGNITUDE, DORA_SCALE) if part in parts]
    if norms and norms != [added[0]]:
        raise UserError(f"{path}: {name} has {norms[0]} norms for {added[0]} output features")
    if shapes is not None and added != tuple(shapes[name]):
        raise UserError(
            f"{path}: {name} is made for a layer of {added[1]} inputs and {added[0]} outputs; this model's has "
            f"{shapes[name][1]} and {shapes[name][0]}. Is it a LoRA of another model?"
        )


def _scales(
    path: Path,
    modules: Mapping[str, Mapping[str, Tensor]],
    given: Mapping[str, Tensor],
    headers: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, int], dict[str, float], list[str]]:
    """Rank and alpha of each module, and what had to be assumed."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    assumed = 0
    for name, parts in modules.items():
        shown = _rank(parts)
        component = next((start for start in headers if start and name.startswith(f"{start}.")), "")
        if component in headers:
            own = name.removeprefix(f"{component}.")
            ranks[name], alphas[name] = _from_header(path, own, shown, headers[component])
        elif shown is None:  # loaders of these formats do not scale whole factors
            ranks[name] = max(parts["lokr_w2"].shape)
            alphas[name] = float(ranks[name])
        else:
            ranks[name] = shown
            alphas[name] = _alpha(path, name, given[name]) if name in given else float(shown)
            assumed += name not in given
    notes = []
    if assumed:
        what = "no alpha in the file" if assumed == len(modules) else f"no alpha for {assumed} of {len(modules)} layers"
        notes.append(f"{what}: taken as the rank, a scale of 1, as every loader does")
    return ranks, alphas, notes


def _rank(parts: Mapping[str, Tensor]) -> int | None:
    """The rank that the tensors show; None for a LoKr whose factors are both whole."""
    for part in ("lora_A.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if part in parts:
            return parts[part].shape[0]
    return None


def _alpha(path: Path, name: str, tensor: Tensor) -> float:
    value = tensor.item() if tensor.numel() == 1 else math.nan
    if not math.isfinite(value) or value <= 0:
        raise UserError(f"{path}: alpha of {name} is {tensor.tolist()}; one positive number is needed")
    return float(value)


def _headers(path: Path, metadata: Mapping[str, str], spec: ArchSpec, source: _SOURCE) -> dict[str, Mapping[str, Any]]:
    """PEFT's options where the format has them: diffusers' header, or `adapter_config.json` beside PEFT's file.

    By text encoder; those of the denoiser under an empty name.
    """
    starts = {"": dotted(spec.lora_keys.diffusers_prefix)} | {name: f"{name}." for name in spec.lora_keys.text}
    config = path.with_name("adapter_config.json")
    try:
        if source == "diffusers" and "lora_adapter_metadata" in metadata:
            options = json.loads(metadata["lora_adapter_metadata"])
            found = {
                name: {key.removeprefix(start): value for key, value in options.items() if key.startswith(start)}
                for name, start in starts.items()
            }
            return {name: given for name, given in found.items() if given}
        if source == "peft" and config.is_file():
            return {"": dict(json.loads(config.read_text(encoding="utf-8")))}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its PEFT options cannot be read ({error}), so alpha is unknown") from error
    return {}


def _from_header(path: Path, name: str, shown: int | None, header: Mapping[str, Any]) -> tuple[int, float]:
    try:
        rank = int(_option(name, header.get("rank_pattern") or {}, header["r"]))
        alpha = float(_option(name, header.get("alpha_pattern") or {}, header.get("lora_alpha", header.get("alpha"))))
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise UserError(f"{path}: its PEFT options give no rank and alpha for {name} ({error})") from error
    if shown is not None and rank != shown:
        raise UserError(f"{path}: its header says rank {rank} for {name}, its tensors have {shown}")
    return rank, alpha * math.sqrt(rank) if header.get("use_rslora") else alpha


def _option(name: str, pattern: Mapping[str, Any], usual: Any) -> Any:  # noqa: ANN401  JSON
    """PEFT's rule: the first regular expression that matches the end of the name, else the usual value."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), usual)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
