"""Does every architecture go through the engine from its example job file to a proven LoRA?

    python benchmarks/archs.py
    python benchmarks/archs.py sdxl flux --steps 60
    python benchmarks/archs.py --docs docs/benchmarks.md

One ready job file of each architecture runs as a user would run it (`detour run examples/...`), in a process of its
own, on the miniature of its model. Losses of single steps scatter with the time and the picture that were drawn, so the
loss shown is that on the training pictures at fixed noise and times, before the first step and after the last.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import machine, machine_line, table, write_docs, write_result

from detour import archs
from detour.config.load import load_job
from detour.nano import standing_in

EXAMPLES = Path(__file__).parents[1] / "examples"


@dataclass(frozen=True)
class Row:
    """What a run came to."""

    arch: str
    example: str
    steps: int
    loss_first: float
    loss_last: float
    seconds: float
    proof: str


def example_of(arch: str) -> Path:
    """The example of an architecture: of several the one with the shortest name."""
    found = [path for path in EXAMPLES.glob("*.yaml") if load_job(path).job.config.process[0].model.arch == arch]
    plain = [path for path in found if path.name.startswith("train_lora")]
    return min(plain, key=lambda path: (len(path.name), path.name))


def run(arch: str, home: Path, steps: int) -> Row:
    """Run the example of an architecture on its miniature."""
    path = example_of(arch)
    changes = standing_in.changes(path, home, steps)
    dataset = json.dumps({"folder_path": str(home / "pictures"), "resolution": standing_in.SIZE})
    changes += ["save.save_every=1000", f"validation={{validate_every: {steps}, dataset: {dataset}}}"]
    options = [part for change in changes for part in ("--set", change)]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "detour", "run", str(path), *options, "--fresh"],
        capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    seconds = time.monotonic() - started
    if done.returncode != 0:
        raise SystemExit(f"{path.name}: exit code {done.returncode}\n{done.stderr}")
    folder = home / "output" / load_job(path).job.config.output_name
    events: list[dict[str, Any]] = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event["type"] == "validation"]
    proofs = [event["proof"] for event in events if event["type"] == "save" and event["proof"]]
    return Row(arch, path.name, steps, losses[0], losses[-1], seconds, proofs[-1])


def main() -> None:
    """Run them all, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archs", nargs="*", metavar="ARCH", help="default: all")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("output/benchmark_archs.json"), help="where the JSON goes")
    parser.add_argument("--docs", type=Path, help="page whose table of this program is written anew")
    arguments = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as home:
        for arch in arguments.archs or archs.built():
            rows.append(run(arch, Path(home), arguments.steps))
            print(f"{arch}: {rows[-1].seconds:.0f} s", file=sys.stderr, flush=True)
    measured = f"Run on {machine_line(machine())}.\n\n"
    text = measured + table(
        ["architecture", "job file", "steps", "loss, first", "last", "seconds", "proof of the LoRA file"],
        [
            [r.arch, r.example, str(r.steps), f"{r.loss_first:.3f}", f"{r.loss_last:.3f}", f"{r.seconds:.0f}", r.proof]
            for r in rows
        ],
    )  # fmt: skip
    print(text)
    write_result(arguments.out, {"machine": machine(), "rows": [asdict(row) for row in rows]})
    if arguments.docs:
        write_docs(arguments.docs, "archs", text)


if __name__ == "__main__":
    main()
