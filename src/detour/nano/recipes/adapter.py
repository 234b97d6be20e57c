"""The training adapter of the miniature turbo: a job for the product itself, written and run.

    python -m detour.nano.recipes.adapter --turbo work/turbo8/model --out work/adapter

The turbo draws pictures of the world's prompts, and a LoRA learns from them by plain flow matching (docs/adapter.md).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from detour import files
from detour.nano import world
from detour.nano.recipes import base

if TYPE_CHECKING:
    from collections.abc import Sequence

JOB = """\
config:
  output_name: training_adapter
  output_folder: '{out}'
  process:
    - type: adapter
      model: {{arch: zimage, name_or_path: '{turbo}'}}
      adapter:
        pictures: {pictures}
        prompts_file: '{out}/prompts.txt'
        sizes: [128]
        caption_dropout_rate: 0.1
        stop: {{held_out: 64, every: 100, patience: 3, tolerance: 0.05}}
      train: {{steps: {steps}, batch_size: 16, lr: 3e-4, dtype: fp32, gradient_checkpointing: false, seed: {seed}}}
      network: {{type: lora, linear: 16}}
      save: {{save_every: 500}}
      sample: {{width: 128, height: 128}}
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Write the prompts and the job, and run it; the same command goes on with it."""
    parser = argparse.ArgumentParser(description="Make the training adapter of the miniature turbo.")
    parser.add_argument("--turbo", type=Path, required=True, help="the model folder of the turbo recipe")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=768)
    parser.add_argument("--steps", type=int, default=2000, help="at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    out = args.out.resolve()
    prompts = world.prompts(args.pictures, seed=args.seed + 21, dials=base.DIALS)
    files.write_bytes(out / "prompts.txt", "\n".join(prompt.text for prompt in prompts) + "\n")
    job = JOB.format(
        out=str(out).replace("'", "''"),
        turbo=str(args.turbo.resolve()).replace("'", "''"),
        pictures=args.pictures,
        steps=args.steps,
        seed=args.seed,
    )
    files.write_bytes(out / "job.yaml", job)
    ran = subprocess.run(  # noqa: S603  this very program
        [sys.executable, "-P", "-m", "detour", "adapter", str(out / "job.yaml")], check=False
    )
    raise SystemExit(ran.returncode)


if __name__ == "__main__":
    main()
