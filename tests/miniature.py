"""The whole engine on the miniature: a small world written once, jobs of a few steps in it, and hashes to compare runs.

Runs in this process keep every event (`run`). Runs to be killed or signalled are children of a fork server that has the
heavy imports done (`start`): real processes that begin within milliseconds and share no thread with the tests.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from detour.config.job import Job
from detour.config.load import load_job
from detour.events import Event
from detour.train import checkpoint
from detour.train.control import Control
from detour.train.session import Result, run_job

NAME = "zig"
SIZE = 64  # pixels
_LONGER = (0, 2, 5, 25, 1)
"""Words added to the captions: four of them are of different lengths within one multiple of 32 tokens, one is not."""


@dataclass(frozen=True)
class World:
    """Files that every test shares and none changes. `cache` fills up as tests run."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter.safetensors"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def cache(self) -> Path:
        return self.root / "cache"


def write_world(root: Path, pictures: int = 5) -> World:
    """Write the miniature, its training adapter and a few pictures of 64 x 64."""
    from detour.nano import drawn, zimage

    world = World(root)
    zimage.write(world.model)
    zimage.write_adapter(world.adapter, world.model)
    drawn.write_dataset(world.data, n=pictures, size=SIZE)
    for caption, words in zip(sorted(world.data.glob("*.txt")), _LONGER, strict=False):
        caption.write_text(caption.read_text().strip() + " style" * words)
    return world


# --- jobs -----------------------------------------------------------------------------------------------------------


def job_file(world: World, folder: Path, **sections: dict[str, Any]) -> Path:
    """A job file in `folder`: float32, the training adapter on, no previews; `sections` are laid over that."""
    base: dict[str, dict[str, Any]] = {
        "model": {"arch": "zimage", "name_or_path": str(world.model), "assistant_lora_path": str(world.adapter)},
        "train": {
            "steps": 6, "lr": 1e-3, "dtype": "fp32", "num_workers": 0, "gradient_checkpointing": False,
            "cache_folder": str(world.cache),
        },
        "network": {"linear": 4},
        "save": {"save_every": 100, "dtype": "fp32"},
        "sample": {"disable_sampling": True, "width": SIZE, "height": SIZE, "sample_steps": 2},
    }  # fmt: skip
    dataset = {"folder_path": str(world.data), "resolution": SIZE} | sections.pop("dataset", {})
    process: dict[str, Any] = {"type": "train", "device": "cpu", "datasets": [dataset]}
    for name in [*base, *(name for name in sections if name not in base)]:
        process[name] = base.get(name, {}) | sections.get(name, {})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.yaml"
    config = {"output_name": NAME, "output_folder": str(folder), "process": [process]}
    path.write_text(json.dumps({"config": config}, indent=1))  # JSON is YAML
    return path


def job(world: World, folder: Path, **sections: dict[str, Any]) -> Job:
    """The same, loaded."""
    return load_job(job_file(world, folder, **sections)).job


# --- runs in this process -------------------------------------------------------------------------------------------


@dataclass
class Recorder:
    """A sink that keeps every event; `on` sees each as it comes."""

    on: Callable[[Event], None] = lambda event: None
    events: list[Event] = field(default_factory=list)

    def emit(self, event: Event) -> None:
        self.events.append(event)
        self.on(event)

    def close(self) -> None:
        pass

    def of(self, kind: str) -> list[Any]:
        """The events of a type."""
        return [event for event in self.events if event.type == kind]

    @property
    def warnings(self) -> list[str]:
        return [event.message for event in self.of("warning")]


@dataclass(frozen=True)
class Ran:
    """What came of a run."""

    result: Result
    seen: Recorder

    @property
    def state(self) -> dict[str, str]:
        return state_of(self.result.folder)


def run(job: Job, *, stop_at: int | None = None, fresh: bool = False, on: Callable[[Event], None] | None = None) -> Ran:
    """Run a job in this process; `stop_at` stops it as if somebody had asked at that step."""
    seen = Recorder(on) if on else Recorder()
    return Ran(run_job(job, Control(stop_at=stop_at), seen, fresh=fresh)[0], seen)


@dataclass(frozen=True)
class Seen:
    """What one micro-batch was made of."""

    step: int
    micro: int
    names: list[str]
    prompts: list[str]
    times: list[float]
    loss: float
    noise: str
    latents: str


@contextmanager
def traced() -> Iterator[list[Seen]]:
    """The micro-batches that runs inside train on, in order."""
    from detour.train import objective, preserve

    found: list[Seen] = []
    noises: list[str] = []
    training_loss, noise_like = preserve.training_loss, objective.noise_like

    def noise(*args: Any) -> torch.Tensor:
        noises.append(digest(drawn := noise_like(*args)))
        return drawn

    def loss(task: Any, denoiser: Any, batch: Any, config: Any, seed: int, step: int, micro: int) -> Any:
        out = training_loss(task, denoiser, batch, config, seed, step, micro)
        found.append(
            Seen(
                step=step,
                micro=micro,
                names=batch.names,
                prompts=batch.prompts,
                times=out.t_B.tolist(),
                loss=float(out.loss.detach()),
                noise=noises[-1],
                latents=digest(batch.latents_BCHW),
            )
        )
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preserve, "training_loss", loss)
        patch.setattr(objective, "noise_like", noise)
        yield found


# --- hashes ---------------------------------------------------------------------------------------------------------


def digest(tensor: torch.Tensor) -> str:
    """Sha256 over type, shape and every bit."""
    held = tensor.detach().cpu().contiguous()
    sha = hashlib.sha256(f"{held.dtype} {tuple(held.shape)}".encode())
    sha.update(held.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def newest(folder: Path) -> checkpoint.Snapshot:
    """The newest checkpoint of a run's folder, which must be whole, as must all the others."""
    snapshot = checkpoint.newest_valid(folder / "checkpoints", pytest.fail)
    assert snapshot is not None
    return snapshot


def hashes(snapshot: checkpoint.Snapshot) -> dict[str, str]:
    """Sha256 of every tensor and of every number that decides what comes next; of the clock, nothing."""
    found = {f"{group}/{name}": digest(t) for group, tensors in snapshot.tensors.items() for name, t in tensors.items()}
    for part in ("progress", "optimizer"):
        kept = {key: value for key, value in snapshot.state[part].items() if key != "seconds"}
        found[part] = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    return found


def state_of(folder: Path) -> dict[str, str]:
    """`hashes` of a run's newest checkpoint."""
    return hashes(newest(folder))


def files_of(folder: Path) -> dict[str, str]:
    """Sha256 of every file of a run but those that hold the time: log, report, lock, checkpoints, manifests."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    timed = ("events.jsonl", "report.html", ".lock", "checkpoints/")
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in paths.items()
        if not name.startswith(timed) and path.name != "manifest.json"
    }


# --- processes of their own -----------------------------------------------------------------------------------------

_HEAVY = [
    "detour.cli", "detour.train.session", "detour.train.rehearsal", "detour.console", "detour.checking",
    "diffusers.models.transformers.transformer_z_image", "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.loaders.lora_pipeline", "diffusers.pipelines.z_image.pipeline_z_image",
    "transformers.models.qwen2.tokenization_qwen2", "transformers.models.qwen3.modeling_qwen3",
    "peft", "peft.tuners.lora", "miniature",
]  # fmt: skip


@cache
def _server() -> ForkServerContext:
    """A process that imports all of this once and forks children from itself."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_HEAVY)
    return context


def start(work: Callable[..., None], *args: Any) -> BaseProcess:
    """A child that does `work`, a function of an importable module."""
    process = _server().Process(target=work, args=args)  # type: ignore[attr-defined]
    process.start()
    return process


def child_run(path: Path) -> None:
    """For `start`: run a job file to its end, in silence."""
    run_job(load_job(path).job, Control(), Recorder())


def child_main(argv: list[str], out: Path) -> None:
    """For `start`: the command line with both its outputs in `out`; ends with its exit code."""
    from detour.cli import main

    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    code = main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
