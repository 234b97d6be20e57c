"""A job from its file to its LoRA: folders, locks, resuming, the loop, the final files."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from detour import UserError, archs, files
from detour.config.load import changed_options, dump_job
from detour.events import EndEvent, JsonlSink, StartEvent, Tee, WarningEvent
from detour.train import build, checkpoint
from detour.train.loop import FINISHED, Progress, train

if TYPE_CHECKING:
    from pathlib import Path

    from detour.config.job import Job, LoggingConfig, TrainProcess
    from detour.events import Sink
    from detour.train.control import Control
    from detour.train.run import Run


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


def run_folder(job: Job, index: int = 0) -> Path:
    """Where process `index` of a job leaves its files: `<output_folder>/<output_name>`, `..._2` for the second."""
    name = files.safe_name(job.config.output_name)
    return job.config.output_folder / (name if index == 0 else f"{name}_{index + 1}")


def run_job(job: Job, control: Control, sink: Sink, *, fresh: bool = False) -> list[Result]:
    """Run every process of a job, in order. Goes on from the newest valid checkpoint unless `fresh`."""
    processes = [archs.resolve(process) for process in job.config.process]
    resolved = job.model_copy(update={"config": job.config.model_copy(update={"process": processes})})
    results: list[Result] = []
    for index, process in enumerate(processes):
        control.folder = run_folder(job, index)
        results.append(_run_process(resolved, process, run_folder(job, index), control, sink, fresh=fresh))
        if not results[-1].finished:
            break
    return results


def _run_process(
    job: Job, process: TrainProcess, folder: Path, control: Control, console: Sink, *, fresh: bool
) -> Result:
    name, started = files.safe_name(job.config.output_name), time.monotonic()
    inputs = build.gather(process, console)  # every error of the inputs, before a folder is touched or a weight is read
    with ExitStack() as stack:
        _claim(stack, folder)
        if fresh:
            _set_aside(folder)
        own = Tee(JsonlSink(folder / "events.jsonl"), *_trackers(process.logging, folder, name))
        stack.callback(own.close)
        sink = Tee(console, own)
        control.discard_old()
        text = dump_job(job)
        files.write_bytes(folder / "job.yaml", text)
        files.remove_stale(folder)
        snapshot = checkpoint.newest_valid(folder / "checkpoints", lambda message: _warn(sink, message))
        if snapshot is not None and (done := _finished(snapshot, text, folder, name)) is not None:
            _warn(sink, "this run is finished; raise train.steps (or epochs) to go on, or start over with --fresh")
            sink.emit(EndEvent(step=snapshot.step, reason=FINISHED, seconds=time.monotonic() - started))
            return done
        run = build.build(inputs, folder, name, text, sink)
        progress = _resume(run, snapshot) if snapshot is not None else Progress()
        run.start(progress)
        sink.emit(
            StartEvent(
                step=progress.step,
                total_steps=run.total_steps,
                name=name,
                arch=process.model.arch,
                resumed_from=str(folder / "checkpoints" / checkpoint.folder_name(progress.step)) if snapshot else None,
            )
        )
        reason = train(run, progress, control)
        exported = run.finish(progress) if reason == FINISHED else None
        sink.emit(EndEvent(step=progress.step, reason=reason, seconds=time.monotonic() - started))
        return Result(folder, reason, progress.step, exported)


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


def _trackers(logging: LoggingConfig, folder: Path, name: str) -> list[Sink]:
    from detour import trackers

    run_name = logging.run_name or name
    chosen: list[Sink] = []
    if logging.tensorboard:
        chosen.append(trackers.TensorBoardSink(folder / "tensorboard"))
    if logging.trackio:
        chosen.append(trackers.TrackioSink(logging.project_name, run_name, folder / "trackio"))
    if logging.wandb:
        chosen.append(trackers.WandbSink(logging.project_name, run_name, folder))
    return chosen


def _finished(snapshot: checkpoint.Snapshot, text: str, folder: Path, name: str) -> Result | None:
    """The result of a run that had come to its end with this very job file: nothing is left to do."""
    lora = folder / f"{name}.safetensors"
    ended = snapshot.step == snapshot.state["total_steps"] and snapshot.job_yaml == text
    return Result(folder, FINISHED, snapshot.step, lora) if ended and lora.is_file() else None


def _resume(run: Run, snapshot: checkpoint.Snapshot) -> Progress:
    """Put a checkpoint into the run; say what has changed since it was written."""
    changes = changed_options(snapshot.job_yaml, run.job_yaml)
    changes += checkpoint.changes(snapshot.state["facts"], run.facts)
    if changes:
        message = "something has changed since the checkpoint: the run goes on, but not bit for bit as it would have"
        run.sink.emit(WarningEvent(step=snapshot.step, message=message, details=changes))
    run.restore(snapshot)
    state: dict[str, Any] = snapshot.state["progress"]
    return Progress(**state)


def _warn(sink: Sink, message: str) -> None:
    sink.emit(WarningEvent(step=None, message=message))
