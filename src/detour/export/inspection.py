"""What a file or folder is, for `detour inspect`: adapter, training adapter, checkpoint or model.

Nothing needs to be known in advance: the architecture is the one whose layers all fit; failing that, names give a hint.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from detour import UserError, archs, files
from detour.export.reading import adapter_keys, added_shape, read_lora
from detour.lora_formats import LoraFile, by_module
from detour.nn.families import count_by_family, guess
from detour.weights import find_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from detour.archs.base import ArchSpec
    from detour.config.job import ModelArch

STATE = "state.json"
KIND_KEY = "detour.kind"
"""Header key with which a training adapter made by Detour says what it is."""


def inspect_file(path: Path) -> dict[str, Any]:
    """Facts about a file or folder; `what` is `lora`, `training adapter`, `checkpoint`, `model` or `model part`.

    Damage and strangeness are facts too (`valid`, `problem`); UserError where nothing at all can be said.
    """
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    find_file(str(path), what="file")  # refuses pickles
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  not a mapping
            shapes = {name: list(part.get_shape()) for name, part in slices.items()}
            dtypes = Counter(str(part.get_dtype()) for part in slices.values())
            metadata = dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole .safetensors file ({error}); fetch it again") from error
    facts = _adapter(path, shapes, metadata) if adapter_keys(shapes) else _model(shapes)
    common = {"path": str(path), "bytes": path.stat().st_size, "sha256": files.sha256_file(path)}
    return facts | common | {"tensors": len(shapes), "dtypes": dict(dtypes), "metadata": metadata}


def _adapter(path: Path, shapes: Mapping[str, list[int]], metadata: Mapping[str, str]) -> dict[str, Any]:
    made = metadata.get(KIND_KEY) or ("training adapter" if "training_adapter" in path.name else "lora")
    found, problem = _readings(path, metadata)
    if found:
        arch, lora = next(iter(found.items()))
        return {
            "what": made,
            "arch": arch,
            "also_fits": list(found)[1:],
            "format": lora.format,
            "kind": lora.kind,
            "rank": lora.rank,
            "alpha": lora.alpha,
            "ranks": _counts(lora.ranks),
            "alphas": _counts(lora.alphas),
            "modules": len(lora.modules),
            "targets": count_by_family(lora.modules),
            "step": _step(metadata),
            "notes": list(lora.notes),
            "problem": None,
        }
    stems = {stem for stem, _ in adapter_keys(shapes).values()}
    return {
        "what": made,
        "arch": None,
        "looks_like": guess(shapes),
        "modules": len(stems),
        "targets": count_by_family(stems),
        "step": _step(metadata),
        "problem": problem,
    }


def _readings(path: Path, metadata: Mapping[str, str]) -> tuple[dict[ModelArch, LoraFile], str | None]:
    """The file as a LoRA of each architecture that it may belong to, or why it is none of the last one tried.

    Relatives have layers of the same names: then the header decides, or the features that a layer takes.
    """
    found: dict[ModelArch, LoraFile] = {}
    problem = None
    for arch in archs.built():
        try:
            found[arch] = read_lora(path, archs.spec(arch))
        except UserError as error:
            problem = str(error)
    if named := {arch: lora for arch, lora in found.items() if arch == metadata.get("detour.arch")}:
        return named, None
    fitting = {arch: lora for arch, lora in found.items() if _takes(lora, archs.spec(arch))}
    return fitting or found, problem


def _takes(lora: LoraFile, spec: ArchSpec) -> bool:
    """Do layers take the features that this architecture's do?"""
    if spec.told_by is None:
        return True
    ending, features = spec.told_by
    told = [parts for name, parts in by_module(lora.tensors).items() if name.endswith(f".{ending}")]
    return all(added_shape(parts, lora.kind)[1] == features for parts in told)


def _counts(values: Mapping[str, float]) -> dict[str, int]:
    return {f"{value:g}": count for value, count in Counter(values.values()).most_common()}


def _step(metadata: Mapping[str, str]) -> int | None:
    """Optimizer steps, as Detour, kohya's or ai-toolkit's header says."""
    info = metadata.get("training_info", "")
    found = metadata.get("detour.step") or metadata.get("ss_steps") or _from_json(info).get("step")
    return int(found) if found is not None and str(found).isdigit() else None


def _from_json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _model(shapes: Mapping[str, list[int]]) -> dict[str, Any]:
    looks = guess(shapes)
    sizes = [_product(shape) for shape in shapes.values()]
    return {
        "what": "model" if looks else "unknown",
        "looks_like": looks,
        "parameters": sum(sizes),
        "problem": None if looks else "neither an adapter nor a model whose names are known",
    }


def _product(shape: list[int]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


def _folder(path: Path) -> dict[str, Any]:
    common = {"path": str(path)}
    if (path / "model_index.json").is_file():
        index = _from_json((path / "model_index.json").read_text(encoding="utf-8"))
        parts = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        return common | {"what": "model", "class": index.get("_class_name"), "components": parts}
    if (path / files.MANIFEST).is_file() or (path / STATE).is_file() or path.name.startswith("step-"):
        return common | _checkpoint(path)
    if (path / "config.json").is_file():
        config = _from_json((path / "config.json").read_text(encoding="utf-8"))
        return common | {"what": "model part", "class": config.get("_class_name") or config.get("model_type")}
    inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:6]) or "nothing"
    raise UserError(
        f"{path}: a folder that is neither a checkpoint nor a model (in it: {inside}); name a file or a checkpoint "
        f"such as checkpoints/step-000000250"
    )


def _checkpoint(path: Path) -> dict[str, Any]:
    """A directory written by `files.new_directory`: a checkpoint, or a whole model that was exported."""
    facts: dict[str, Any] = {"what": "checkpoint", "valid": True, "problem": None}
    try:
        files.verify_directory(path)
        listed = files.read_manifest(path)
        facts["files"] = {name: entry["size"] for name, entry in listed.items()}
    except UserError as error:
        facts |= {"valid": False, "problem": str(error)}
    if not (path / STATE).is_file():
        return facts | ({"what": "model"} if facts["valid"] else {})
    content = _from_json((path / STATE).read_bytes().decode(errors="replace"))
    state = content.get("state")
    progress = state.get("progress", {}) if isinstance(state, dict) else {}
    return facts | {"step": content.get("step"), "epoch": progress.get("epoch"), "state": state}
