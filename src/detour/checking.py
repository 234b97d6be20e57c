"""`detour check`: everything about a job that can be found out without a model and without torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from detour import UserError, archs
from detour.data.scan import scan

if TYPE_CHECKING:
    from detour.config.job import Job, TrainProcess


def check_job(job: Job) -> dict[str, Any]:
    """Warnings, a summary and figures of each process. Raises UserError with every error of every process at once."""
    errors: list[str] = []
    report: dict[str, Any] = {"ok": True, "warnings": [], "summary": [], "processes": []}
    for process in job.config.process:
        _check_process(process, report, errors)
    if errors:
        raise UserError("\n".join(errors))
    return report


def _check_process(process: TrainProcess, report: dict[str, Any], errors: list[str]) -> None:
    try:
        resolved = archs.resolve(process)
    except UserError as error:
        errors.append(str(error))
        return
    facts, (name, variant) = archs.spec(resolved.model.arch), archs.variant_of(resolved)
    errors += [message for message in map(_missing_file, _files(resolved)) if message]
    report["warnings"] += archs.advice(resolved)
    try:
        found = scan(resolved.all_datasets, trigger=resolved.trigger_word, divisibility=facts.bucket_divisibility)
    except UserError as error:
        errors.append(str(error))
        return
    report["warnings"] += [f"{finding.message}: {_some(finding.details)}" for finding in found.findings]
    report["warnings"] += [f"left out: {problem.path} {problem.reason}" for problem in found.skipped]
    pictures, captions = len(found.pictures), sum(len(picture.captions) for picture in found.pictures)
    length = f"{resolved.train.epochs} epochs" if resolved.train.epochs else f"{resolved.train.steps} steps"
    counts = {"pictures": pictures, "captions": captions, "skipped": len(found.skipped)}
    report["processes"].append({"arch": facts.name, "variant": name, **counts})
    sampling = f"{resolved.sample.sample_steps} steps, guidance {resolved.sample.guidance_scale:g}"
    kind = "distilled, " if variant.distilled else ""
    report["summary"].append(
        f"ok: {facts.title} {name} ({kind}{sampling}), {pictures} pictures with {captions} captions, {length}"
    )


def _files(process: TrainProcess) -> list[tuple[str, str]]:
    named = (
        ("model.assistant_lora_path", process.model.assistant_lora_path),
        ("network.pretrained_lora_path", process.network.pretrained_lora_path),
    )
    return [(option, path) for option, path in named if path]


def _missing_file(named: tuple[str, str]) -> str | None:
    """A path that cannot be a hub name and is not there. What is on the hub is found when the job runs."""
    option, path = named
    hub = len(path.split("/")) >= 3 and not path.startswith(("/", ".", "~"))
    if hub or Path(path).expanduser().is_file():
        return None
    return f"{option}: there is no file {path}; give a local .safetensors file or user/repo/file.safetensors on the hub"


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
