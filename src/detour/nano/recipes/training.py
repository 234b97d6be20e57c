"""The training loop of the recipes: Muon and AdamW, an average of the weights, and a state that resumes exactly.

Not the product's own engine, which trains LoRAs: this trains all the weights of a small model, on a processor.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from detour import UserError, files
from detour.nano.recipes import miniature
from detour.nn.quiet import quiet_imports

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from diffusers import ZImageTransformer2DModel

    Facts = dict[str, str | int | float]
    Figures = dict[str, float]

LOG = logging.getLogger("detour.nano.recipes")
_EVERY = 50  # steps between two lines of the log
STATE, LINES, MODEL = "state", "log.jsonl", "model"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How long and how fast. Steps are optimizer steps; rates reach their full height after `warmup` of them and fall
    along a cosine to a fiftieth."""

    steps: int
    muon_lr: float = 5e-3
    adamw_lr: float = 2e-3
    warmup: int = 60
    ema: float = 0.998
    clip: float = 1.0

    def share(self, step: int) -> float:
        """The share of the full rate at a step, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


class Trainer:
    """Trains a transformer in `out`: the state of the training, a line of figures now and then, the finished model."""

    def __init__(self, denoiser: ZImageTransformer2DModel, plan: Plan, out: Path, facts: Facts) -> None:
        """`facts` say what is trained; a state in `out` that was made with others is an error. Resumes where it can."""
        self.denoiser, self.plan, self.out = denoiser, plan, out
        self.facts: Facts = facts | asdict(plan)
        self.step = 0
        self.params = dict(denoiser.named_parameters())
        self.average = {name: param.detach().clone() for name, param in self.params.items()}
        matrices = [param for name, param in self.params.items() if _for_muon(name, param)]
        others = [param for name, param in self.params.items() if not _for_muon(name, param)]
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "muon": torch.optim.Muon(matrices, lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            "adamw": torch.optim.AdamW(others, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0),
        }
        files.remove_stale(out)
        self._resume()

    def run(
        self,
        loss_at: Callable[[int], Tensor],
        *,
        stop_at: float,
        judge: Callable[[], Figures],
        judge_every: int = 1000,
    ) -> bool:
        """Train to the end of the plan, or until `stop_at` (`time.monotonic`); whether the end was reached.

        `loss_at` gives the loss of a step, which must depend on nothing but its number and the weights. `judge` is
        called with the averaged weights in place.
        """
        losses, since = list[float](), time.monotonic()
        while self.step < self.plan.steps and time.monotonic() < stop_at:
            losses.append(self._train_step(loss_at))
            if self.step % _EVERY == 0:
                seconds = (time.monotonic() - since) / len(losses)
                self._note({"loss": sum(losses) / len(losses), "seconds_per_step": seconds})
                losses, since = [], time.monotonic()
            if self.step % judge_every == 0:
                self.save()
                self._judge(judge)
                losses, since = [], time.monotonic()
        self.save()
        if self.step % judge_every:
            self._judge(judge)
        miniature.write(self.out / MODEL, self.average)
        return self.step >= self.plan.steps

    def save(self) -> None:
        """Write the state, whole or not at all."""
        with files.new_directory(self.out / STATE) as folder:
            save_file({name: param.detach() for name, param in self.params.items()}, folder / "weights.safetensors")
            save_file(self.average, folder / "average.safetensors")
            for name, optimizer in self.optimizers.items():
                state = optimizer.state_dict()["state"]
                flat = {f"{index}.{key}": value for index, entry in state.items() for key, value in entry.items()}
                save_file(flat, folder / f"{name}.safetensors")
            files.write_json(folder / "state.json", {"step": self.step, "facts": self.facts})

    def _resume(self) -> None:
        folder = self.out / STATE
        if not folder.is_dir():
            return
        files.verify_directory(folder)
        found = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if found["facts"] != self.facts:
            names = sorted({*found["facts"], *self.facts})
            other = [name for name in names if found["facts"].get(name) != self.facts.get(name)]
            raise UserError(f"{folder} was made with another {', '.join(other)}; say the same, or choose another --out")
        self.step = found["step"]
        weights, average = (load_file(folder / f"{name}.safetensors") for name in ("weights", "average"))
        with torch.no_grad():
            for name, param in self.params.items():
                param.copy_(weights[name])
                self.average[name].copy_(average[name])
        for name, optimizer in self.optimizers.items():
            state: dict[int, dict[str, Tensor]] = {}
            for key, tensor in load_file(folder / f"{name}.safetensors").items():
                index, _, field = key.partition(".")
                state.setdefault(int(index), {})[field] = tensor
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        LOG.info("going on from step %d of %d", self.step, self.plan.steps)

    def _train_step(self, loss_at: Callable[[int], Tensor]) -> float:
        share = self.plan.share(self.step)
        for optimizer, lr in zip(self.optimizers.values(), (self.plan.muon_lr, self.plan.adamw_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * share
        loss = loss_at(self.step)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.params.values(), self.plan.clip, error_if_nonfinite=True)
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        kept = min(self.plan.ema, self.step / (self.step + 10))
        with torch.no_grad():
            for name, param in self.params.items():
                self.average[name].lerp_(param, 1 - kept)
        return loss.item()

    def _judge(self, judge: Callable[[], Figures]) -> None:
        own = {name: param.detach().clone() for name, param in self.params.items()}
        self._put(self.average)
        self._note(judge())
        self._put(own)

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, param in self.params.items():
            param.copy_(weights[name])

    def _note(self, figures: Figures) -> None:
        LOG.info("step %d: %s", self.step, ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
        files.make_folder(self.out)
        with (self.out / LINES).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": self.step} | figures) + "\n")


def _for_muon(name: str, param: Tensor) -> bool:
    """Matrices of attention and feed-forward; embeddings, modulation and outputs are AdamW's."""
    return param.ndim == 2 and (".attention." in name or ".feed_forward." in name)


def arguments(description: str) -> argparse.ArgumentParser:
    """What every recipe takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop then; the same command goes on")
    parser.add_argument("--threads", type=int, default=1, help="more than one only where nothing else runs")
    parser.add_argument("--compile", action="store_true", help="two minutes more at the start, half the time per step")
    return parser


@contextmanager
def process(threads: int) -> Iterator[None]:
    """A recipe's process: lines to the terminal, threads, and nothing of what libraries say about themselves."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    torch.set_num_threads(threads)
    try:
        with quiet_imports():
            yield
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


def deadline(minutes: float) -> float:
    """When `minutes` from now are over, on the clock of `time.monotonic`."""
    return time.monotonic() + 60 * minutes
