"""A job from its file to its LoRA: folders, locks, resuming, the loop, the final files."""

from __future__ import annotations

import re
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from detour import UserError, archs, files
from detour.adapter import HELD_OUT
from detour.config.load import changed_options, dump_job, run_folder
from detour.events import EndEvent, JsonlSink, StartEvent, Tee, WarningEvent
from detour.report import page
from detour.trackers import open_trackers
from detour.train import build, checkpoint
from detour.train.loop import FINISHED, Progress, train
from detour.train.run import lora_files

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from detour.config.job import Job, Process
    from detour.events import Event, Sink
    from detour.train.control import Control
    from detour.train.run import Run

_NO_INFLUENCE = re.compile(
    r"(process\[\d+\]\.)?(config\.output_\w+|(meta|sample|save|logging|preserve\.(drift|gate|distill_patch|deploy_on))\b[^:]*"
    r"|train\.(num_workers|cache_folder|dataset_folder|unload_text_encoder|max_bad_steps|save_every_n_epochs)"
    r"|validation\.(validate_every|times|max_images|dataset\b[^:]*)"
    r"|adapter\.(prompts_file|stop\.(every|times|patience|tolerance|least|sharpness))"
    r"|datasets\[\d+\]\.(folder_path|mask_path|captions_file|bad_images)): "
)
"""Changes that decide nothing about the weights. Where pictures lie is one: their contents are compared by hash."""

_NO_REPORT = (UserError, OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError)
"""What making a report may end with, besides the errors of its templates."""


@dataclass(frozen=True)
class Result:
    """What a process of a job came to."""

    folder: Path
    reason: str
    """`finished`, or why it was stopped."""
    step: int
    lora: Path | None
    """The finished LoRA (or the folder of the fine-tuned denoiser); None when it was stopped before."""

    @property
    def finished(self) -> bool:
        """Whether all steps were done."""
        return self.reason == FINISHED


class _Warnings:
    """Keeps the warnings that come before the run's folder is touched, for its log."""

    def __init__(self) -> None:
        self.events: list[WarningEvent] = []

    def emit(self, event: Event) -> None:
        if isinstance(event, WarningEvent):
            self.events.append(event)

    def close(self) -> None:
        """Nothing is open."""


def run_job(job: Job, control: Control, sink: Sink, *, fresh: bool = False) -> list[Result]:
    """Run every process of a job, in order. Goes on from the newest valid checkpoint unless `fresh`."""
    processes = [archs.resolve(process) for process in job.config.process]
    resolved = job.model_copy(update={"config": job.config.model_copy(update={"process": processes})})
    results: list[Result] = []
    for index, process in enumerate(processes):
        control.begin(index, run_folder(job, index))
        results.append(_run_process(resolved, process, run_folder(job, index), control, sink, fresh=fresh))
        if not results[-1].finished:
            break
    return results


def _run_process(job: Job, process: Process, folder: Path, control: Control, console: Sink, *, fresh: bool) -> Result:
    name, started = files.safe_name(job.config.output_name), time.monotonic()
    found = _Warnings()
    inputs = build.gather(process, Tee(console, found))  # every error, before a folder is touched or a weight is read
    with ExitStack() as stack:
        _claim(stack, folder)
        if fresh:
            _set_aside(folder)

        def tell(message: str) -> None:
            _warn(console, message)

        own = Tee(
            JsonlSink(folder / "events.jsonl", warn=tell), *open_trackers(process.logging, folder, name, warn=tell)
        )
        stack.callback(own.close)
        sink = Tee(console, own)
        for warning in found.events:
            own.emit(warning)
        control.discard_old()
        text = dump_job(job)
        files.write_bytes(folder / "job.yaml", text)
        for place in (folder, folder / "samples"):
            files.remove_stale(place)
        snapshot = _newest(folder / "checkpoints", sink)
        loras = lora_files(folder, name, process.save.formats)
        if snapshot is not None and _finished(snapshot, text, loras):
            onward = "lower adapter.stop.tolerance" if process.type == "adapter" else "raise train.steps (or epochs)"
            _warn(sink, f"this run is finished; {onward} to go on, or start over with --fresh")
            sink.emit(EndEvent(step=snapshot.step, reason=FINISHED, seconds=time.monotonic() - started))
            return Result(folder, FINISHED, snapshot.step, loras[0])
        run = build.build(inputs, folder, name, text, sink, control.end_if_asked)
        progress = _resume(run, snapshot) if snapshot is not None else Progress()
        run.start(progress)
        stack.push(_report_at_the_end(folder, sink))
        sink.emit(
            StartEvent(
                step=progress.step,
                total_steps=run.total_steps,
                name=name,
                arch=process.model.arch,
                resumed_from=str(folder / "checkpoints" / checkpoint.folder_name(progress.step)) if snapshot else None,
                facts={name: str(fact) for name, fact in run.facts.items()} | {"pictures": str(run.images)},
            )
        )
        if progress.step == 0:
            run.check_teacher()
        reason = train(run, progress, control)
        exported = run.finish(progress) if reason == FINISHED else None
        sink.emit(EndEvent(step=progress.step, reason=reason, seconds=time.monotonic() - started))
        return Result(folder, reason, progress.step, exported)


def _report_at_the_end(folder: Path, sink: Sink) -> Callable[..., None]:
    """For an exit stack: write `report.html`, however the run ends, but for a second Ctrl-C, which stops at once."""

    def leave(kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not issubclass(kind, Exception):
            return
        from jinja2 import TemplateError

        try:
            page.write(folder)
        except (TemplateError, *_NO_REPORT) as error:  # what was trained is saved, and counts more than a page about it
            message = f"report.html was not written ({type(error).__name__}: {error})"
            _warn(sink, f"{message}; `detour report {folder}` makes it, once that is put right")

    return leave


def _claim(stack: ExitStack, folder: Path) -> None:
    """One run at a time in a folder: two would overwrite each other's checkpoints."""
    files.make_folder(folder)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        stack.enter_context(lock)
    except Timeout as error:
        raise UserError(
            f"{folder}: another run is writing there; wait for it, stop it, or change config.output_name"
        ) from error


def _set_aside(folder: Path) -> None:
    """Start afresh without losing anything: what is there moves into `old-1`, `old-2`, ... beside it."""
    there = [path for path in folder.iterdir() if path.name != ".lock"]
    if not there:
        return
    number = 1
    while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    files.make_folder(target)
    for path in there:
        path.rename(target / path.name)


def _finished(snapshot: checkpoint.Snapshot, text: str, loras: list[Path]) -> bool:
    """Has a run come to its end with this very job file, down to its last LoRA file? Then nothing is left to do."""
    ended = snapshot.step == snapshot.state["total_steps"] and snapshot.job_yaml == text
    return ended and all(path.is_file() for path in loras)


def _newest(folder: Path, sink: Sink) -> checkpoint.Snapshot | None:
    """The newest checkpoint that is whole; None before the first. Starting over would be a loss to decide on."""
    snapshot = checkpoint.newest_valid(folder, lambda message: _warn(sink, message))
    if snapshot is None and any(".tmp-" not in path.name for path in folder.glob("step-*")):  # those were never whole
        raise UserError(
            f"{folder}: every checkpoint is damaged; restore one from a copy, or start over with --fresh, which moves "
            f"what is there aside"
        )
    return snapshot


def _resume(run: Run, snapshot: checkpoint.Snapshot) -> Progress:
    """Put a checkpoint into the run; say what has changed since it was written."""
    options = changed_options(snapshot.job_yaml, run.job_yaml)
    changes = [change for change in options if not _NO_INFLUENCE.match(change)]
    changes += checkpoint.changes(snapshot.state["facts"], run.facts)
    if changes:
        message = "something has changed since the checkpoint: the run goes on, but not bit for bit as it would have"
        run.sink.emit(WarningEvent(step=snapshot.step, message=message, details=changes))
    run.restore(snapshot)
    progress = Progress(**snapshot.state["progress"])
    if snapshot.state["facts"].get(HELD_OUT) != run.facts.get(HELD_OUT):
        progress.held_out = []  # losses of other pictures, or of other noise
    return progress


def _warn(sink: Sink, message: str) -> None:
    sink.emit(WarningEvent(step=None, message=message))
