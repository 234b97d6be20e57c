"""Run folders as `detour run` leaves them, written without training: for tests of what is told about runs."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from detour import archs
from detour.config.load import dump_job, load_text
from detour.config.writing import block
from detour.events import (
    DriftEvent,
    EndEvent,
    Event,
    GateEvent,
    SampleEvent,
    SaveEvent,
    StageEvent,
    StartEvent,
    StepEvent,
    StopEvent,
    ValidationEvent,
    WarningEvent,
    to_line,
    to_record,
)

NAME = "zig"
BEGAN = 1767225600.0  # 2026-01-01 00:00:00 UTC
FACTS = {
    "detour": "0.1", "torch": "2.13", "model": "Tongyi-MAI/Z-Image-Turbo", "vae_sha256": "a" * 64,
    "text_encoder_sha256": "b" * 64, "training_adapter_sha256": "c" * 64, "training_adapter_mode": "factored",
    "dataset_sha256": "d" * 64, "pictures": "7",
}  # fmt: skip


@dataclass
class Made:
    """A run's folder, and the events that are in it."""

    folder: Path
    events: list[dict[str, Any]] = field(default_factory=list)
    clock: float = BEGAN

    def emit(self, event: Event, seconds: float = 1.0) -> None:
        """Append an event, so many seconds after the last."""
        self.emit_all([event], seconds)

    def emit_all(self, events: list[Event], seconds: float = 1.0) -> None:
        """Append events, so many seconds between them."""
        lines = []
        for event in events:
            self.clock += seconds
            lines.append(to_line(to_record(event, self.clock)))
        self.events += [json.loads(line) for line in lines]
        with (self.folder / "events.jsonl").open("ab") as log:
            log.write(b"".join(lines))

    def start(self, step: int = 0, total: int = 10, name: str = NAME) -> None:
        """A session begins."""
        self.emit(StageEvent(name="model", done=0, total=1))
        self.emit(StageEvent(name="model", done=1, total=1))
        resumed = f"/elsewhere/{name}/checkpoints/step-{step:09d}" if step else None
        self.emit(StartEvent(step=step, total_steps=total, name=name, arch="zimage", resumed_from=resumed, facts=FACTS))

    def steps(self, first: int, last: int, **values: Any) -> None:
        """Steps `first` to `last`, both included."""
        found: list[Event] = []
        for step in range(first, last + 1):
            figures = {
                "loss": 0.5 + 0.3 * math.sin(step * 1.7) / step, "lr": 1e-4, "grad_norm": 1 / step,
                "seconds": 2.0 + step % 3 / 10, "seconds_outside": 0.5, "memory_bytes": 2**33 + step,
            } | values  # fmt: skip
            found.append(StepEvent(step=step, epoch=0, **figures))
        self.emit_all(found)

    def sample(self, step: int, prompts: list[str], size: tuple[int, int] = (64, 48), *, noise: bool = False) -> None:
        """Previews, each of a colour of its own, or of noise."""
        for index, prompt in enumerate(prompts):
            path = self.folder / "samples" / f"{step:09d}-{index:02d}.png"
            path.parent.mkdir(exist_ok=True)
            if noise:
                pixels = np.random.default_rng(step + index).integers(0, 256, (size[1], size[0], 3), np.uint8)
                Image.fromarray(pixels).save(path, compress_level=1)
            else:
                Image.new("RGB", size, (step % 256, 40 * index % 256, 128)).save(path)
            self.emit(
                SampleEvent(step=step, index=index, path=f"/elsewhere/samples/{path.name}", prompt=prompt, seed=42)
            )

    def save(self, step: int, *, final: bool = False) -> None:
        """A checkpoint with a LoRA file beside it."""
        name = f"{NAME}.safetensors" if final else f"{NAME}-{step:09d}.safetensors"
        write_lora(self.folder / name, step)
        proof = "8 layers, loaded by diffusers.loaders.ZImageLoraLoaderMixin"
        self.emit(SaveEvent(step=step, checkpoint="/elsewhere/c", lora=f"/elsewhere/{name}", proof=proof))

    def drift(self, step: int, drift: float, by_prompt: dict[str, float] | None = None) -> None:
        """A measurement."""
        self.emit(
            DriftEvent(
                step=step, drift=drift, by_prompt={"a boat": drift} if by_prompt is None else by_prompt, pixels=0.01,
                gap=0.25, gap_untouched=0.2, curvature=0.4, curvature_untouched=0.3, spread=0.9, alarm=drift > 0.5,
            )
        )  # fmt: skip

    def gate(self, reasons: list[str] | None = None) -> None:
        """What the teacher gate found, with its drawings."""
        path = self.folder / "samples" / "teacher-gate.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (584, 212), "white").save(path)
        self.emit(
            GateEvent(
                step=0, passed=not reasons, gain=0.123, gain_error=0.01, gap=0.5, colour=[0.01, -0.02, 0.0], frame="",
                reasons=reasons or [], path=f"/elsewhere/samples/{path.name}",
            )
        )  # fmt: skip

    def end(self, step: int, reason: str = "finished", seconds: float = 60.0) -> None:
        """The end of a session."""
        if reason != "finished":
            self.emit(StopEvent(step=step, reason=reason))
        self.emit(EndEvent(step=step, reason=reason, seconds=seconds))

    def warn(self, message: str, step: int | None = None, details: list[str] | None = None) -> None:
        """A warning."""
        self.emit(WarningEvent(step=step, message=message, details=details or []))

    def validate(self, step: int, loss: float) -> None:
        """A validation."""
        self.emit(ValidationEvent(step=step, loss=loss, by_time={"0.5": loss / 2, "1.0": loss * 1.5}))


def made(root: Path, *, name: str = NAME, meta: dict[str, Any] | None = None, **sections: Any) -> Made:
    """An empty run's folder with its job file; `sections` are laid over a Z-Image Turbo job."""
    private = root / "private"
    base: dict[str, Any] = {
        "model": {
            "arch": "zimage", "name_or_path": str(private / "model"),
            "assistant_lora_path": str(private / "adapter.safetensors"),
        },
        "train": {"steps": 10, "lr": 2e-4},
        "network": {"linear": 4},
        "preserve": {"drift": {"measure": True, "alarm": 0.5}},
    }  # fmt: skip
    dataset = {"folder_path": str(private / "pictures"), "resolution": 64}
    process: dict[str, Any] = {"type": "train", "device": "cpu", "trigger_word": "zig", "datasets": [dataset]}
    for section in [*base, *(other for other in sections if other not in base)]:
        given = sections.get(section, {})
        process[section] = base.get(section, {}) | given if isinstance(given, dict) else given
    config = {"output_name": name, "output_folder": str(root / "output"), "process": [process]}
    job = load_text("\n".join(block({"config": config, "meta": meta or {}}))).job
    processes = [archs.resolve(part) for part in job.config.process]
    resolved = job.model_copy(update={"config": job.config.model_copy(update={"process": processes})})
    folder = root / "output" / NAME
    folder.mkdir(parents=True)
    (folder / "job.yaml").write_text(dump_job(resolved), encoding="utf-8")
    return Made(folder)


def write_lora(path: Path, step: int) -> None:
    """A LoRA of Z-Image of rank 4 on one layer, in ComfyUI's keys."""
    layer = "diffusion_model.layers.0.attention.to_q"
    figures = np.random.default_rng(step)
    tensors = {
        f"{layer}.lora_A.weight": figures.standard_normal((4, 96), np.float32),
        f"{layer}.lora_B.weight": figures.standard_normal((96, 4), np.float32),
        f"{layer}.alpha": np.array(4, np.float32),
    }
    header = {
        "detour.arch": "zimage",
        "detour.step": str(step),
        "detour.job_sha256": "e" * 64,
        "ss_num_train_items": "7",
    }
    save_file(tensors, path, header)


def whole(root: Path, prompts: list[str] | None = None, **sections: Any) -> Made:
    """A run of 10 steps that was killed after step 7, went on from step 5, and finished."""
    run, prompts = made(root, **sections), prompts or ["a zig", "a red circle"]
    run.start()
    run.warn("Z-Image turbo is trained on the CPU")
    run.sample(0, prompts)
    run.drift(0, 0.0)
    run.validate(0, 0.9)
    run.steps(1, 5, loss=9.0)
    run.save(5)
    run.sample(5, prompts)
    run.drift(5, 0.3)
    run.steps(6, 7, loss=99.0)  # lost with the process
    run.start(5)
    run.warn("something has changed", 5, ["torch was 1 and is now 2"])
    run.steps(6, 10)
    run.sample(10, prompts)
    run.drift(10, 0.6)
    run.validate(10, 0.4)
    run.save(10, final=True)
    run.end(10)
    return run
