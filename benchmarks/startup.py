"""How long until `detour --help` and `detour check` answer?

    python benchmarks/startup.py
    python benchmarks/startup.py --docs docs/benchmarks.md

Each command is started `--runs` times as a program of its own, in turn, after one run that is not counted. Beside the
wall time stands the processor time, which a busy machine changes little.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from common import MINIATURE, job, machine, machine_line, table, write_docs, write_result

from detour.config.load import dump_job
from detour.nano import drawn

PICTURES = 24
BARS = {"detour --help": 0.3, f"detour check ({PICTURES} pictures)": 0.8}
"""Seconds."""


def timed(arguments: list[str]) -> tuple[float, float]:
    """Wall and processor seconds of one run, which must succeed."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(arguments, check=True, capture_output=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15, help="counted runs of each command")
    parser.add_argument("--out", type=Path, default=Path("output/benchmark_startup.json"), help="where the JSON goes")
    parser.add_argument("--docs", type=Path, help="page whose table is replaced")
    arguments = parser.parse_args()

    detour = [sys.executable, "-m", "detour.cli"]
    with tempfile.TemporaryDirectory(prefix="detour-benchmark-") as scratch:
        folder = Path(scratch)
        drawn.write_dataset(folder / "dataset", PICTURES, MINIATURE.pixels)
        on_the_hub = {"name_or_path": None}  # the check asks no network for it
        (folder / "job.yaml").write_text(dump_job(job(folder, MINIATURE, model=on_the_hub)), encoding="utf-8")
        help_name, check_name = BARS
        commands = {help_name: [*detour, "--help"], check_name: [*detour, "check", str(folder / "job.yaml")]}
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for turn in range(1 + arguments.runs):
            for name, command in commands.items():
                times = timed(command)
                if turn > 0:
                    taken[name].append(times)

    rows, results = [], []
    for name, times in taken.items():
        wall, cpu = ([pair[which] for pair in times] for which in (0, 1))
        met = median(wall) <= BARS[name]
        rows.append([f"`{name}`", *(f"{value:.3f} s" for value in (median(wall), min(wall), median(cpu), BARS[name]))])
        results.append({"command": name, "bar_s": BARS[name], "met": met, "wall_s": wall, "cpu_s": cpu})
    facts = machine()
    text = f"Measured on {machine_line(facts)}; {arguments.runs} runs.\n\n" + table(
        ["command", "median", "fastest", "processor", "bar"], rows
    )
    print(text)
    print("\n".join(f"{result['command']}: {'met' if result['met'] else 'MISSED'}" for result in results))
    write_result(arguments.out, {"machine": facts, "commands": results})
    if arguments.docs:
        write_docs(arguments.docs, "startup", text)


if __name__ == "__main__":
    main()
