"""What the benchmark programs share: models of two sizes written on the spot, a job on them, clocks, tables, JSON.

Nothing is downloaded. Weights are random: how long a step takes does not depend on their values.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

logging.disable(logging.WARNING)  # optional kernels that diffusers, PEFT and torchao look for while they are imported

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from detour.config.job import Job

ADAPTER = "training_adapter.safetensors"
LORA_LAYERS = r"layers\.\d+\.(attention\.to_(q|k|v|out\.0)|feed_forward\.w[123])"
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Size:
    """A Z-Image of some size, and the pictures that it is trained on."""

    name: str
    dim: int
    layers: int
    refiners: int
    heads: int
    pixels: int
    rank: int

    def __str__(self) -> str:
        tokens = (self.pixels // 16) ** 2
        return f"{self.name} (width {self.dim}, {self.layers} layers, {tokens} image tokens, rank {self.rank})"


MINIATURE = Size("miniature", dim=96, layers=3, refiners=1, heads=3, pixels=128, rank=16)
MIDDLE = Size("mid-size", dim=768, layers=12, refiners=2, heads=6, pixels=512, rank=16)
SIZES = {size.name: size for size in (MINIATURE, MIDDLE)}


# --- what is trained -------------------------------------------------------------------------------------------------


def write_place(folder: Path, size: Size, pictures: int = 4) -> None:
    """Write `model/` in the diffusers layout, a training adapter for it and `dataset/` into `folder`."""
    from detour.nano import drawn, zimage

    zimage.write(folder / "model")
    if size is not MINIATURE:
        _write_transformer(folder / "model" / "transformer", size)
    _write_adapter(folder / ADAPTER, folder / "model" / "transformer")
    drawn.write_dataset(folder / "dataset", pictures, size.pixels)


def _write_transformer(folder: Path, size: Size) -> None:
    """Weights that keep the variance and half-open gates, as in the miniature, in bf16 as the published ones."""
    import torch
    from diffusers import ZImageTransformer2DModel

    head = size.dim // size.heads
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = ZImageTransformer2DModel(
            dim=size.dim,
            n_layers=size.layers,
            n_refiner_layers=size.refiners,
            n_heads=size.heads,
            n_kv_heads=size.heads,
            cap_feat_dim=64,
            axes_dims=[head // 4, head * 3 // 8, head * 3 // 8],
        )
        for name, parameter in model.named_parameters():
            if name.endswith("adaLN_modulation.0.bias"):
                parameter.copy_(torch.tensor([0.0, 0.5, 0.0, 0.5]).repeat_interleave(size.dim))
            elif parameter.ndim == 2:
                parameter.normal_(std=1 / math.sqrt(parameter.shape[1]))
            elif "norm" not in name and name != "cap_embedder.0.weight":
                parameter.zero_()
    model.to(torch.bfloat16).save_pretrained(folder)


def _write_adapter(path: Path, transformer: Path, rank: int = 16) -> None:
    """A small random training adapter on the layers and in the layout of the published ones."""
    import torch
    from safetensors.torch import save_file

    from detour.weights import component_files, tensor_shapes

    tensors = {}
    for key, (width_out, width_in) in _matrices(tensor_shapes(component_files(transformer))).items():
        generator = torch.Generator().manual_seed(len(tensors))
        A = torch.randn(rank, width_in, generator=generator) / math.sqrt(width_in)
        B = torch.randn(width_out, rank, generator=generator) / math.sqrt(width_out) * 0.1
        tensors |= {f"diffusion_model.{key}.lora_A.weight": A.bfloat16()}
        tensors |= {f"diffusion_model.{key}.lora_B.weight": B.bfloat16()}
    save_file(tensors, path, metadata={"format": "pt"})


def _matrices(shapes: dict[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
    pattern = re.compile(rf"({LORA_LAYERS}|layers\.\d+\.adaLN_modulation\.0)\.weight")
    found = {key: shape for key, shape in shapes.items() if pattern.fullmatch(key)}
    return {key.removesuffix(".weight"): (shape[0], shape[1]) for key, shape in found.items()}


def job(folder: Path, size: Size, **options: dict[str, object]) -> Job:
    """A job on what `write_place` wrote; `options` are added to its sections (`train={"dtype": "fp32"}`).

    Pictures are read in the main process, so that the whole cost of reading is in the time of a step. Times are drawn
    as diffusers' script draws them, with a loss weight of 1.
    """
    from detour.config.job import Job

    sections: dict[str, dict[str, object]] = {
        "model": {"arch": "zimage:base", "name_or_path": str(folder / "model")},
        "train": {
            "steps": 100_000,
            "cache_folder": str(folder / "cache"),
            "num_workers": 0,
            "timestep_type": "shift",
            "lr": 1e-3,
            "gradient_checkpointing": False,
        },
        "network": {"linear": size.rank, "include": ["attention", "feed_forward"]},
        "sample": {"disable_sampling": True},
    }
    for name, values in options.items():
        sections[name] = sections.get(name, {}) | values
    datasets = [{"folder_path": str(folder / "dataset"), "resolution": size.pixels}]
    process = {"type": "train", "device": "cpu", "datasets": datasets, **sections}
    output = {"output_name": "benchmark", "output_folder": str(folder / "output"), "process": [process]}
    return Job.model_validate({"config": output})


# --- clocks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """One step, in seconds."""

    total: float
    model: float
    """Inside the denoiser: its forward pass, and the backward pass from its output on."""
    loss: float

    @property
    def outside(self) -> float:
        """Everything else: data, noise, loss, clipping, optimizer, events."""
        return self.total - self.model


def in_turn(steps: dict[str, Callable[[], Timing]], rounds: int, warmup: int) -> dict[str, list[Timing]]:
    """Let every contender do a step in turn, and the other way round in the next round: drift hits all alike.

    The first `warmup` rounds are run and dropped.
    """
    taken: dict[str, list[Timing]] = {name: [] for name in steps}
    for turn in range(warmup + rounds):
        names = list(steps) if turn % 2 == 0 else list(reversed(steps))
        for name in names:
            timing = steps[name]()
            if turn >= warmup:
                taken[name].append(timing)
    return taken


def ratio(ours: Sequence[Timing], theirs: Sequence[Timing]) -> float:
    """Median over the rounds of our time over theirs in the same round."""
    return median(a.total / b.total for a, b in zip(ours, theirs, strict=True))


def summary(timings: Sequence[Timing]) -> dict[str, object]:
    """Figures of a contender for the JSON file."""
    totals = [timing.total for timing in timings]
    return {
        "median_s": median(totals),
        "min_s": min(totals),
        "model_median_s": median(timing.model for timing in timings),
        "outside_median_s": median(timing.outside for timing in timings),
        "outside_share": median(timing.outside / timing.total for timing in timings),
        "seconds": totals,
        "losses": [timing.loss for timing in timings],
    }


# --- results ---------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown with aligned columns."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(head), line(["-" * width for width in widths]), *(line(row) for row in rows)])


def machine() -> dict[str, object]:
    """What figures depend on, without naming the machine."""
    facts: dict[str, object] = {
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
    }
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        known = set(cpuinfo.read_text(encoding="utf-8").split())
        facts["instructions"] = [flag for flag in _FLAGS if flag in known]
    return facts


def machine_line(facts: dict[str, object]) -> str:
    """The same as half a sentence."""
    versions = [f"{name} {facts[name]}" for name in ("python", "torch", "diffusers", "peft") if name in facts]
    return f"{facts['cores']} cores ({', '.join(facts.get('instructions', []))}), {', '.join(versions)}"


def write_result(path: Path, result: dict[str, object]) -> None:
    """Write the figures as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def write_docs(path: Path, name: str, text: str) -> None:
    """Replace the block of `docs/benchmarks.md` between `<!-- name -->` and `<!-- end of name -->`."""
    first, last = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    page = path.read_text(encoding="utf-8")
    before, rest = page.split(first)
    path.write_text(before + first + text.strip() + "\n" + last + rest.split(last)[1], encoding="utf-8")
