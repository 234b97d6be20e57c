"""The schema of a job file as fields of a form: label, help, unit, default and allowed values of every option.

All of it comes from the schema. What a schema cannot say (a unit, a label that is not simply the option's name, which
options come first) stands in the tables here, and a test holds them to the schema.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from detour.config.job import Job
from detour.config.load import on_one_line
from detour.config.reference import allowed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from detour.config.document import Key

Kind = Literal["text", "number", "integer", "switch", "choice", "texts", "numbers", "choices", "rows", "mapping"]
"""`texts` and `rows` are lists whose entries are edited one by one; `numbers` and `choices` fit on one line."""

When = Literal["always", "distilled", "given", "more"]
"""When a field is among the first ones: always, for a distilled model, or when the file gives it; `more`: never."""

FIRST: Mapping[str, When] = {
    "config.output_name": "always",
    "model.name_or_path": "always",
    "model.assistant_lora_path": "distilled",
    "train.dataset_folder": "given",
    "datasets": "always",
    "datasets[].folder_path": "always",
    "datasets[].resolution": "always",
    "trigger_word": "always",
    "train.steps": "always",
    "train.epochs": "given",
    "train.lr": "always",
    "network.linear": "always",
    "train.batch_size": "always",
    "model.quantize": "always",
    "model.qtype": "always",
    "model.quantize_te": "always",
    "train.dtype": "always",
    "sample.prompts": "always",
    "sample.prompts[].prompt": "always",
    "sample.sample_every": "always",
    "sample.sample_every_n_epochs": "given",
    "save.save_every": "always",
    "train.save_every_n_epochs": "given",
}
"""The fields that come first, in their order; all others stand behind them."""

_LABELS = {
    "config.output_name": "Name",
    "prompts_file": "File of prompts",
    "model.arch": "Architecture",
    "model.name_or_path": "Model path",
    "model.extras_name_or_path": "Path of the other components",
    "model.assistant_lora_path": "Adapter path",
    "model.assistant_lora_mode": "Adapter mode",
    "model.dtype": "Type of the frozen weights",
    "model.quantize": "Quantise the model",
    "model.qtype": "Quantised to",
    "model.quantize_te": "Quantise the text encoder",
    "model.qtype_te": "Text encoder quantised to",
    "model.low_vram": "Low memory",
    "train.lr": "Learning rate",
    "train.text_encoder_lr": "Learning rate of the text encoder",
    "train.lr_scheduler": "Learning rate schedule",
    "train.lr_warmup_steps": "Warm-up",
    "train.lr_cycles": "Restarts",
    "train.lr_min_ratio": "Learning rate left at the end",
    "train.max_grad_norm": "Largest gradient norm",
    "train.dtype": "Precision",
    "train.timestep_type": "Times",
    "train.timestep_bias": "Preferred times",
    "train.min_timestep": "Lowest time",
    "train.max_timestep": "Highest time",
    "train.min_snr_gamma": "Min-SNR gamma",
    "train.reg_weight": "Regularisation weight",
    "train.ema_config.use_ema": "Keep an average",
    "train.ema_config.ema_decay": "Decay",
    "train.save_every_n_epochs": "Save every (epochs)",
    "network.type": "Kind of adapter",
    "network.linear": "Rank",
    "network.linear_alpha": "Alpha",
    "network.transformer_only": "Main blocks only",
    "network.lokr_factor": "LoKr factor",
    "network.lokr_full_rank": "LoKr full rank",
    "network.pretrained_lora_path": "Start from a LoRA",
    "folder_path": "Dataset",
    "caption_ext": "Ending of captions",
    "rich_caption_ext": "Ending of long captions",
    "caption_dropout_rate": "Caption dropout",
    "num_repeats": "Repeats",
    "flip_x": "Mirror",
    "flip_y": "Turn upside down",
    "num_frames": "Frames",
    "fps": "Frame rate",
    "is_reg": "Regularisation set",
    "sample.prompts": "Sample prompts",
    "neg": "Negative prompt",
    "network_multiplier": "Strength of the LoRA",
    "sample.sample_every_n_epochs": "Sample every (epochs)",
    "save.max_step_saves_to_keep": "Saves to keep",
    "save.dtype": "Type in LoRA files",
    "preserve.delta.model": "Undistilled base",
    "preserve.delta.lora": "LoRA of that base",
    "logging.wandb": "Weights & Biases",
    "logging.tensorboard": "TensorBoard",
}
"""Labels of options whose names do not say it, by path or by the last name in it. All others are called after
themselves: `batch_size`, Batch size."""

_UNITS = {
    "train.steps": "steps", "train.epochs": "epochs", "lr_warmup_steps": "steps", "save_every": "steps",
    "sample_every": "steps", "save_every_n_epochs": "epochs", "sample_every_n_epochs": "epochs",
    "validate_every": "steps", "log_every": "steps", "every": "steps", "sample_steps": "denoising steps",
    "preserve.steps": "denoising steps", "long_steps": "denoising steps", "max_bad_steps": "steps", "width": "pixels",
    "height": "pixels", "resolution": "pixels", "batch_size": "pictures", "max_images": "pictures", "fps": "per second",
    "num_frames": "frames", "num_workers": "processes", "gradient_accumulation": "micro-batches",
    "min_timestep": "0 clean, 1 noise", "max_timestep": "0 clean, 1 noise", "times": "0 clean, 1 noise",
    "max_step_saves_to_keep": "saves", "keep_tokens": "parts",
}  # fmt: skip
"""By path, or by the last name in it."""

_GROUPS = {
    "": "The job",
    "model": "Model",
    "adapter": "Making the adapter",
    "adapter.stop": "When the adapter is done",
    "train": "Training",
    "train.ema_config": "Average of the weights",
    "network": "Adapter (network)",
    "sample": "Previews (sample)",
    "save": "Saving",
    "validation": "Validation",
    "validation.dataset": "A dataset for validation",
    "logging": "Logging",
    "preserve": "Keeping the few steps (preserve)",
    "preserve.delta": "What is transferred",
    "preserve.drift": "Drift meter",
    "controls": "Control pictures",
}


@dataclass(frozen=True, kw_only=True)
class FormField:
    """One option."""

    path: str
    """From the process down, `train.lr`; or `config.output_name`. Of an entry in a list: `datasets[].flip_x`."""
    label: str
    kind: Kind
    help: str
    allowed: str
    """In words."""
    unit: str
    default: Any
    """None: not set, or as the architecture says."""
    required: bool
    """It has to be given. Of options in a section that may be left out as a whole, none has to."""
    choices: tuple[str, ...]
    first: When
    rows: tuple[FormField, ...]
    """Of `rows`: the fields of each entry."""
    short: tuple[str, ...]
    """Of `rows`: the fields that a mere text or number stands for, where an entry may be one."""


@dataclass(frozen=True, kw_only=True)
class FormGroup:
    """A section of the job file."""

    name: str
    """`train.ema_config`; empty for what belongs to no section."""
    title: str
    help: str
    required: bool
    fields: tuple[FormField, ...]


@cache
def kinds() -> dict[str, tuple[FormGroup, ...]]:
    """All fields of each kind of process (`type`), in the order of the schema."""
    schema = on_one_line(Job.model_json_schema(mode="serialization"))
    sections = schema["$defs"]
    top = sections["JobConfig"]
    config = _Place("config.", top, {}, required=True)
    about = [_field(sections, config, name) for name in top["properties"] if name != "process"]
    found: dict[str, tuple[FormGroup, ...]] = {}
    for name in _names(top["properties"]["process"]["items"]):
        own, *inner = _groups(sections, _Place("", sections[name], {}, required=True))
        joined = FormGroup(name="", title=_title(""), help=own.help, required=True, fields=(*about, *own.fields))
        found[sections[name]["properties"]["type"]["const"]] = (joined, *inner)
    return found


@cache
def fields(kind: str) -> dict[str, FormField]:
    """All fields of a kind of process by path, with those of entries (`datasets[].flip_x`, `preserve.prompts[]`)."""
    found: dict[str, FormField] = {}
    for group in kinds()[kind]:
        for field in group.fields:
            found[field.path] = field
            found |= {inner.path: inner for inner in field.rows}
            if field.kind == "texts":
                found[f"{field.path}[]"] = _entry(field)
    return found


def field_at(key: Key, kind: str) -> FormField | None:
    """The field of a place in a job file, in a process of that kind."""
    place = key[3:] if key[:2] == ("config", "process") else key
    path = "".join("[]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
    return fields(kind).get(path)


@dataclass(frozen=True)
class _Place:
    """A section in the schema, where the walk through it has come to."""

    prefix: str
    schema: dict[str, Any]
    defaults: dict[str, Any]
    """Of the section as a whole; they win over those of its options."""
    required: bool
    optional: bool = False
    """It, or a section around it, may be left out as a whole."""


def _groups(sections: dict[str, Any], place: _Place) -> Iterator[FormGroup]:
    """A section's own options, then those of the sections in it."""
    own, inner = [], []
    for name, option in place.schema["properties"].items():
        if "const" in option:
            continue
        bare = _bare(option)
        if "$ref" in bare:
            default = place.defaults.get(name) or option.get("default") or {}
            required, optional = name in place.schema.get("required", ()), place.optional or "anyOf" in option
            content = sections[_names(bare)[0]]
            inner.append(_Place(f"{place.prefix}{name}.", content, default, required, optional))
        else:
            own.append(_field(sections, place, name))
    path = place.prefix.removesuffix(".")
    about = place.schema["description"]
    yield FormGroup(name=path, title=_title(path), help=about, required=place.required, fields=tuple(own))
    for following in inner:
        yield from _groups(sections, following)


def _field(sections: dict[str, Any], place: _Place, name: str) -> FormField:
    option = place.schema["properties"][name]
    bare, path = _bare(option), place.prefix + name
    items = bare.get("items", {})
    entry = sections[_names(items)[0]] if _names(items) else None
    row = _Place(f"{path}[].", entry or {}, {}, required=False)
    rows = [] if entry is None else [_field(sections, row, inner) for inner in entry["properties"]]
    return FormField(
        path=path,
        label=_label(path),
        kind=_kind(bare),
        help=option.get("description", ""),
        allowed="" if rows else allowed(option),
        unit=_UNITS.get(path, _UNITS.get(name, "")),
        default=place.defaults.get(name, option.get("default")),
        required=not place.optional and name in place.schema.get("required", ()),
        choices=tuple(bare.get("enum") or items.get("enum") or ()),
        first=FIRST.get(path, "more"),
        rows=tuple(rows),
        short=tuple(entry["required"]) if entry is not None and _may_be_short(name) else (),
    )


def _entry(field: FormField) -> FormField:
    """The field of one entry of a list of texts."""
    return FormField(
        path=f"{field.path}[]", label=field.label, kind="text", help=field.help, allowed="text", unit="", default=None,
        required=True, choices=(), first="more", rows=(), short=(),
    )  # fmt: skip


def _kind(option: dict[str, Any]) -> Kind:
    """What a schema's option is edited with."""
    if "enum" in option:
        return "choice"
    if option["type"] == "array":
        items = option["items"]
        if _names(items):
            return "rows"
        return "choices" if "enum" in items else "texts" if items["type"] == "string" else "numbers"
    kinds: dict[str, Kind] = {
        "string": "text", "number": "number", "integer": "integer", "boolean": "switch", "object": "mapping"
    }  # fmt: skip
    return kinds[option["type"]]


def _may_be_short(name: str) -> bool:
    """Whether an entry of a list of sections may be a mere text or number. Only a reader's schema says so."""
    options = [section.get("properties", {}).get(name, {}) for section in _reading()["$defs"].values()]
    forms = [form for option in options for form in option.get("items", {}).get("anyOf", ())]
    return any("$ref" not in form for form in forms)


@cache
def _reading() -> dict[str, Any]:
    return Job.model_json_schema()


def _bare(option: dict[str, Any]) -> dict[str, Any]:
    """Without `or null`."""
    parts = [part for part in option.get("anyOf", ()) if part.get("type") != "null"]
    bare: dict[str, Any] = parts[0] if parts else option
    return bare


def _names(option: dict[str, Any]) -> list[str]:
    """The sections that an option may be."""
    forms = option.get("oneOf") or [option]
    return [str(form["$ref"]).rpartition("/")[2] for form in forms if "$ref" in form]


def _title(path: str) -> str:
    return _GROUPS.get(path) or _words(path.rpartition(".")[2])


def _label(path: str) -> str:
    name = path.removesuffix("[]").rpartition(".")[2]
    return _LABELS.get(path) or _LABELS.get(name) or _words(name)


def _words(name: str) -> str:
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]
