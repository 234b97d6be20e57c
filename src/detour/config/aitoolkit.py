"""Reads ai-toolkit's job files: recognises the layout and translates it into Detour's.

The job that comes out does what the file means there, defaults included (they differ: a file without `lr` trains at
1e-6 in ai-toolkit). What cannot be honoured is listed; what would change the training is an error; so is a name that
ai-toolkit itself does not know. Facts about ai-toolkit are from its sources at 27a03a91.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detour.config import aitoolkit_keys as keys
from detour.config.aitoolkit_part import Part, Translation, Value, as_patterns, assumed_note, map_texts, shown
from detour.config.aitoolkit_train import controls_of, datasets_of, sample_of, train_of
from detour.config.document import Key, Problem
from detour.config.explain import one_of
from detour.config.job import QTYPE_ALIASES

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Translation", "recognise", "translate"]


def recognise(data: Mapping[str, Any]) -> bool:
    """Whether a file has ai-toolkit's layout: `job:` at the top, one of its kinds of process, or `config.name`."""
    config = data.get("config")
    if not isinstance(config, dict):
        return "job" in data
    listed = config.get("process")
    kinds = [process.get("type") for process in listed if isinstance(process, dict)] if isinstance(listed, list) else []
    theirs = any(kind in (*keys.PROCESS_TYPES, *keys.OTHER_PROCESS_TYPES) for kind in kinds)
    return "job" in data or theirs or ("name" in config and "output_name" not in config and "train" not in kinds)


def translate(data: dict[str, Any]) -> Translation:
    """The job that a file describes, with everything that is wrong and everything that works out differently."""
    out = Translation()
    top = Part(out, keys.TOP, _filled(data, out), ())
    if top.text("job", "extension") != "extension":
        top.refuse("job", f"{top.raw('job')!r} jobs are not available in Detour; allowed: extension")
    config = top.part("config", keys.CONFIG)
    processes = config.parts("process", keys.PROCESS)
    tree: dict[str, Any] = {"output_name": _output_name(config, processes)}
    if processes:
        folders = [process.value("training_folder") for process in processes]
        if folders[0].given:
            tree["output_folder"] = folders[0]
        for process, folder in zip(processes[1:], folders[1:], strict=True):
            if folder.given and folder.value != folders[0].value:
                process.refuse("training_folder", f"all processes write to one folder, {folders[0].value}")
    tree["process"] = [_process(process) for process in processes] if config.has("process") else None
    out.data = out.place({"config": tree, "meta": top.value("meta", {})}, ())
    for section in ("model", "network", "train", "sample", "save", "logging"):
        for process in processes:
            out.origins.setdefault((*process.at, section), (*process.at, section))
    for process in processes:
        assumed_note(out, process.at)
    return out


def _filled(data: dict[str, Any], out: Translation) -> Any:  # noqa: ANN401
    """The file with `[name]` replaced. ai-toolkit also fills in `${VARIABLES}`: those are refused."""
    config = data.get("config")
    name = config.get("name") if isinstance(config, dict) else None

    def fill(text: str, key: Key) -> str:
        if match := re.search(r"\$\{[^}]+\}", text):
            out.problems.append(Problem(key, f"{match[0]} is not filled in from the environment; write the value"))
        return text.replace("[name]", name) if isinstance(name, str) else text

    return map_texts(data, fill)


def _output_name(config: Part, processes: list[Part]) -> Value:
    if len(processes) == 1 and processes[0].has("name"):
        return processes[0].value("name")
    if not config.has("name"):
        config.refuse("name", "missing; it names the run and its LoRA")
        return config.value("name", "unnamed")
    for process in processes:
        if process.has("name"):
            process.note("name", f"{process.raw('name')}: a job has one name, config.name")
    return config.value("name")


def _process(part: Part) -> dict[str, Any]:
    kind = part.raw("type")
    if kind in keys.OTHER_PROCESS_TYPES:
        part.refuse("type", f"{kind!r} is not available in Detour; allowed: {', '.join(keys.PROCESS_TYPES)}")
    elif kind not in keys.PROCESS_TYPES:
        part.refuse("type", one_of(kind, keys.PROCESS_TYPES))
    model_part = part.part("model", keys.MODEL)
    model, arch = _model(model_part)
    train = part.part("train", keys.TRAIN)
    datasets = part.parts("datasets", keys.DATASET)
    logging, seed = _logging(part), {}
    if part.has("training_seed"):
        seed = {"seed": part.value("training_seed")}
    return {
        "type": "train",
        "device": part.value("device", "auto"),
        "trigger_word": part.value("trigger_word").map(lambda word: word or None),
        "model": model,
        "network": _network(part, arch),
        "datasets": datasets_of(part, datasets, train),
        "train": {**train_of(train, arch, datasets), **seed},
        "controls": controls_of(model_part, train, arch),
        "sample": sample_of(part, train, arch),
        "save": _save(part.part("save", keys.SAVE)),
        "logging": logging,
    }


def _model(part: Part) -> tuple[dict[str, Any], str]:
    """The section, and the architecture without a variant."""
    arch = part.value("arch")
    if not arch.given:
        flags = [flag for flag in keys.ARCH_FLAGS if part.flag(flag, default=False)]
        arch = Value(keys.ARCH_FLAGS[flags[-1]], part.key(flags[-1])) if flags else part.value("arch", "sd1")
        if {"is_pixart", "is_pixart_sigma"} <= set(flags):
            arch = Value("pixart_sigma", part.key("is_pixart_sigma"))
    arch = arch.map(lambda name: "sd1" if name == "sd15" else name)
    quantize = part.flag("quantize", default=False)
    quantize_te = part.flag("quantize_te", default=quantize)
    section: dict[str, Any] = {
        "arch": arch,
        "name_or_path": part.value("name_or_path"),
        "extras_name_or_path": part.value("extras_name_or_path").map(lambda path: path or None),
        "assistant_lora_path": part.value("assistant_lora_path").map(lambda path: _adapter_file(path) or None),
        "quantize": Value(quantize, part.key("quantize")),
        "quantize_te": Value(quantize_te, part.key("quantize_te")),
        "low_vram": part.value("low_vram", False),
    }
    if part.flag("layer_offloading", default=part.flag("auto_memory", default=False)):
        section["layer_offloading"] = part.value("layer_offloading", True)
    section |= {name: _qtype(part, name) for name, on in (("qtype", quantize), ("qtype_te", quantize_te)) if on}
    return section, str(arch.value).split(":", maxsplit=1)[0]


def _adapter_file(path: object) -> object:
    """ai-toolkit takes a hub repository for the file that its adapter for FLUX has in it."""
    if isinstance(path, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and not path.endswith(".safetensors"):
        return path if Path(path).exists() else f"{path}/pytorch_lora_weights.safetensors"
    return path


def _qtype(part: Part, name: str) -> Value:
    value = part.value(name, "qfloat8")
    if isinstance(value.value, str) and "|" in value.value:
        part.refuse(name, "there are no accuracy recovery adapters; write the type alone, without '|'")
        return value.map(lambda _: "float8")
    ours = QTYPE_ALIASES.get(value.value) if isinstance(value.value, str) else None
    if ours is not None and ours not in (value.value, value.value.removeprefix("q")):
        part.note(name, f"{value.value}: runs as {ours} (docs/options.md, quantisation)")
    return value


def _network(process: Part, arch: str) -> dict[str, Any]:
    if not process.has("network"):
        process.note("network", "not there: the whole denoiser is trained (network.type: full), as in ai-toolkit")
        return {"type": "full"}
    part = process.part("network", keys.NETWORK)
    kind = part.text("type", "lora").lower()
    if kind not in ("lora", "lokr", "dora"):
        part.refuse("type", f"{kind!r} is not available in Detour; allowed: lora, lokr, dora")
        kind = "lora"
    rank = part.value("rank") if part.has("rank") else part.value("linear", 4)
    kwargs = part.part("network_kwargs", keys.NETWORK_KWARGS)
    section: dict[str, Any] = {
        "type": Value(kind, part.key("type")),
        "linear": rank,
        "dropout": part.value("dropout", 0.0),
        "transformer_only": part.value("transformer_only", True),
        "include": as_patterns(kwargs, "only_if_contains"),
        "exclude": as_patterns(kwargs, "ignore_if_contains"),
        "pretrained_lora_path": part.value("pretrained_lora_path").map(lambda path: path or None),
    }
    if kind == "lokr":
        section["lokr_factor"] = part.value("lokr_factor", -1)
        section["lokr_full_rank"] = part.value("lokr_full_rank", True)
    else:
        section["linear_alpha"] = _alpha(part, arch, rank)
    if part.raw("conv"):
        why = "convolutions are not adapted" if arch in keys.UNETS else f"{arch} has no convolutions to adapt"
        part.note("conv", f"{shown(part.raw('conv'))}: {why}")
    return section


def _alpha(part: Part, arch: str, rank: Value) -> Value:
    """ai-toolkit forces alpha to the rank for transformers, whatever the file says."""
    name = "linear_alpha" if part.has("linear_alpha") else "alpha"
    alpha = part.value(name, 1.0)
    if arch in keys.ALPHA_COUNTS:
        return alpha
    if alpha.given and alpha.value != rank.value:
        part.note(name, f"{shown(alpha.value)}: ai-toolkit trains {arch} with alpha = rank; so does this job")
    return Value(None, rank.key)


def _save(part: Part) -> dict[str, Any]:
    return {
        "dtype": part.value("dtype", "float16").map(lambda name: keys.DTYPES.get(str(name), name)),
        "save_every": part.value("save_every", 1000),
        "max_step_saves_to_keep": part.value("max_step_saves_to_keep", 5),
    }


def _logging(process: Part) -> dict[str, Any]:
    part = process.part("logging", keys.LOGGING)
    section = {
        "log_every": part.value("log_every", 100),
        "wandb": part.value("use_wandb", False),
        "project_name": part.value("project_name", "ai-toolkit"),
        "run_name": part.value("run_name"),
    }
    if not section["wandb"].value:
        del section["project_name"], section["run_name"]
    if process.raw("log_dir"):
        process.note("log_dir", f"{process.raw('log_dir')}: TensorBoard files go into the run's folder")
        section["tensorboard"] = Value(True, process.key("log_dir"))
    return section
