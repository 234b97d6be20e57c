"""`detour check`: everything about a job that can be found out without a model and without torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detour import RefusedError, UserError, archs
from detour.config.document import JobError
from detour.config.job import AdapterProcess, TrainProcess
from detour.data import health, own_pictures
from detour.data.scan import scan
from detour.train import checks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from detour.archs.base import ArchSpec, Variant
    from detour.config.job import DatasetConfig, Process
    from detour.config.load import Loaded
    from detour.data.scan import Scan

_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_LISTED = 5  # names shown in a warning; the rest is counted
# An option at the beginning of a line of an error: `model.dtype: ...`, `train.lr must ...`, `datasets[0]: upscale: ...`
_NAME = r"[a-z_]+(?:\[\d+\])?"
_OPTION = re.compile(rf"(?P<indent>\s*)(?P<option>{_NAME}(?:\.{_NAME})*)(?:: (?P<inner>[a-z_]+)(?=:))?")


def check_job(loaded: Loaded) -> dict[str, Any]:
    """Errors (each with its line), warnings, a summary and figures of each process.

    `exit_code` is 0, or what `detour run` would end with before it starts.
    """
    report: dict[str, Any] = {
        "ok": True, "exit_code": 0, "errors": [], "warnings": [], "summary": [], "processes": []
    }  # fmt: skip
    found: list[UserError] = []
    for index, process in enumerate(loaded.job.config.process):
        for error in _check_process(process, report):
            found.append(error)
            report["errors"].append(located(loaded, str(error), index))
    if found:
        refused = all(isinstance(error, RefusedError) for error in found)
        report |= {"ok": False, "exit_code": RefusedError.exit_code if refused else UserError.exit_code}
    return report


def failed(error: UserError) -> dict[str, Any]:
    """The report on a job file that could not be read."""
    errors = [str(mistake) for mistake in error.mistakes] if isinstance(error, JobError) else [str(error)]
    return {
        "ok": False, "exit_code": error.exit_code, "errors": errors, "warnings": [], "summary": [], "processes": []
    }  # fmt: skip


def located(loaded: Loaded, message: str, process: int = 0) -> str:
    """An error found after the job file was read, with `job.yaml:12: ` before each line that names an option."""
    return "\n".join(_located(loaded, line, process) for line in message.splitlines())


def _located(loaded: Loaded, line: str, process: int) -> str:
    match = _OPTION.match(line)
    if match is None:
        return line
    option, inner = match["option"], match["inner"]
    section, _, name = option.partition(".")
    whole = loaded.job.config.process[process]
    if section.startswith("datasets["):
        if whole.train.dataset_folder is not None:  # the short form of a dataset
            option = "train.dataset_folder"
        elif inner is not None:
            option = f"{option}.{inner}"
    elif section not in type(whole).model_fields or not (name or line[match.end("option") :].startswith(":")):
        return line  # a word like another
    return f"{match['indent']}{loaded.place(option, process)}: {line.removeprefix(match['indent'])}"


def _check_process(process: Process, report: dict[str, Any]) -> Iterator[UserError]:
    """Add a process to the report; yield what is wrong with it."""
    try:
        resolved = archs.resolve(process)
    except UserError as error:
        yield error
        return
    facts, (name, variant) = archs.spec(resolved.model.arch), archs.variant_of(resolved)
    yield from _paths(resolved)
    yield from _sizes(resolved, facts)
    report["warnings"] += archs.advice(resolved)
    if isinstance(resolved, AdapterProcess):
        yield from _own_pictures(resolved, f"{facts.title} {name}", report)
        return
    yield from _kept(resolved, facts, variant, report)
    validation = resolved.validation.dataset
    if validation is not None:
        try:
            _scan([validation], resolved, facts, report)
        except UserError as error:
            yield type(error)(f"validation.dataset: {error}")
    try:
        found = _scan(resolved.all_datasets, resolved, facts, report)
        checks.rich_captions(resolved, found.pictures)
    except UserError as error:
        yield error
        return
    captions = sum(len(picture.captions) for picture in found.pictures)
    counts = {"pictures": len(found.pictures), "captions": captions, "skipped": len(found.skipped)}
    length = f"{resolved.train.epochs} epochs" if resolved.train.epochs else f"{resolved.train.steps} steps"
    report["processes"].append({"arch": facts.name, "variant": name, **counts})
    sampling = f"{resolved.sample.sample_steps} steps, guidance {resolved.sample.guidance_scale:g}"
    kind = "distilled, " if variant.distilled else ""
    report["summary"].append(
        f"{facts.title} {name} ({kind}{sampling}), {counts['pictures']} pictures with {counts['captions']} captions, "
        f"{length}"
    )


def _kept(process: TrainProcess, facts: ArchSpec, variant: Variant, report: dict[str, Any]) -> Iterator[UserError]:
    """What `preserve` asks for and cannot have."""
    report["warnings"] += checks.advice(process, variant)
    try:
        checks.check(process, facts, variant)
    except UserError as error:
        yield error


def _own_pictures(process: AdapterProcess, title: str, report: dict[str, Any]) -> Iterator[UserError]:
    """What a job draws that makes a training adapter."""
    try:
        drawings = own_pictures.plan(process.adapter)
    except UserError as error:
        yield error
        return
    prompts, held_out = len({drawing.prompt for drawing in drawings}), process.adapter.stop.held_out
    counts = {"pictures": len(drawings), "captions": prompts, "skipped": 0}
    report["processes"].append({"arch": process.model.arch, "variant": process.model.variant, **counts})
    report["summary"].append(
        f"{title}: a training adapter from {len(drawings)} pictures of its own ({process.adapter.sample_steps} steps "
        f"each, {prompts} prompts, {held_out} held out), at most {process.train.steps} steps"
    )


def _scan(datasets: Sequence[DatasetConfig], process: TrainProcess, facts: ArchSpec, report: dict[str, Any]) -> Scan:
    """Look at every picture; findings go into the report."""
    found = scan(datasets, trigger=process.trigger_word, divisibility=facts.bucket_divisibility)
    report["warnings"] += [f"{finding.message}: {_some(finding.details)}" for finding in found.findings]
    _, variant = archs.variant_of(process)
    tokens = variant.text_tokens or facts.text_tokens
    for config, seen in health.beyond_scan(found, datasets, text_tokens=tokens, trigger=process.trigger_word):
        named = tuple(" = ".join(item.keys) + (f" ({item.note})" if item.note else "") for item in seen.items)
        where = f"{config.folder_path.expanduser()}: {seen.rule.title}: {len(named)}"
        report["warnings"].append(f"{where}: {_some(named)} ({seen.rule.why}; {seen.rule.advice})")
    report["warnings"] += [f"left out: {problem.path} {problem.reason}" for problem in found.skipped]
    return found


def _sizes(process: Process, facts: ArchSpec) -> Iterator[UserError]:
    """Sizes of previews that the model cannot draw."""
    settings = process.sample
    if settings.disable_sampling:
        return
    named = [("sample", settings.width, settings.height)] if len(settings.prompts) == 0 else []
    for index, prompt in enumerate(settings.prompts):
        named.append((f"sample.prompts[{index}]", prompt.width or settings.width, prompt.height or settings.height))
    said: set[str] = set()
    for option, width, height in named:
        problem = facts.size_problem(width, height)
        if problem is not None and problem not in said:  # the size that all prompts share is said once
            said.add(problem)
            yield UserError(f"{option}: {problem}")


def _paths(process: Process) -> Iterator[UserError]:
    """Paths that are pickles, or not there and no names on the hub. What is on the hub is found when the job runs."""
    model = process.model
    advice = {
        1: "give a folder in the diffusers layout, a .safetensors file, or a hub id such as Tongyi-MAI/Z-Image-Turbo",
        2: "give a local .safetensors file or user/repo/file.safetensors on the hub",
    }
    named = (
        ("model.name_or_path", model.name_or_path, 1),
        ("model.extras_name_or_path", model.extras_name_or_path, 1),
        ("model.assistant_lora_path", model.assistant_lora_path, 2),
        ("network.pretrained_lora_path", process.network.pretrained_lora_path, 2),
        *(_beside(process) if isinstance(process, TrainProcess) else ()),
    )
    for option, name, slashes in named:
        if name is None:
            continue
        path = Path(name).expanduser()
        if path.suffix in _PICKLES:
            yield UserError(f"{option}: {name} is a pickle, which runs code when opened; take a .safetensors file")
        elif not (path.is_file() or (slashes == 1 and path.is_dir()) or _on_hub(name, slashes)):
            yield UserError(f"{option}: there is no {name}; {advice[slashes]}")
    for index, prompt in enumerate(process.sample.prompts):
        for option, picture in (("control", prompt.control), ("inpaint", prompt.inpaint)):
            if picture is not None and not picture.expanduser().is_file():
                yield UserError(f"sample.prompts[{index}].{option}: there is no {picture}; give a picture")


def _beside(process: TrainProcess) -> Iterator[tuple[str, str | None, int]]:
    """Models and LoRAs besides the one that is trained. Of `FILE:strength` the file."""
    preserve = process.preserve
    yield "preserve.deploy_on", preserve.deploy_on, 1
    loras = {"preserve.distill_patch": preserve.distill_patch}
    if preserve.delta is not None:
        yield "preserve.delta.model", preserve.delta.model, 1
        loras["preserve.delta.lora"] = preserve.delta.lora
    for option, name in loras.items():
        yield option, name and re.sub(r":-?[0-9.]+$", "", name), 2


def _on_hub(name: str, slashes: int) -> bool:
    """Can it be a name on the hub: `user/repo` with one slash, `user/repo/file.safetensors` with two or more?"""
    if name.startswith(("/", ".", "~")) or name.endswith("/"):
        return False
    return name.count("/") == slashes or (name.count("/") > 1 and name.endswith(".safetensors"))


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
