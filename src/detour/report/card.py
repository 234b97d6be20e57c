"""The model card of a LoRA for the hub: `README.md`, and the pictures that it shows.

What it says is public: names on the hub, settings, figures, hashes, the previews' prompts and the trigger word. No path
of this machine gets in, and nothing from the job file that is not listed here.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detour import UserError, __version__, archs, files
from detour.config.writing import block
from detour.report import words
from detour.report.lora import KINDS, header

if TYPE_CHECKING:
    from detour.archs.base import Variant
    from detour.config.job import TrainProcess
    from detour.report.folder import RunFolder

PICTURES = 6
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*")
LICENCES = {
    "Apache-2.0": "apache-2.0",
    "CreativeML Open RAIL-M": "creativeml-openrail-m",
    "CreativeML Open RAIL++-M": "openrail++",
}
"""The hub's names of licences; those that it does not list are `other`."""
_LINES = re.compile(r"\s*[\r\n\u2028\u2029]+\s*")
_MARKS = re.compile(r"([\\`*_{}\[\]<>#|!&~$])")


@dataclass(frozen=True, kw_only=True)
class CardOf:
    """The file that a card is about, and what only its author can say."""

    file: Path
    name: str
    """Its name on the hub."""
    format: str
    step: int
    proof: str | None = None
    """Who loaded it back when it was written."""
    base: str | None = None
    """Hub id of the model that it was trained on, where the job names another place for it."""
    repository: str | None = None
    """Hub id that it will have."""

    def __post_init__(self) -> None:
        for what, name in (("the base model", self.base), ("the repository", self.repository)):
            if name is not None and HUB_ID.fullmatch(name) is None:
                raise UserError(f"{what}: {name!r} is not a name on the hub, such as Tongyi-MAI/Z-Image-Turbo")


@dataclass(frozen=True)
class Picture:
    """A preview that the card shows."""

    path: Path
    prompt: str
    seed: int

    @property
    def place(self) -> str:
        """Its path beside the card."""
        return f"images/{self.path.name}"


def model_card(run: RunFolder, about: CardOf) -> str:
    """The text of the card."""
    parts = [
        "---\n" + "\n".join(block(_front(run, about))) + "\n---",
        f"# {plain(run.history.name)}",
        _introduction(run, about),
        "<Gallery />" if pictures(run, about.step) else "",
        _with_diffusers(run, about),
        _with_comfyui(run, about),
        _elsewhere(run, about),
        "## How it was trained\n\n" + _table(_training(run, about)),
        "## Files and hashes\n\n" + _table(_hashes(run, about)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def pictures(run: RunFolder, step: int) -> list[Picture]:
    """The previews of a step, or of the last one before it that has any; at most `PICTURES`."""
    steps = [int(record["step"]) for record in run.history.samples if int(record["step"]) <= step]
    records = [record for record in run.history.samples if steps and record["step"] == max(steps)]
    folder = run.path / "samples"
    found = [Picture(folder / words.last_part(r["path"]), str(r["prompt"]), int(r["seed"])) for r in records]
    return [picture for picture in found if picture.path.is_file()][:PICTURES]


def base_model(run: RunFolder, about: CardOf) -> str | None:
    """The hub id of the model that was trained; None where the job names a place of this machine."""
    name = run.process.model.name_or_path
    published = {variant.repo for variant in run.spec.variants.values()}
    return about.base or (name if name in published else None)


def plain(text: str) -> str:
    """The user's words in Markdown: on one line, with no sign that means anything."""
    return _MARKS.sub(r"\\\1", _LINES.sub(" ", text))


def code(text: str) -> str:
    """The user's words in Markdown as they are, on one line."""
    line = _LINES.sub(" ", text)
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    space = " " if line[:1] in ("`", " ") or line[-1:] in ("`", " ") else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def instructions(process: TrainProcess) -> str:
    """How the LoRA is used in ComfyUI."""
    _, variant = archs.drawn_variant(process)
    cfg = f"cfg {variant.guidance:g}"
    if archs.spec(process.model.arch).guidance_kind == "embedded":
        cfg = "cfg 1" + ("" if variant.fixed_guidance else f", FluxGuidance {variant.guidance:g}")
    used = f"Load LoRA with strength 1, then sample with {variant.steps} steps and {cfg}."
    if process.model.assistant_lora_path is None:
        return used
    return f"{used} Without the training adapter: it was on only while the LoRA learnt."


# --- the front matter -------------------------------------------------------------------------------------------------


def _front(run: RunFolder, about: CardOf) -> dict[str, Any]:
    task = "text-to-image" if run.spec.frame_factor is None else "text-to-video"
    base, trigger = base_model(run, about), _trigger(run)
    found: dict[str, Any] = {}
    if base is not None:
        found |= {"base_model": "/".join(base.split("/")[:2]), "base_model_relation": "adapter"}
    found |= _licence(run.variant.licence or run.spec.licence)
    found |= {"library_name": "diffusers", "pipeline_tag": task}
    kind = KINDS[run.process.network.type].lower()
    found["tags"] = [task, kind, "diffusers", "template:diffusion-lora", run.spec.name, "detour"]
    if trigger:
        found["instance_prompt"] = trigger
    if shown := pictures(run, about.step):
        found["widget"] = [{"text": picture.prompt, "output": {"url": picture.place}} for picture in shown]
    return found


def _licence(text: str) -> dict[str, str]:
    """As the hub writes it; the base model's, since a LoRA is bound by it."""
    if text in LICENCES:
        return {"license": LICENCES[text]}
    name = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
    return {"license": "other", "license_name": name}


def _trigger(run: RunFolder) -> str | None:
    words = [dataset.trigger_word for dataset in run.process.all_datasets if not dataset.is_reg]
    return next((word for word in [run.process.trigger_word, *words] if word), None)


# --- how to use it ----------------------------------------------------------------------------------------------------


def _introduction(run: RunFolder, about: CardOf) -> str:
    kind, base = KINDS[run.process.network.type], base_model(run, about)
    model = f"{run.spec.title} {run.variant_name}" + (f" ([{base}](https://huggingface.co/{base}))" if base else "")
    lines = [f"A {kind} for {model}, trained for {about.step} steps with Detour."]
    if not base:
        lines.append("It was trained on a copy of that model, or on one made from it, which this card does not name.")
    if trigger := _trigger(run):
        lines.append(f"Write {code(trigger)} in the prompt.")
    return " ".join(lines)


def _with_diffusers(run: RunFolder, about: CardOf) -> str:
    """Code for diffusers where its own loader has loaded the file back, and the model is there as a whole."""
    _, variant = archs.drawn_variant(run.process)
    whole = HUB_ID.fullmatch(variant.repo) is not None and variant.extras_repo is None
    loaded = about.proof is not None and "diffusers.loaders." in about.proof
    if not loaded or not whole or run.spec.controls:
        return ""
    return f"## With diffusers\n\n```python\n{_script(run, about, variant)}```"


def _script(run: RunFolder, about: CardOf, variant: Variant) -> str:
    sample, film = run.process.sample, run.process.sample.num_frames > 1
    name = variant.scheduler.get("_class_name")
    changes = {key: value for key, value in variant.scheduler.items() if key != "_class_name"}
    own = base_model(run, about) if run.process.preserve.deploy_on is None else None
    shown = pictures(run, about.step)
    prompt, seed = (shown[0].prompt, shown[0].seed) if shown else (_trigger(run) or "", sample.seed)
    lines = ["import torch", f"from diffusers import DiffusionPipeline{f', {name}' if name else ''}"]
    lines += ["from diffusers.utils import export_to_video"] if film else []
    lines += [
        "",
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        f"pipe = DiffusionPipeline.from_pretrained({own or variant.repo!r}, torch_dtype=torch.bfloat16).to(device)",
    ]
    if variant.scheduler:
        scheduler = name or "type(pipe.scheduler)"
        options = "".join(f", {key}={value!r}" for key, value in changes.items())
        lines.append(f"pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config{options})")
    place = about.repository or "."
    note = "" if about.repository else "  # the folder with the file, or this repository's name"
    lines += [
        f"pipe.load_lora_weights({place!r}, weight_name={about.name!r}){note}",
        "result = pipe(",
        f"    prompt={prompt!r},",
        f"    num_inference_steps={variant.steps},",
        f"    guidance_scale={run.spec.diffusers_guidance(variant.guidance):.1f},",
        f"    width={sample.width},",
        f"    height={sample.height},",
        *([f"    num_frames={sample.num_frames},"] if film else []),
        f'    generator=torch.Generator("cpu").manual_seed({seed}),',
        ")",
        f'export_to_video(result.frames[0], "sample.mp4", fps={sample.fps or run.spec.fps or 16:g})'
        if film
        else 'result.images[0].save("sample.png")',
    ]
    return "\n".join(lines) + "\n"


def _with_comfyui(run: RunFolder, about: CardOf) -> str:
    if about.format == "diffusers":
        return ""
    return f"## With ComfyUI\n\nPut {code(about.name)} into `models/loras`. {instructions(run.process)}"


def _elsewhere(run: RunFolder, about: CardOf) -> str:
    name, variant = archs.drawn_variant(run.process)
    own = base_model(run, about) if run.process.preserve.deploy_on is None else None
    file = shlex.quote(about.name)
    command = f"detour sample --arch {run.spec.name}:{name} --model {own or variant.repo} --lora {file} --prompt '...'"
    return f"## With Detour\n\n```sh\n{command}\n```"


# --- where it comes from ----------------------------------------------------------------------------------------------


def _training(run: RunFolder, about: CardOf) -> list[tuple[str, str]]:
    """The settings that are told."""
    process = run.process
    train, network, model = process.train, process.network, process.model
    count = run.history.facts.get("pictures") or _header(about.file).get("ss_num_train_items")
    more = train.gradient_accumulation
    sides = sorted({side for dataset in process.all_datasets for side in dataset.resolution})
    found = [
        ("Pictures", count or ""),
        ("Resolution", ", ".join(map(str, sides))),
        ("Steps", str(about.step)),
        ("Batch", str(train.batch_size) + (f", {more} times accumulated" if more > 1 else "")),
        ("Kind", f"{KINDS[network.type]}, rank {network.linear}, alpha {network.linear_alpha or network.linear:g}"),
        ("Text encoders", "trained too" if train.train_text_encoder else ""),
        ("Optimizer", f"{train.optimizer}, learning rate {train.lr:g}, {train.lr_scheduler}"),
        ("Times", f"{train.timestep_type}, {train.timestep_bias}"),
        ("Loss", train.loss_type),
        ("Precision", train.dtype + (f", base weights in {model.qtype}" if model.quantize else "")),
        ("Moving average", f"{train.ema_config.ema_decay:g}" if train.ema_config.use_ema else ""),
        ("Few steps kept by", (process.preserve.strategy or "").replace("_", " ")),
        ("Training adapter", _adapter(run)),
        ("Seed", str(train.seed)),
        ("Program", f"Detour {run.history.facts.get('detour', __version__)}"),
    ]
    return [(label, plain(value)) for label, value in found if value]


def _adapter(run: RunFolder) -> str:
    """The training adapter by its public name, where it has one."""
    given = run.process.model.assistant_lora_path
    if given is None:
        return ""
    public = {variant.adapter for variant in run.spec.variants.values()}
    return f"{given if given in public else 'one of its own'} ({run.process.model.assistant_lora_mode})"


def _hashes(run: RunFolder, about: CardOf) -> list[tuple[str, str]]:
    """sha256 of the file, and of what it was made from."""
    said, facts = _header(about.file), run.history.facts
    found = [
        (code(about.name), files.sha256_file(about.file)),
        ("training adapter", said.get("detour.training_adapter_sha256") or facts.get("training_adapter_sha256", "")),
        ("job file", said.get("detour.job_sha256", "")),
        ("dataset", facts.get("dataset_sha256", "")),
    ]
    return [(label, code(value)) for label, value in found if re.fullmatch("[0-9a-f]{64}", value)]


def _header(path: Path) -> dict[str, str]:
    return dict(header(path))


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in rows)])
