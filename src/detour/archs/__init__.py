"""The registry of architectures, and the defaults that a job takes from its architecture.

A new architecture is one module here, one line in `_MODULES` and one row in `tests/archs.py`.
"""

from __future__ import annotations

from dataclasses import asdict
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args

from detour import UserError
from detour.archs import own_pictures
from detour.config.job import AdapterProcess, ModelArch, Process, TrainProcess
from detour.config.preserve import PLAIN, strategy_terms

if TYPE_CHECKING:
    from collections.abc import Mapping

    from detour.archs.base import Arch, ArchSpec, Control, Variant
    from detour.config.job import DatasetConfig

_AnyProcess = TypeVar("_AnyProcess", bound=Process)
_MODULES: dict[ModelArch, str] = {
    "sd3": "detour.archs.sd3",
    "auraflow": "detour.archs.auraflow",
    "pixart": "detour.archs.pixart",
    "pixart_sigma": "detour.archs.pixart",
    "sd1": "detour.archs.sd",
    "sd2": "detour.archs.sd",
    "flex1": "detour.archs.flux",
    "flex2": "detour.archs.flux",
    "flux": "detour.archs.flux",
    "lumina2": "detour.archs.lumina2",
    "wan21": "detour.archs.wan21",
    "zimage": "detour.archs.zimage",
    "sdxl": "detour.archs.sdxl",
    "vega": "detour.archs.sdxl",
    "ssd": "detour.archs.sdxl",
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
                "frame_factor": facts.frame_factor,
                "fps": facts.fps,
                "text_tokens": facts.text_tokens,
                "timestep_types": list(facts.timestep_types),
                "licence": facts.licence,
            }
        )
    return rows


def variant_of(process: Process) -> tuple[str, Variant]:
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


def drawn_variant(process: TrainProcess) -> tuple[str, Variant]:
    """The variant that pictures are drawn with, with its name: the trained one's, or that of `preserve.deploy_on`."""
    place = process.preserve.deploy_on
    if place is None:
        return variant_of(process)
    facts = spec(process.model.arch)
    known = [(name, variant) for name, variant in facts.variants.items() if variant.repo == place]
    distilled = [(name, variant) for name, variant in facts.variants.items() if variant.distilled]
    if not (known or distilled):
        raise UserError(f"preserve.deploy_on: {facts.title} has no distilled variant to draw with; leave it out")
    return (known or distilled)[0]


def resolve(process: _AnyProcess) -> _AnyProcess:
    """The process with every default visible: what the file leaves open is taken from the architecture's variant."""
    if isinstance(process, TrainProcess):
        return process.model_copy(update=_resolved(process))
    facts, (name, variant) = spec(process.model.arch), variant_of(process)
    own = own_pictures.resolved(process, facts, name, variant)
    sections = _resolved(process.training())
    shared = {name: sections[name] for name in type(process).model_fields if name in sections}
    return process.model_copy(update=shared | {"adapter": own})


def _resolved(process: TrainProcess) -> dict[str, object]:
    """The sections in which something is filled in."""
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
    _check_frames(process, facts)
    drawn_name, drawn = drawn_variant(process)
    _check_guidance(process, f"{facts.title} {drawn_name}", drawn)
    _check_controls(process, facts)
    held = process.validation.dataset
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
            "text_encoder_lr": _text_lr(process),
            **length,
        },
        "network": {"linear_alpha": process.network.linear_alpha or float(process.network.linear)},
        "sample": {
            "sampler": kind,
            "sample_steps": process.sample.sample_steps or drawn.steps,
            "guidance_scale": process.sample.guidance_scale or drawn.guidance,
            "fps": process.sample.fps or facts.fps,
        },
        "save": {"save_every": saves},
        "validation": {"dataset": held and _with_rate(held, facts)},
    }
    sections = {section: getattr(process, section).model_copy(update=values) for section, values in updates.items()}
    return sections | {"datasets": [_with_rate(dataset, facts) for dataset in process.datasets]}


def _with_rate(dataset: DatasetConfig, facts: ArchSpec) -> DatasetConfig:
    """The dataset with the rate at which its clips are taken."""
    if dataset.num_frames == 1 or dataset.fps is not None:
        return dataset
    return dataset.model_copy(update={"fps": facts.fps})


def _check_frames(process: TrainProcess, facts: ArchSpec) -> None:
    asked = {f"datasets[{i}].num_frames": dataset.num_frames for i, dataset in enumerate(process.datasets)}
    if process.validation.dataset is not None:
        asked["validation.dataset.num_frames"] = process.validation.dataset.num_frames
    asked["sample.num_frames"] = process.sample.num_frames
    asked |= {f"sample.prompts[{i}].num_frames": p.num_frames or 1 for i, p in enumerate(process.sample.prompts)}
    wrong = [f"{option}: {problem}" for option, frames in asked.items() if (problem := facts.frames_problem(frames))]
    if facts.frame_factor is None and process.sample.fps is not None:
        wrong.append(f"sample.fps: {facts.name} draws pictures, which have no frames; leave it out")
    if wrong:
        raise UserError("\n".join(wrong))


def _text_lr(process: TrainProcess) -> float | None:
    train = process.train
    return train.lr if train.train_text_encoder and train.text_encoder_lr is None else train.text_encoder_lr


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


def _check_guidance(process: TrainProcess, title: str, variant: Variant) -> None:
    asked = {"sample.guidance_scale": process.sample.guidance_scale}
    asked |= {f"sample.prompts[{i}].guidance_scale": p.guidance_scale for i, p in enumerate(process.sample.prompts)}
    for option, guidance in asked.items():
        if (problem := variant.guidance_problem(guidance)) is not None:
            raise UserError(f"{option}: {title}: {problem}")


def _check_controls(process: TrainProcess, facts: ArchSpec) -> None:
    validation = process.validation.dataset
    sets = {f"datasets[{index}]": dataset for index, dataset in enumerate(process.datasets)}
    sets |= {} if validation is None else {"validation.dataset": validation}
    asked = [f"{name}.control_path" for name, dataset in sets.items() if dataset.control_path is not None]
    for index, prompt in enumerate(process.sample.prompts):
        given = {"control": prompt.control, "inpaint": prompt.inpaint}
        asked += [f"sample.prompts[{index}].{name}" for name, path in given.items() if path is not None]
    # Switches that only say how a hole is drawn count for nothing: every job that is written down holds them.
    shares = {"control_dropout": process.controls.control_dropout, "inpaint": process.controls.inpaint}
    asked += [f"controls.{name}" for name, share in shares.items() if share]
    for option in asked:
        kind: Control = "inpaint" if option.rpartition(".")[2].startswith("inpaint") else "control"
        if kind not in facts.controls:
            able = ", ".join(name for name in built() if kind in spec(name).controls)
            raise UserError(
                f"{option}: {facts.title} is told of no such pictures; leave it out, or take an architecture that is "
                f"(model.arch: {able})"
            )


def check_variant(facts: ArchSpec, name: str, config: Mapping[str, object]) -> None:
    """Refuse a denoiser whose config says that it is not the variant by that name."""
    wrong = [
        f"{key} is {config.get(key)}" for key, value in facts.variants[name].config.items() if config.get(key) != value
    ]
    if not wrong:
        return
    others = [other for other, variant in facts.variants.items() if variant.fits(config)]
    hint = f"; it looks like {others[0]}: set model.arch: {facts.name}:{others[0]}" if others else ""
    raise UserError(f"this model is not {facts.title} {name} ({', '.join(wrong)}){hint}")


def advice(process: Process) -> list[str]:
    """Warnings about settings that are obeyed but seldom meant. For a resolved process."""
    if isinstance(process, AdapterProcess):
        name, variant = variant_of(process)
        return own_pictures.advice(f"{spec(process.model.arch).title} {name}", variant)
    (name, variant), (drawn_name, drawn) = variant_of(process), drawn_variant(process)
    family, adapter = spec(process.model.arch).title, process.model.assistant_lora_path
    title, guidance = f"{family} {name}", process.sample.guidance_scale or 1.0
    plain = strategy_terms(process.preserve) == [PLAIN] and process.preserve.distill_patch is None
    found: list[str] = []
    if variant.distilled and adapter is None and plain:
        usual = f" (its users take {variant.adapter})" if variant.adapter else ""
        found.append(
            f"{title} is distilled and is trained without a training adapter: it will lose its {variant.steps}-step "
            f"speed; set model.assistant_lora_path{usual}"
        )
    if not variant.distilled and adapter is not None:
        found.append(f"model.assistant_lora_path is set, but {title} is not distilled and needs no training adapter")
    if drawn.distilled and guidance > 1:
        found.append(
            f"sample.guidance_scale is {guidance:g}; {family} {drawn_name} is meant to be sampled with 1 (none)"
        )
    return found
