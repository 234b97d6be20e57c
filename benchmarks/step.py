"""How long is a step, how much of it is spent outside the model, and what does the same step cost as a plain script?

    python benchmarks/step.py --quick                     about a minute
    python benchmarks/step.py --docs docs/benchmarks.md   all tables, written into the page as well

Contenders do a step each in turn, in the order A B, B A, ..., within one process; medians are taken over the rounds,
ratios round by round. Saving checkpoints and drawing previews are left out.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from common import (
    ADAPTER,
    LORA_LAYERS,
    MIDDLE,
    MINIATURE,
    SIZES,
    Size,
    Timing,
    in_turn,
    job,
    machine,
    machine_line,
    ratio,
    summary,
    table,
    write_docs,
    write_place,
    write_result,
)
from plain import PlainScript, Recipe

from detour import archs
from detour.archs.zimage import SPEC
from detour.console import console_sink
from detour.events import JsonlSink, StepEvent, Tee
from detour.nn import lora
from detour.nn.quant import linear_bytes
from detour.train import build
from detour.train.control import Control
from detour.train.loop import Progress, train

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from detour.data.loader import Batch
    from detour.events import Event

BAR_OUTSIDE = 0.03
"""Share of a mid-size step that may be spent outside the model."""
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Clock:
    """What time is: seconds on the wall, or seconds of the processor (`--clock cpu`, for a machine that is shared)."""

    now = staticmethod(time.perf_counter)


class Inside:
    """Seconds inside a denoiser since they were last taken."""

    def __init__(self, denoiser: nn.Module) -> None:
        self._entered = self._seconds = 0.0
        self._in_backward = False
        denoiser.register_forward_pre_hook(self._enter)
        denoiser.register_forward_hook(self._leave)

    def take(self) -> float:
        """Forward and backward together."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _enter(self, *_: object) -> None:
        self._entered = Clock.now()

    def _leave(self, _module: nn.Module, _args: object, output: tuple[list[Tensor]]) -> None:
        self._seconds += Clock.now() - self._entered
        for picture in output[0]:
            if picture.requires_grad:
                picture.register_hook(self._backward)

    def _backward(self, _grad: Tensor) -> None:
        """The gradient has reached the output (of one picture): the model's part begins."""
        if not self._in_backward:
            self._in_backward, self._entered = True, Clock.now()
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_done)

    def _backward_done(self) -> None:
        self._seconds += Clock.now() - self._entered
        self._in_backward = False


class LastLoss:
    """A sink that keeps the loss of the last step."""

    loss = float("nan")

    def emit(self, event: Event) -> None:
        """Look at an event."""
        if isinstance(event, StepEvent):
            self.loss = event.loss

    def close(self) -> None:
        """Nothing to close."""


class Ours:
    """A Detour run, trained one step at a time by the real loop with its real sinks."""

    def __init__(self, folder: Path, size: Size, **options: dict[str, object]) -> None:
        made = job(folder, size, **options)
        process = archs.resolve(made.config.process[0])
        self._console = Path("/dev/null").open("w", encoding="utf-8")  # noqa: SIM115  open as long as the run
        self._last = LastLoss()
        output = Path(tempfile.mkdtemp(dir=folder))
        sink = Tee(console_sink(self._console), JsonlSink(output / "events.jsonl"), self._last)
        inputs = build.gather(process, sink)
        self.run = build.build(inputs, output, "benchmark", "", sink)
        # What is done once in a while, or once in a session, is in no figure. Each step here is a session of its own.
        self.run.save = self.run.catch_up = lambda *_, **__: None
        self.progress = Progress()
        self.run.start(self.progress)
        self._inside = Inside(self.run.denoiser)

    def batches(self, count: int) -> list[Batch]:
        """The first `count` batches that this run trains on."""
        opened = self.run.open_batches((0, 0))
        return [next(opened)[0] for _ in range(count)]

    def step(self) -> Timing:
        """One step."""
        started = Clock.now()
        train(self.run, self.progress, Control(stop_at=self.progress.step + 1))
        return Timing(Clock.now() - started, self._inside.take(), self._last.loss)


class Theirs:
    """The plain script on the same model and data, with the same first values of the LoRA."""

    def __init__(self, ours: Ours, folder: Path, size: Size, lora_dtype: str, steps: int) -> None:
        settings = ours.run.process.train
        recipe = Recipe(TYPES[settings.dtype], TYPES[lora_dtype], LORA_LAYERS, size.rank, SPEC.shift)
        self._script = PlainScript(folder / "model", recipe, settings, ours.batches(steps))
        lora.load_state(self._script.transformer, lora.state(ours.run.denoiser))
        self._inside = Inside(self._script.transformer)

    def trained(self) -> dict[str, Tensor]:
        """The trained tensors by the names that Detour gives them."""
        return lora.state(self._script.transformer)

    def step(self) -> Timing:
        """One step."""
        started = Clock.now()
        loss = self._script.step()
        return Timing(Clock.now() - started, self._inside.take(), loss)


def against_plain(folder: Path, size: Size, dtype: str, rounds: int, warmup: int) -> dict[str, object]:
    """Our step and the plain script's, same model, data, seed, noise and times."""
    steps = rounds + warmup
    ours = Ours(folder, size, train={"dtype": dtype})
    theirs = Theirs(ours, folder, size, "fp32", steps)
    first = {name: tensor.clone() for name, tensor in theirs.trained().items()}
    contenders: dict[str, Callable[[], Timing]] = {"detour": ours.step, "script": theirs.step}
    if dtype == "bf16":
        contenders["script, LoRA in bf16"] = Theirs(ours, folder, size, "bf16", steps).step
    taken = in_turn(contenders, rounds, warmup)
    pairs = [(a.loss, b.loss) for a, b in zip(taken["detour"], taken["script"], strict=True)]
    return {
        "size": size.name,
        "dtype": dtype,
        "contenders": {name: summary(timings) for name, timings in taken.items()},
        "ratios": {name: ratio(taken["detour"], taken[name]) for name in list(taken)[1:]},
        "loss_difference": max(abs(a - b) / abs(b) for a, b in pairs),
        "lora_difference": _distance(lora.state(ours.run.denoiser), theirs.trained())
        / _distance(first, theirs.trained()),
    }


def _distance(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((some[name] - others[name]).square().sum()) for name in others))


VARIATIONS: dict[str, dict[str, dict[str, object]]] = {
    "LoRA alone": {},
    "training adapter, factored": {"model": {"arch": "zimage:turbo", "assistant_lora_mode": "factored"}},
    "training adapter, merged": {"model": {"arch": "zimage:turbo", "assistant_lora_mode": "merged"}},
    "gradient checkpointing": {"train": {"gradient_checkpointing": True}},
    "base in int8": {"model": {"quantize": True, "qtype": "int8"}},
    "base in float8": {"model": {"quantize": True, "qtype": "float8"}},
    "base in nf4": {"model": {"quantize": True, "qtype": "nf4"}},
    "moving average": {"train": {"ema_config": {"use_ema": True}}},
}


def variations(folder: Path, size: Size, rounds: int, warmup: int) -> dict[str, object]:
    """What each option costs per step, in bf16, beside the LoRA alone."""
    runs: dict[str, Ours] = {}
    for name, options in VARIATIONS.items():
        model = dict(options.get("model", {}))
        if "assistant_lora_mode" in model:
            model["assistant_lora_path"] = str(folder / ADAPTER)
        runs[name] = Ours(folder, size, **{**options, "model": model})
    taken = in_turn({name: run.step for name, run in runs.items()}, rounds, warmup)
    first = taken["LoRA alone"]
    return {
        "size": size.name,
        "dtype": "bf16",
        "rows": {
            name: summary(timings)
            | {"ratio": ratio(timings, first), "denoiser_bytes": linear_bytes(runs[name].run.denoiser)}
            for name, timings in taken.items()
        },
    }


# --- tables ----------------------------------------------------------------------------------------------------------


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def _comparison_table(results: list[dict]) -> str:
    rows = []
    for result in results:
        for name, figures in result["contenders"].items():
            ours = name == "detour"
            rows.append(
                [
                    f"{result['size']}, {result['dtype']}",
                    name,
                    _seconds(figures["median_s"]),
                    _seconds(figures["min_s"]),
                    _seconds(figures["model_median_s"]),
                    f"{_seconds(figures['outside_median_s'])} ({figures['outside_share']:.2%})",
                    "" if ours else f"{1 / result['ratios'][name]:.3f}",
                    f"{result['loss_difference']:.1e}" if name == "script" else "",
                    f"{result['lora_difference']:.1e}" if name == "script" else "",
                ]
            )
    head = [
        "model",
        "program",
        "step",
        "fastest",
        "inside the model",
        "outside",
        "x ours",
        "losses differ",
        "LoRA differs",
    ]
    return table(head, rows)


def _variations_table(result: dict) -> str:
    rows = [
        [
            name,
            _seconds(figures["median_s"]),
            _seconds(figures["min_s"]),
            f"{figures['ratio']:.3f}",
            f"{figures['outside_share']:.2%}",
            f"{figures['denoiser_bytes'] / 2**20:.0f} MiB",
        ]
        for name, figures in result["rows"].items()
    ]
    return table(["option", "step", "fastest", "x LoRA alone", "outside", "denoiser with LoRA"], rows)


def _verdicts(results: list[dict]) -> list[str]:
    lines = []
    for result in results:
        what, ours = f"{result['size']} {result['dtype']}", result["contenders"]["detour"]
        if result["size"] == MIDDLE.name:
            met = "met" if ours["outside_share"] <= BAR_OUTSIDE else "MISSED"
            lines.append(f"{what}: {ours['outside_share']:.2%} outside the model, bar {BAR_OUTSIDE:.0%}: {met}")
        if result["dtype"] == "fp32":
            met = "met" if result["loss_difference"] <= 1e-6 else "MISSED"
            lines.append(f"{what}: losses differ by {result['loss_difference']:.1e} at most, bar 1e-6: {met}")
    return lines


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=10, help="counted steps of each program")
    parser.add_argument("--warmup", type=int, default=2, help="steps before that are not counted")
    parser.add_argument("--quick", action="store_true", help="few rounds, without the table of options")
    parser.add_argument("--skip-options", action="store_true", help="without the table of options")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, one thread")
    parser.add_argument("--out", type=Path, default=Path("output/benchmark_step.json"), help="where the JSON goes")
    parser.add_argument("--docs", type=Path, help="page whose tables are replaced")
    arguments = parser.parse_args()
    if arguments.clock == "cpu":
        Clock.now, arguments.threads = staticmethod(time.process_time), 1
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rounds, warmup = (3, 1) if arguments.quick else (arguments.rounds, arguments.warmup)
    sizes = [SIZES[name] for name in arguments.size or SIZES]
    comparisons, options = [], None
    with tempfile.TemporaryDirectory(prefix="detour-benchmark-") as scratch:
        for size in sizes:
            folder = Path(scratch) / size.name
            write_place(folder, size)
            for dtype in ("fp32", "bf16"):
                more = 4 if size is MINIATURE else 1  # its steps are short, and so jitter more
                comparisons.append(against_plain(folder, size, dtype, more * rounds, warmup))
        if not (arguments.quick or arguments.skip_options):
            options = variations(folder, sizes[-1], max(1, rounds // 2), warmup)

    facts = machine() | {package: version(package) for package in ("torch", "diffusers", "peft")}
    facts |= {"threads": torch.get_num_threads(), "clock": arguments.clock}
    clock = "processor time, one thread" if arguments.clock == "cpu" else f"{facts['threads']} threads"
    blocks = [f"Measured on {machine_line(facts)}; {clock}, {rounds} rounds.", _comparison_table(comparisons)]
    if options is not None:
        blocks += [f"Options, {options['size']}, {options['dtype']}:", _variations_table(options)]
    print("\n\n".join([*blocks, "\n".join(_verdicts(comparisons))]))
    result = {"machine": facts, "sizes": [asdict(size) for size in sizes], "plain": comparisons, "options": options}
    write_result(arguments.out, result)
    if arguments.docs:
        write_docs(arguments.docs, "step", "\n\n".join(blocks))


if __name__ == "__main__":
    main()
