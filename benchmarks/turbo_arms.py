"""What the experiment compares: a job for each arm. Part of `turbo.py`.

An arm is a change to one common job, so that everything else is equal: pictures, order, noise, rank, rate, steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

RANK, BATCH, RATE = 16, 4, 1e-3


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of everything."""

    points: tuple[int, ...]
    """Steps whose LoRA is judged, besides 0; the last is the end."""
    save_every: int
    others: int
    """Ordinary prompts."""
    told: int
    """Prompts of the concept."""
    seeds: tuple[int, ...]
    """Where the noises of each drawing begin; picture i of a drawing has the seed plus i."""

    @property
    def steps(self) -> int:
        """Of training."""
        return self.points[-1]


FULL = Scale(
    points=(50, 100, 200, 300, 400, 600, 800, 1200),
    save_every=50, others=24, told=16, seeds=(50_000, 60_000, 70_000, 80_000),
)  # fmt: skip
QUICK = Scale(points=(1, 2), save_every=1, others=2, told=2, seeds=(50_000, 60_000))
"""To see that everything runs."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to keep the few steps. `changes` go into the sections of the common job."""

    name: str
    what: str
    """For the table."""
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    adapter: bool = False
    """Train around the training adapter."""
    on_base: bool = False
    """Train on the undistilled base; draw with the turbo."""
    patch: float = 0.0
    """Draw with the adapter at minus this strength: a patch that leads back."""
    control: bool = False


def _preserve(strategy: str, **options: Any) -> dict[str, dict[str, Any]]:
    return {"preserve": {"strategy": strategy} | options}


ARMS = (
    Arm(name="none", what="plain training on the turbo"),
    Arm(name="adapter", what="training adapter, off when drawing", adapter=True),
    Arm(name="base", what="trained on the undistilled base, put on the turbo", on_base=True),
    Arm(
        name="anchor", what="predictions on noised pictures held to the untouched model's", changes=_preserve("anchor")
    ),
    Arm(
        name="prior_anchor",
        what="held to the untouched model on own few-step states",
        changes=_preserve("prior_anchor"),
    ),
    Arm(name="grid_sft", what="the sampler's times only, with an anchor", changes=_preserve("grid_sft")),
    Arm(name="contrastive", what="pushed away from the uncaptioned prediction", changes=_preserve("contrastive")),
    Arm(
        name="adapter+prior",
        what="training adapter and prior anchor (weight .25)",
        adapter=True,
        changes=_preserve("prior_anchor"),
    ),
    Arm(
        name="adapter+prior1",
        what="training adapter and prior anchor (weight 1)",
        adapter=True,
        changes=_preserve("prior_anchor", weight=1.0),
    ),
    Arm(
        name="self_distill",
        what="told by the untouched model, which is shown the picture",
        changes=_preserve("self_distill", teacher_told="picture", gate="off"),
    ),
    Arm(name="pso", what="prefers the pictures to own ones, with a reference", changes=_preserve("pso")),
    Arm(name="patch", what="plain training, drawn with the adapter taken away once more", patch=1.0),
    Arm(name="lr0", what="control: a rate of nothing", changes={"train": {"lr": 1e-12}}, control=True),
)
BY_NAME = {arm.name: arm for arm in ARMS}


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the experiment keeps what it needs."""

    work: Path
    scale: Scale = FULL

    @property
    def base(self) -> Path:
        """The undistilled base, a model folder."""
        return self.work / "base"

    @property
    def turbo(self) -> Path:
        """The turbo, a model folder."""
        return self.work / "turbo"

    @property
    def adapter(self) -> Path:
        """The training adapter."""
        return self.work / "training_adapter.safetensors"

    def pictures(self, concept: str) -> Path:
        """The concept set."""
        return self.work / "pictures" / concept

    def run(self, concept: str, arm: str, seed: int) -> Path:
        """The folder that a run trains in."""
        return self.work / "runs" / f"{concept}-{arm}-{seed}"

    def lora(self, concept: str, arm: str, seed: int, step: int) -> Path:
        """The LoRA of a step."""
        folder = self.run(concept, arm, seed)
        last = folder / f"{folder.name}.safetensors"
        return last if step == self.scale.steps else folder / f"{folder.name}-{step:09d}.safetensors"

    def figures(self, concept: str, arm: str, seed: int) -> Path:
        """What was measured of a run."""
        return self.work / "figures" / f"{concept}-{arm}-{seed}.json"


def job_for(places: Places, concept: str, arm: Arm, seed: int, controls: list[str]) -> dict[str, Any]:
    """The job file of a run, as data. `controls` are prompts for rollouts that are told nothing of the concept."""
    folder = places.run(concept, arm.name, seed)
    process: dict[str, dict[str, Any]] = {
        "model": {
            "arch": "zimage:base" if arm.on_base else "zimage",
            "name_or_path": str(places.base if arm.on_base else places.turbo),
        },
        "train": {
            "steps": places.scale.steps, "batch_size": BATCH, "lr": RATE, "seed": seed, "dtype": "fp32",
            "timestep_type": "sigmoid", "gradient_checkpointing": False, "num_workers": 0,
            "cache_folder": str(places.work / "cache"),
        },
        "network": {"type": "lora", "linear": RANK},
        "save": {"save_every": places.scale.save_every, "max_step_saves_to_keep": 1000, "dtype": "fp32"},
        "sample": {"disable_sampling": True, "width": 128, "height": 128},
        "preserve": {"prompts": controls},
    }  # fmt: skip
    if arm.adapter:
        process["model"]["assistant_lora_path"] = str(places.adapter)
    for section, options in arm.changes.items():
        process[section] = process.get(section, {}) | options
    datasets = [{"folder_path": str(places.pictures(concept)), "resolution": 128}]
    shown = {"type": "train", "trigger_word": concept, "datasets": datasets} | process
    return {"config": {"output_name": folder.name, "output_folder": str(folder.parent), "process": [shown]}}
