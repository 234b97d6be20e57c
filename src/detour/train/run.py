"""A run: the models, the data and the settings of one training process, with what is done to them once in a while."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from glob import escape
from typing import TYPE_CHECKING, Any

import torch

from detour import UserError, export, files, sample
from detour.adapter import is_blank, prove
from detour.draw import DTYPES
from detour.events import GateEvent, SampleEvent, SaveEvent, ValidationEvent, WarningEvent
from detour.files import DiskFullError
from detour.nn import lora
from detour.nn.together import to_file
from detour.train import checkpoint, optim
from detour.train.objective import evaluating, validation_loss

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch import nn

    from detour.adapter import Making
    from detour.archs.base import Arch, Condition
    from detour.config.job import TrainProcess
    from detour.data.loader import Batch
    from detour.events import Sink
    from detour.lora_formats import Format
    from detour.nn.training_adapter import TrainingAdapter
    from detour.train.deployment import Deployment
    from detour.train.drift import DriftMeter, Schedule
    from detour.train.ema import Ema
    from detour.train.gate import TeacherGate
    from detour.train.loop import Progress
    from detour.train.preserve import Objective

STEP_DIGITS = 9  # `<name>-000000250.safetensors`, sorted by name as by step


@dataclass(frozen=True)
class Preview:
    """A picture to draw, with the conditions of its prompt and, with guidance, its negative prompt."""

    request: sample.Request
    conditions: list[Condition]


@dataclass
class Run:
    """Built by `build.build_run`, used by the loop. Nothing here decides when; the loop does."""

    name: str
    folder: Path
    process: TrainProcess
    job_yaml: str
    arch: Arch
    objective: Objective
    device: torch.device
    sink: Sink
    denoiser: nn.Module
    trained: nn.Module
    """What the adapter is on: the denoiser, or it and its text encoders (`nn.together`)."""
    deployment: Deployment
    """What previews are drawn with."""
    vae: nn.Module
    adapter: TrainingAdapter | None
    text: Any
    """The text encoder in main memory, where `unload_text_encoder: false` keeps it."""
    trainable: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    open_batches: Callable[[tuple[int, int]], Iterator[tuple[Batch, tuple[int, int]]]]
    """Micro-batches from a position (epoch, place) on, without end, each with the position of the next."""
    total_steps: int
    previews: list[Preview]
    images: int
    """Pictures in the training sets."""
    captions: list[str]
    validation: list[Batch]
    drift: DriftMeter | None = None
    drift_schedule: Schedule | None = None
    gate: TeacherGate | None = None
    making: Making | None = None
    """What is more than training, where a training adapter is made."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What identifies data, model and program: goes into checkpoints and is compared on resuming."""
    batches: Iterator[tuple[Batch, tuple[int, int]]] = field(default_factory=lambda: iter(()))

    def start(self, progress: Progress) -> None:
        """Open the data at the place where `progress` stands."""
        self.batches = self.open_batches((progress.epoch, progress.batch))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters, in the order of `trainable`."""
        return list(self.trainable.values())

    def due_save(self, step: int, epochs: tuple[int, int]) -> bool:
        """Is a save due after this step, which took the run from `epochs[0]` to `epochs[1]` complete epochs?"""
        return _due(step, epochs, self.process.save.save_every, self.process.train.save_every_n_epochs)

    def due_sample(self, step: int, epochs: tuple[int, int]) -> bool:
        """Are previews due: before the first step, when the settings say, at the end."""
        settings = self.process.sample
        if settings.disable_sampling:
            return False
        if step == 0:
            return not settings.skip_first_sample
        return step >= self.total_steps or _due(step, epochs, settings.sample_every, settings.sample_every_n_epochs)

    def due_validation(self, step: int) -> bool:
        """Is a validation due: before the first step, when the settings say, at the end."""
        every = self.process.validation.validate_every
        return every is not None and (step % every == 0 or step >= self.total_steps)

    def memory_bytes(self) -> int:
        """Most memory held so far: on the card, or by this process where there is none."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        import psutil

        return int(psutil.Process().memory_info().rss)

    @contextmanager
    def as_deployed(self) -> Iterator[None]:
        """The weights as the exported file will hold them: averaged where an average is kept."""
        with ExitStack() as stack:
            stack.enter_context(optim.for_evaluation(self.optimizer))
            if self.ema is not None:
                stack.enter_context(self.ema.swapped())
            yield

    def save(self, progress: Progress, *, required: bool) -> None:
        """Write a checkpoint and read it back, write the LoRA of this step, then remove the oldest of both.

        A full disk ends the run only where the save is `required`: there may be room again at the next one.
        """
        with nullcontext() if required else self._outlives_full_disk(progress.step, "the checkpoint was not written"):
            self._save(progress)

    def _save(self, progress: Progress) -> None:
        tensors, scalars = optim.pack(self.optimizer)
        groups = {"weights": {name: p.detach() for name, p in self.trainable.items()}, "optimizer": tensors}
        if self.ema is not None:
            groups["ema"] = self.ema.state()
        state = {
            "progress": asdict(progress),
            "total_steps": self.total_steps,
            "optimizer": scalars,
            "facts": self.facts,
        }
        folder = self.folder / "checkpoints"
        snapshot = checkpoint.Snapshot(step=progress.step, tensors=groups, state=state, job_yaml=self.job_yaml)
        if progress.step == 0:
            checkpoint.preflight(self.folder, checkpoint.size(snapshot), self.process.save.max_step_saves_to_keep)
        saved = checkpoint.save(folder, snapshot)
        lora_file, proof = self._lora_of_step(progress.step), None
        if lora_file is not None:
            proof = self._export_lora(lora_file, self.process.save.formats[0], progress)
        self._saved(progress, saved, lora_file, proof)

    def catch_up(self, progress: Progress) -> None:
        """After resuming: what a process that was killed when its checkpoint was whole had no time left to do."""
        lora_file = self._lora_of_step(progress.step)
        if lora_file is not None and not lora_file.exists():
            proof = self._export_lora(lora_file, self.process.save.formats[0], progress)
            saved = self.folder / "checkpoints" / checkpoint.folder_name(progress.step)
            self._saved(progress, saved, lora_file, proof)

    def _lora_of_step(self, step: int) -> Path | None:
        """The LoRA file of a step; none at the start, at the end (see `finish`), and in full fine-tuning."""
        wanted = 0 < step < self.total_steps and self.process.network.type != "full"
        return self.folder / f"{self.name}-{step:0{STEP_DIGITS}d}.safetensors" if wanted else None

    def _saved(self, progress: Progress, saved: Path, lora_file: Path | None, proof: str | None) -> None:
        """Tell of a checkpoint and its LoRA file; remove the oldest of both, but not the last below the drift alarm."""
        keep, spared = self.process.save.max_step_saves_to_keep, progress.below_alarm
        lora_name = str(lora_file) if lora_file else None
        self.sink.emit(SaveEvent(step=progress.step, checkpoint=str(saved), lora=lora_name, proof=proof))
        checkpoint.prune(self.folder / "checkpoints", keep, verified=saved, spared=spared)
        numbered = sorted(self.folder.glob(f"{escape(self.name)}-{'[0-9]' * STEP_DIGITS}.safetensors"))
        for old in numbered[:-keep]:
            if spared is None or old != self._lora_of_step(spared):
                old.unlink()

    def restore(self, snapshot: checkpoint.Snapshot) -> None:
        """Take over a checkpoint's weights, average and optimizer. UserError where it belongs to another job."""
        lora.load_state(self.trained, snapshot.tensors["weights"])
        optim.unpack(self.optimizer, snapshot.tensors["optimizer"], snapshot.state["optimizer"])
        if self.ema is not None:
            if "ema" not in snapshot.tensors:
                raise UserError("the checkpoint has no moving average, which train.ema_config asks for; use --fresh")
            self.ema.load_state(snapshot.tensors["ema"])

    def finish(self, progress: Progress) -> Path:
        """Write what was trained in every format asked for, each proven by loading; returns the first."""
        if self.process.network.type == "full":
            with self.as_deployed():
                target, dtype = self.folder / self.name, self.process.save.dtype
                return export.export_full(self.denoiser, target, self.arch.spec, dtype)
        paths = lora_files(self.folder, self.name, self.process.save.formats)
        proofs = [
            self._export_lora(path, fmt, progress) for path, fmt in zip(paths, self.process.save.formats, strict=True)
        ]
        newest = str(self.folder / "checkpoints" / checkpoint.folder_name(progress.step))
        self.sink.emit(SaveEvent(step=progress.step, checkpoint=newest, lora=str(paths[0]), proof=proofs[0]))
        return paths[0]

    def _export_lora(self, path: Path, fmt: Format, progress: Progress) -> str:
        """Write the LoRA, proven by loading; who loaded it, and how many layers took a part of it."""
        with self.as_deployed():
            tensors = to_file(self.trained, lora.state(self.trained))
            file = export.from_training(tensors, self.process.network)
            origin = export.Origin(
                title=self.name,
                process=self.process,
                step=progress.step,
                epoch=progress.epoch,
                images=self.images,
                adapter_sha256=self.adapter.sha256 if self.adapter else None,
                patch_sha256=self.deployment.patch_sha256,
                job_sha256=hashlib.sha256(self.job_yaml.encode()).hexdigest(),
                captions=self.captions if self.process.save.include_captions else (),
            )
            metadata, spec, check = export.describe(file, self.arch.spec, origin), self.arch.spec, None
            if self.making is not None:
                spec = self.making.file_spec(spec)
                metadata |= self.making.header(str(self.facts["base_sha256"]), progress.held_out)
                if progress.step >= self.total_steps or not is_blank(file):
                    dtype = DTYPES[self.process.model.dtype or self.process.train.dtype]
                    check = partial(prove, lora=file, trained=self.trained, spec=spec, dtype=dtype)
            base, held_in = export.Base.of(self.trained, spec), self.process.save.dtype
            written = export.write_lora(path, file, base, fmt, dtype=held_in, metadata=metadata, check=check)
        for note in written.notes:
            self.sink.emit(WarningEvent(step=progress.step, message=f"{path.name}: {note}"))
        checked = f"; {written.checked}" if written.checked else ""
        return f"{written.proof.modules} layers, loaded by {written.proof.loader}{checked}"

    def validate(self, step: int) -> float:
        """Loss on held-out pictures, at fixed noise and times, with the training adapter as in training."""
        with self.as_deployed():
            mean, by_time = self._held_out_loss()
        self.sink.emit(ValidationEvent(step=step, loss=mean, by_time=by_time))
        return mean

    def untouched_loss(self) -> float:
        """The same of the model without what is trained."""
        with lora.disabled(self.trained):
            return self._held_out_loss()[0]

    def _held_out_loss(self) -> tuple[float, dict[str, float]]:
        times, seed = self.process.validation.times, self.process.train.seed
        held = [batch.to(self.device) for batch in self.validation]
        with self.mixed_precision(), evaluating(self.trained):
            return validation_loss(self.objective.task, self.denoiser, held, times, seed)

    def sharpness(self, step: int) -> float:
        """Of few-step pictures, relative to the untouched model's."""
        assert self.drift is not None
        with self.as_deployed(), self._vae_on_device():
            sharpness = self.drift.measure(step, long=False).sharpness
        return 1.0 if sharpness is None else sharpness  # flat pictures cannot lose any

    def due_drift(self, step: int) -> bool:
        """Is the drift to be measured: before the first step, when the schedule says, at the end."""
        return self.drift_schedule is not None and self.drift_schedule.due(step, self.total_steps)

    def measure_drift(self, progress: Progress) -> bool:
        """Measure the drift. True where it is above the alarm."""
        assert self.drift is not None
        step = progress.step
        with self.as_deployed(), self._vae_on_device():
            event = self.drift.measure(step, long=step == 0 or step >= self.total_steps)
        self.sink.emit(event)
        if event.alarm:
            limit = self.process.preserve.drift.alarm
            message = f"step {step}: the drift is {event.drift:.3g}, above preserve.drift.alarm: {limit:g}"
            kept = "" if progress.below_alarm is None else f"; step {progress.below_alarm} was the last below it"
            self.sink.emit(WarningEvent(step=step, message=message + kept))
        return event.alarm

    def check_teacher(self) -> None:
        """Before the first step: look at what a teacher that is told more draws. UserError where it must not teach."""
        if self.gate is None:
            return
        with self._vae_on_device():
            verdict = self.gate.examine()
        path = self.folder / "samples" / "teacher-gate.png"
        with files.new_file(path) as temporary:
            verdict.page.save(temporary, format="PNG")
        self.sink.emit(
            GateEvent(
                step=0,
                passed=not verdict.reasons,
                gain=verdict.gain.mean,
                gain_error=verdict.gain.error,
                gap=verdict.gap,
                colour=[shift.mean for shift in verdict.colour],
                frame=verdict.frame,
                reasons=verdict.reasons,
                path=str(path),
            )
        )
        if not verdict.reasons:
            return
        message = f"the teacher of preserve should not teach as it is (see {path})"
        if self.process.preserve.gate == "refuse":
            raise UserError(
                f"preserve.gate: {message}: {'; '.join(verdict.reasons)}. Tell it other captions, or set "
                f"preserve.gate: warn to train all the same"
            )
        self.sink.emit(WarningEvent(step=0, message=message, details=verdict.reasons))

    def draw_previews(self, step: int) -> None:
        """Draw every preview as the LoRA will be used: training adapter removed, dropout off."""
        arch, model, latents = self.arch, self.deployment, list[torch.Tensor]()
        with self.as_deployed(), evaluating(self.trained), model.tuned():
            for preview in self.previews:
                request = preview.request
                noise = sample.initial_noise(arch.spec, request).to(self.device)
                with self._lora_scaled(request.lora_scale):
                    latents.append(
                        sample.denoise(arch, model.denoiser, model.scheduler, noise, request, self._told(preview))
                    )
        facts = {key: str(value) for key, value in self.facts.items() if key.endswith("sha256")} | {"step": str(step)}
        facts |= {} if model.patch_sha256 is None else {"distill_patch_sha256": model.patch_sha256}
        with self._vae_on_device():
            for index, (preview, latents_BCHW) in enumerate(zip(self.previews, latents, strict=True)):
                request, frames = preview.request, sample.to_frames(arch, self.vae, latents_BCHW)
                path = self._preview_path(step, index)
                with self._outlives_full_disk(step, f"preview {index} was not written"):
                    sample.save_picture(path, frames, request, arch.spec, facts)
                    self.sink.emit(
                        SampleEvent(step=step, index=index, path=str(path), prompt=request.prompt, seed=request.seed)
                    )

    @torch.no_grad()
    def _told(self, preview: Preview) -> list[Condition]:
        """A preview's conditions, embedded now where text encoders are trained."""
        return self.objective.task.embedded(preview.request.prompts(self.arch.spec), preview.conditions)

    def previews_drawn(self, step: int) -> bool:
        """Is every picture of this step there?"""
        return all(self._preview_path(step, index).exists() for index in range(len(self.previews)))

    def _preview_path(self, step: int, index: int) -> Path:
        return self.folder / "samples" / f"{step:0{STEP_DIGITS}d}-{index:02d}.png"

    @contextmanager
    def _outlives_full_disk(self, step: int, what: str) -> Iterator[None]:
        try:
            yield
        except DiskFullError as error:
            self.sink.emit(WarningEvent(step=step, message=f"{what}, training goes on: {error}"))

    def mixed_precision(self) -> torch.autocast:
        """Compute in `train.dtype`, whatever the weights are held in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.process.train.dtype == "bf16")

    def _lora_scaled(self, factor: float) -> AbstractContextManager[None]:
        return nullcontext() if factor == 1 else lora.scaled(self.deployment.with_lora, factor)

    @contextmanager
    def _vae_on_device(self) -> Iterator[None]:
        """With `low_vram` the VAE is on the card only while it works."""
        self.vae.to(self.device)
        yield
        if self.process.model.low_vram:
            self.vae.to("cpu")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def lora_files(folder: Path, name: str, formats: Sequence[Format]) -> list[Path]:
    """Where the finished LoRA goes in each format; the first has no suffix."""
    return [folder / f"{name}{f'.{fmt}' if index else ''}.safetensors" for index, fmt in enumerate(formats)]


def _due(step: int, epochs: tuple[int, int], every: int | None, every_epochs: int | None) -> bool:
    by_step = every is not None and step > 0 and step % every == 0
    by_epoch = every_epochs is not None and epochs[1] // every_epochs > epochs[0] // every_epochs
    return by_step or by_epoch
