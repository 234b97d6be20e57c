"""The registry of architectures, and the defaults that a job takes from its architecture.

A new architecture is one module here, one line in `_MODULES` and one row in `tests/archs.py`.
"""

from __future__ import annotations

from dataclasses import asdict
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast, get_args

from detour import UserError
from detour.config.job import ModelArch, TrainProcess

if TYPE_CHECKING:
    from detour.archs.base import Arch, ArchSpec, Variant

_MODULES: dict[ModelArch, str] = {
    "zimage": "detour.archs.zimage",
}


def built() -> list[ModelArch]:
    """Names of the architectures that can be trained today, in the order of `ModelArch`."""
    return [name for name in get_args(ModelArch) if name in _MODULES]


def spec(name: ModelArch) -> ArchSpec:
    """The facts about an architecture, without importing torch."""
    return get(name).spec


def get(name: ModelArch) -> Arch:
    """The architecture by that name; an error when it is not built yet."""
    if name not in _MODULES:
        raise UserError(f"model.arch: {name!r} is not built yet; built today: {', '.join(built())}")
    arch: Arch = import_module(_MODULES[name]).ARCHS[name]
    return arch


def name_of(text: str) -> ModelArch:
    """The architecture that a command line names (`zimage`, `zimage:base`); else an error with the nearest name."""
    name = text.split(":", 1)[0]
    for known in get_args(ModelArch):
        if known == name:
            return cast("ModelArch", known)
    near = get_close_matches(name, get_args(ModelArch), 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"architecture {name!r} is not known{hint} Allowed: {', '.join(get_args(ModelArch))}")


def table() -> list[dict[str, Any]]:
    """One row for each name in `ModelArch`: what `detour archs --json` prints and the web form reads."""
    rows: list[dict[str, Any]] = []
    for name in get_args(ModelArch):
        if name not in _MODULES:
            rows.append({"name": name, "built": False})
            continue
        facts = spec(name)
        rows.append(
            {
                "name": name,
                "built": True,
                "title": facts.title,
                "objective": facts.objective,
                "distilled": facts.default.distilled,
                "default_repo": facts.default.repo,
                "default_variant": facts.default_variant,
                "variants": {key: asdict(variant) for key, variant in facts.variants.items()},
                "latent_channels": facts.latent_channels,
                "bucket_divisibility": facts.bucket_divisibility,
                "text_tokens": facts.text_tokens,
                "timestep_types": list(facts.timestep_types),
                "licence": facts.licence,
            }
        )
    return rows


def variant_of(process: TrainProcess) -> tuple[str, Variant]:
    """The variant that a process trains, with its name: the one named, that of the repository, or the default."""
    facts, model = spec(process.model.arch), process.model
    if model.variant is not None:
        if model.variant not in facts.variants:
            allowed = ", ".join(facts.variants)
            raise UserError(f"model.variant: {model.variant!r} is not a variant of {facts.name}; allowed: {allowed}")
        return model.variant, facts.variants[model.variant]
    for name, variant in facts.variants.items():
        if variant.repo == model.name_or_path:
            return name, variant
    return facts.default_variant, facts.default


def resolve(process: TrainProcess) -> TrainProcess:
    """The process with every default visible: what the file leaves open is taken from the architecture's variant."""
    facts = spec(process.model.arch)
    name, variant = variant_of(process)
    kind = "flowmatch" if facts.objective == "flow" else "ddpm"
    chosen = {"train.noise_scheduler": process.train.noise_scheduler, "sample.sampler": process.sample.sampler}
    for option, value in chosen.items():
        if value not in (None, kind):
            raise UserError(
                f"{option}: {value!r} does not fit {facts.name}, which is a {facts.objective} model; "
                f"use {kind!r} or leave it out"
            )
    _check_times(process, facts)
    saves = process.save.save_every or (None if process.train.save_every_n_epochs else 250)
    length = {} if process.train.epochs else {"steps": process.train.steps or 3000}
    repo = process.model.name_or_path or variant.repo
    extras = process.model.extras_name_or_path
    if extras is None and (repo == variant.repo or repo.endswith(".safetensors")):
        extras = variant.extras_repo or (variant.repo if repo != variant.repo else None)
    updates = {
        "model": {
            "variant": name,
            "name_or_path": repo,
            "extras_name_or_path": extras,
            "dtype": process.model.dtype or process.train.dtype,
            "qtype_te": process.model.qtype_te or process.model.qtype,
        },
        "train": {
            "noise_scheduler": kind,
            "timestep_type": process.train.timestep_type or variant.timestep_type,
            **length,
        },
        "network": {"linear_alpha": process.network.linear_alpha or float(process.network.linear)},
        "sample": {
            "sampler": kind,
            "sample_steps": process.sample.sample_steps or variant.steps,
            "guidance_scale": process.sample.guidance_scale or variant.guidance,
        },
        "save": {"save_every": saves},
    }
    sections = {section: getattr(process, section).model_copy(update=values) for section, values in updates.items()}
    return process.model_copy(update=sections)


def _check_times(process: TrainProcess, facts: ArchSpec) -> None:
    kind = process.train.timestep_type
    if kind is not None and kind not in facts.timestep_types:
        raise UserError(
            f"train.timestep_type: {kind!r} does not fit {facts.name}, which is a {facts.objective} model; "
            f"allowed: {', '.join(facts.timestep_types)}"
        )
    if process.train.min_snr_gamma is not None and facts.objective == "flow":
        raise UserError(
            f"train.min_snr_gamma: {facts.name} is a flow model, which has no min-SNR weighting; leave it out "
            f"(train.timestep_type: weighted weighs its times)"
        )


def advice(process: TrainProcess) -> list[str]:
    """Warnings about settings that are obeyed but seldom meant. For a resolved process."""
    name, variant = variant_of(process)
    title, adapter = f"{spec(process.model.arch).title} {name}", process.model.assistant_lora_path
    guidance = process.sample.guidance_scale or 1.0
    found: list[str] = []
    if variant.distilled and adapter is None:
        usual = f" (its users take {variant.adapter})" if variant.adapter else ""
        found.append(
            f"{title} is distilled and is trained without a training adapter: it will lose its {variant.steps}-step "
            f"speed; set model.assistant_lora_path{usual}"
        )
    if not variant.distilled and adapter is not None:
        found.append(f"model.assistant_lora_path is set, but {title} is not distilled and needs no training adapter")
    if variant.distilled and guidance > 1:
        found.append(f"sample.guidance_scale is {guidance:g}; {title} is meant to be sampled with 1 (none)")
    return found
