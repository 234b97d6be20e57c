"""A run's folder, opened for reading: its job file, its history, its LoRA files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from detour import UserError, archs
from detour.config.job import AdapterProcess, TrainProcess
from detour.config.load import job_differences, load_text, run_folder
from detour.report import words
from detour.report.history import read_history
from detour.report.lora import loras

if TYPE_CHECKING:
    from pathlib import Path

    from detour.archs.base import ArchSpec, Variant
    from detour.config.job import Job, Process
    from detour.report.history import History
    from detour.report.lora import LoraOnDisk

JOB = "job.yaml"
EVENTS = "events.jsonl"


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """What is known of a run. Nothing of it changes."""

    path: Path
    text: str
    """The job file, every value visible."""
    job: Job
    process: TrainProcess
    """The process of the job that this run is; where that makes a training adapter, the training in it."""
    makes_adapter: bool
    """It makes a training adapter, from pictures that the model draws itself."""
    spec: ArchSpec
    variant_name: str
    variant: Variant
    history: History
    loras: list[LoraOnDisk]

    @property
    def settings(self) -> list[tuple[str, str | None, str | None]]:
        """Option, usual value, value: where a setting is not as it would be if it were left out.

        Options that are not set inside sections that are there (a prompt's `neg: null`) are not listed.
        """
        usual = [_usual(process) for process in self.job.config.process]
        config = self.job.config.model_copy(update={"process": usual})
        found = job_differences(self.job.model_copy(update={"config": config, "meta": {}}), self.job)
        return [row for row in found if row[2] is not None and not (row[1] is None and row[2] == "null")]


def open_run(path: Path, *, steps: bool = True) -> RunFolder:
    """Read a run's folder, without `steps` the history of all else. UserError says what is missing or damaged."""
    history = read_history(path / EVENTS, steps=steps)
    text, job, given = read_job(path)
    process = training(given)
    variant_name, variant = archs.variant_of(process)
    proofs = {words.last_part(save["lora"]): save.get("proof") for save in history.saves if save["lora"]}
    return RunFolder(
        path=path,
        text=text,
        job=job,
        process=process,
        makes_adapter=isinstance(given, AdapterProcess),
        spec=archs.spec(process.model.arch),
        variant_name=variant_name,
        variant=variant,
        history=history,
        loras=loras(path, job.config.output_name, process.save.formats, proofs),
    )


def read_job(path: Path) -> tuple[str, Job, Process]:
    """The job file that a run has left in its folder: its text, the job, and which of its processes this was."""
    try:
        text = (path / JOB).read_bytes().decode()
    except FileNotFoundError:
        raise UserError(f"{path / JOB} does not exist; every run writes it beside its {EVENTS}") from None
    except ValueError:
        raise UserError(f"{path / JOB} is not text in UTF-8; it was damaged or edited") from None
    job = load_text(text, str(path / JOB)).job
    return text, job, job.config.process[_index(job, path)]


def _index(job: Job, path: Path) -> int:
    """Which process of the job left its files in this folder: its name says, where there are several."""
    names = [run_folder(job, index).name for index in range(len(job.config.process))]
    if len(names) == 1:
        return 0
    if (name := path.resolve().name) in names:
        return names.index(name)
    raise UserError(
        f"{path}: its job has {len(names)} processes, and the folder's name tells which one it is; give it back the "
        f"name {' or '.join(names)}"
    )


def training(process: Process) -> TrainProcess:
    """The training that a process does."""
    return process if isinstance(process, TrainProcess) else process.training()


def _usual(process: Process) -> Process:
    """The process as it would be with nothing but its architecture and its pictures given."""
    model = {"arch": process.model.arch, "variant": process.model.variant}
    if isinstance(process, AdapterProcess):
        return archs.resolve(AdapterProcess.model_validate({"type": "adapter", "model": model}))
    pictures = [{"folder_path": str(dataset.folder_path)} for dataset in process.datasets]
    folder = {} if process.train.dataset_folder is None else {"dataset_folder": str(process.train.dataset_folder)}
    given = {"type": "train", "model": model, "datasets": pictures, "train": folder}
    return archs.resolve(TrainProcess.model_validate(given))
