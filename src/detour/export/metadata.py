"""What a LoRA's header says about how it was made: modelspec 1.0.1, kohya's `ss_` keys, and `detour.` keys.

Nothing private leaves: no path, no folder, no user name, no caption and no trigger word, unless `save.include_captions`
asks for captions and trigger word. The base model is named only where it is one of the architecture's published ones.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from detour import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from detour.archs.base import ArchSpec
    from detour.config.job import TrainProcess
    from detour.lora_formats import LoraFile

_MODULES = {"lora": "networks.lora", "dora": "networks.lora", "lokr": "lycoris.kohya", "loha": "lycoris.kohya"}
_VERSIONS = {
    "stable-diffusion-v1": "sd_v1",
    "stable-diffusion-v2-512": "sd_v2",
    "stable-diffusion-v2-768-v": "sd_v2",
    "stable-diffusion-xl-v1-base": "sdxl_base_v1-0",
    "segmind-ssd-1b": "sdxl_ssd-1b",
    "segmind-vega": "sdxl_vega",
}
"""`ss_base_model_version` by modelspec's id. A1111 hides LoRAs that do not go with the model it has loaded: one that
begins with `sdxl_` is of SDXL, one with `ss_v2` of 2.x, every other of 1.x. Of other models it is the architecture."""
_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """How a file came to be."""

    title: str
    process: TrainProcess
    """With every default filled in (`archs.resolve`)."""
    step: int
    """Optimizer steps taken."""
    epoch: int = 0
    """Whole passes over the data."""
    images: int | None = None
    """Training pictures."""
    date: datetime | None = None
    """Given, not taken from the clock: the same run writes the same bytes."""
    adapter_sha256: str | None = None
    """Of the training adapter's file."""
    patch_sha256: str | None = None
    """Of the LoRA to draw with it (`preserve.distill_patch`)."""
    job_sha256: str | None = None
    captions: Sequence[str] = ()
    """Counted into tag statistics, and only where `save.include_captions` is set."""


def describe(lora: LoraFile | None, spec: ArchSpec, origin: Origin) -> dict[str, str]:
    """The header of a LoRA, or with None of a whole model. Values are text, as the container wants."""
    facts = _modelspec(lora, spec, origin) | _detour(spec, origin) | _training(spec, origin)
    if lora is not None:
        facts |= _network(lora, origin)
    if origin.process.save.include_captions:
        facts |= _captions(origin)
    return {key: str(value) for key, value in facts.items() if value is not None}


def _modelspec(lora: LoraFile | None, spec: ArchSpec, origin: Origin) -> dict[str, object]:
    side = max((max(dataset.resolution) for dataset in origin.process.all_datasets), default=None)
    variant = spec.variants.get(origin.process.model.variant or spec.default_variant, spec.default)
    predicts = variant.objective or spec.objective
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": (variant.modelspec or spec.modelspec) + ("/lora" if lora is not None else ""),
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.title": origin.title,
        "modelspec.date": origin.date and origin.date.isoformat(timespec="seconds"),
        "modelspec.resolution": side and f"{side}x{side}",
        "modelspec.prediction_type": {"eps": "epsilon"}.get(predicts, predicts),
        "modelspec.license": variant.licence or spec.licence,
    }


def _detour(spec: ArchSpec, origin: Origin) -> dict[str, object]:
    adapter = origin.adapter_sha256
    return {
        "detour.version": __version__,
        "detour.arch": spec.name,
        "detour.variant": origin.process.model.variant,
        "detour.step": origin.step,
        "detour.training_adapter_sha256": adapter,
        "detour.training_adapter_mode": adapter and origin.process.model.assistant_lora_mode,
        "detour.preserve_strategy": origin.process.preserve.strategy,
        "detour.distill_patch_sha256": origin.patch_sha256,
        "detour.job_sha256": origin.job_sha256,
    }


def _training(spec: ArchSpec, origin: Origin) -> dict[str, object]:
    train, model = origin.process.train, origin.process.model
    variant = spec.variants.get(model.variant or spec.default_variant, spec.default)
    version = _VERSIONS.get(variant.modelspec or spec.modelspec, spec.name)
    public = {variant.repo for variant in spec.variants.values()}
    return {
        "ss_output_name": origin.title,
        "ss_base_model_version": version,
        "ss_v2": "True" if version == "sd_v2" else None,
        "ss_sd_model_name": model.name_or_path if model.name_or_path in public else None,
        "ss_steps": origin.step,
        "ss_max_train_steps": train.steps,
        "ss_epoch": origin.epoch,
        "ss_num_train_items": origin.images,
        "ss_total_batch_size": train.batch_size * train.gradient_accumulation,
        "ss_gradient_accumulation_steps": train.gradient_accumulation,
        "ss_learning_rate": train.lr,
        "ss_text_encoder_lr": train.text_encoder_lr,
        "ss_optimizer": train.optimizer,
        "ss_lr_scheduler": train.lr_scheduler,
        "ss_seed": train.seed,
        "ss_mixed_precision": _PRECISION[train.dtype],
        "ss_training_finished_at": origin.date and origin.date.timestamp(),
    }


def _network(lora: LoraFile, origin: Origin) -> dict[str, object]:
    network = origin.process.network
    args: dict[str, object] = {"algo": lora.kind, "include": network.include, "exclude": network.exclude}
    if lora.kind == "lokr":
        args |= {"factor": network.lokr_factor, "full_matrix": network.lokr_full_rank}
    return {
        "ss_network_module": _MODULES[lora.kind],
        "ss_network_dim": lora.rank,
        "ss_network_alpha": lora.alpha,
        "ss_network_dropout": network.dropout,
        "ss_network_args": json.dumps(args),
    }


def _captions(origin: Origin) -> dict[str, object]:
    """`ss_tag_frequency` as interfaces show it: set -> tag -> count. The set's folder stays out of it."""
    tags = Counter(tag.strip() for caption in origin.captions for tag in caption.split(",") if tag.strip())
    return {
        "ss_tag_frequency": json.dumps({"captions": dict(sorted(tags.items()))}, ensure_ascii=False) if tags else None,
        "modelspec.trigger_phrase": origin.process.trigger_word,
    }
