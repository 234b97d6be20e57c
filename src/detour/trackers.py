"""Figures and previews for TensorBoard, trackio and Weights & Biases: sinks that are opened when the job asks for them.

None of them may end a run: what they cannot write is told once to `warn`, and they are left out from then on. All use
the same names: `train/loss`, `train/lr`, `validation/loss`, `validation/loss_at_0.25`, `sample/00`, ...
"""

import contextlib
import hashlib
import importlib
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detour import UserError
from detour.config.job import LoggingConfig
from detour.events import DriftEvent, Event, SampleEvent, Sink, StartEvent, StepEvent, ValidationEvent

if TYPE_CHECKING:
    from numpy import uint8
    from numpy.typing import NDArray


def open_trackers(config: LoggingConfig, folder: Path, run: str, warn: Callable[[str], None]) -> list[Sink]:
    """The sinks that `logging` of a job asks for, writing below the run's folder. UserError if a package is missing."""
    name = config.run_name or run
    sinks: list[Sink] = []
    if config.tensorboard:
        sinks.append(Harmless("TensorBoard", TensorBoardSink(folder / "tensorboard"), warn))
    if config.trackio:
        sinks.append(Harmless("trackio", TrackioSink(config.project_name, name), warn))
    if config.wandb:
        sinks.append(Harmless("Weights & Biases", WandbSink(config.project_name, name, folder), warn))
    return sinks


class Harmless:
    """Passes events to a sink until it fails (full disk, lost connection): that is told once, and the run goes on."""

    def __init__(self, name: str, sink: Sink, warn: Callable[[str], None]) -> None:
        self._name = name
        self._sink: Sink | None = sink
        self._warn = warn

    def emit(self, event: Event) -> None:
        """Pass the event on."""
        with self._watched():
            if self._sink is not None:
                self._sink.emit(event)

    def close(self) -> None:
        """Close the sink, if it still works."""
        with self._watched():
            if self._sink is not None:
                self._sink.close()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, TimeoutError) as error:
            self._sink = None
            self._warn(f"{self._name} failed and is left out from here on ({type(error).__name__}: {error})")


class TensorBoardSink:
    """Event files in `folder`. A resumed run hides what was logged after the checkpoint that it goes on from."""

    def __init__(self, folder: Path) -> None:
        self._module = _load("torch.utils.tensorboard", "tensorboard")
        self._folder = folder
        self._writer: Any = None

    def emit(self, event: Event) -> None:
        """Write the event's figures and pictures."""
        if self._writer is None:
            purge = event.step + 1 if isinstance(event, StartEvent) and event.step else None
            self._writer = self._module.SummaryWriter(str(self._folder), purge_step=purge)
        for name, value in scalars(event).items():
            self._writer.add_scalar(name, value, _step(event))
        if isinstance(event, SampleEvent):
            self._writer.add_image(_picture(event), _pixels(event.path), event.step, dataformats="HWC")
            self._writer.add_text(f"{_picture(event)}/prompt", event.prompt, event.step)
        if isinstance(event, ValidationEvent | DriftEvent | SampleEvent):
            self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


class TrackioSink:
    """A run in trackio's local database (`trackio show` draws it). A run of the same name is continued.

    `folder` is where trackio keeps its databases, by default its own place. Nothing is sent anywhere, unless trackio's
    own variables (TRACKIO_SPACE_ID, TRACKIO_SERVER_URL) say so. trackio prints; that goes to standard error.
    """

    def __init__(self, project: str, run: str, folder: Path | None = None) -> None:
        with _variable("TRACKIO_DIR", None if folder is None else str(folder)):  # read when it is imported
            self._trackio = _load("trackio", "trackio")
        if folder is not None and (found := Path(self._trackio.utils.TRACKIO_DIR)) != folder:
            raise UserError(f"trackio already writes to {found} in this process, and cannot write to {folder} too")
        try:
            with contextlib.redirect_stdout(sys.stderr), _hub_offline():
                self._run = self._trackio.init(
                    project=project, name=run, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False
                )
        except (OSError, ValueError, sqlite3.Error) as error:
            raise UserError(f"trackio does not start: {error}. Put that right or set logging.trackio: false") from error

    def emit(self, event: Event) -> None:
        """Log the event's figures and pictures."""
        record: dict[str, Any] = dict(scalars(event))
        if isinstance(event, SampleEvent):
            record[_picture(event)] = self._trackio.Image(event.path, caption=event.prompt)
        if record:
            self._run.log(record, step=_step(event))

    def close(self) -> None:
        """Write what is left."""
        with contextlib.redirect_stdout(sys.stderr):
            self._trackio.finish()  # not of the run itself: that would be done, and printed, once more at exit


class WandbSink:
    """A run at Weights & Biases, with its local files in `folder`; a resumed run goes on in the same one there."""

    def __init__(self, project: str, run: str, folder: Path) -> None:
        self._wandb = _load("wandb", "wandb")
        identity = hashlib.sha256(f"{folder.resolve()}\0{run}".encode()).hexdigest()[:16]
        try:
            with contextlib.redirect_stdout(sys.stderr):
                self._run = self._wandb.init(project=project, name=run, id=identity, dir=str(folder), resume="allow")
        except self._wandb.Error as error:
            advice = "Log in with `wandb login`, set WANDB_MODE=offline, or set logging.wandb: false"
            raise UserError(f"Weights & Biases does not start: {error}. {advice}") from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")  # its own counter may not go back; ours does after a resume

    def emit(self, event: Event) -> None:
        """Log the event's figures and pictures."""
        record: dict[str, Any] = dict(scalars(event))
        if isinstance(event, SampleEvent):
            record[_picture(event)] = self._wandb.Image(event.path, caption=event.prompt)
        if record:
            try:
                self._run.log(record | {"step": _step(event)})
            except self._wandb.Error as error:
                raise RuntimeError(str(error)) from error

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def scalars(event: Event) -> dict[str, float]:
    """The figures of an event under the names that every tracker shows."""
    if isinstance(event, StepEvent):
        return {
            "train/loss": event.loss,
            "train/lr": event.lr,
            "train/grad_norm": event.grad_norm,
            "train/epoch": event.epoch,
            "time/step_seconds": event.seconds,
            "time/outside_seconds": event.seconds_outside,
            "memory/gib": event.memory_bytes / 2**30,
        }
    if isinstance(event, ValidationEvent):
        by_time = {f"validation/loss_at_{time}": loss for time, loss in event.by_time.items()}
        return {"validation/loss": event.loss} | by_time
    if isinstance(event, DriftEvent):
        by_prompt = {f"drift/prompt_{index:02d}": drift for index, drift in enumerate(event.by_prompt.values())}
        gaps = {"drift/gap": event.gap, "drift/gap_untouched": event.gap_untouched}
        return {
            "drift/latents": event.drift,
            "drift/pixels": event.pixels,
            "drift/curvature": event.curvature,
            "drift/spread": event.spread,
            **{name: gap for name, gap in gaps.items() if gap is not None},
            **by_prompt,
        }
    return {}


def _step(event: Event) -> int:
    assert isinstance(event, StepEvent | ValidationEvent | DriftEvent | SampleEvent)
    return event.step


def _picture(event: SampleEvent) -> str:
    return f"sample/{event.index:02d}"


def _pixels(path: str) -> "NDArray[uint8]":
    import numpy
    from PIL import Image

    with Image.open(path) as picture:
        return numpy.asarray(picture.convert("RGB"))


def _load(module: str, extra: str) -> Any:  # noqa: ANN401  (a module that may not be installed has no type)
    """Import an optional package."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"logging.{extra} is on and the package is not installed ({error}). "
            f'Install it with: pip install "detour[{extra}]", or set logging.{extra}: false'
        ) from None


@contextlib.contextmanager
def _variable(name: str, value: str | None) -> Iterator[None]:
    """An environment variable, for a while."""
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if value is not None:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


@contextlib.contextmanager
def _hub_offline() -> Iterator[None]:
    """trackio asks the hub for the user's name when a token is there; a local log does not need it."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not ({"TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"} & os.environ.keys())
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
