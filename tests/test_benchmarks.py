"""Every benchmark program runs in its smallest setting, writes its figures, and fills its place in the page.

No figure is judged here but one: that the plain script and Detour train the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"


def run(program: str, folder: Path, *arguments: str) -> tuple[dict, str, str]:
    """The JSON, the text and the page of a program."""
    page, out = folder / "page.md", folder / "figures" / "out.json"
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    command = [sys.executable, str(ROOT / "benchmarks" / program), *arguments, "--out", str(out), "--docs", str(page)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, timeout=300, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text(encoding="utf-8")), done.stdout, page.read_text(encoding="utf-8")


def test_each_program_is_run_by_a_test_and_named_in_the_page():
    parts = {"common.py", "plain.py", "turbo_arms.py", "turbo_measure.py", "turbo_page.py", "web_place.py"}
    programs = {path.name for path in (ROOT / "benchmarks").glob("*.py")} - parts
    assert programs == {"archs.py", "startup.py", "step.py", "turbo.py", "web.py"}
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"benchmarks/{program}" in page for program in programs)


def test_startup(tmp_path):
    result, text, page = run("startup.py", tmp_path, "--runs", "1")
    assert [row["bar_s"] for row in result["commands"]] == [0.3, 0.8]
    assert all(len(row["wall_s"]) == len(row["cpu_s"]) == 1 for row in result["commands"])
    assert result["machine"]["cores"] >= 1
    for row in result["commands"]:
        assert row["command"] in text and row["command"] in page


@pytest.mark.slow
def test_archs(tmp_path):
    result, text, page = run("archs.py", tmp_path, "zimage", "pixart", "--steps", "2")
    assert [row["arch"] for row in result["rows"]] == ["zimage", "pixart"]
    for row in result["rows"]:
        assert row["loss_first"] > 0 and row["loss_last"] > 0
        assert row["proof"] in text and row["proof"] in page


@pytest.mark.slow
def test_step(tmp_path):
    options = ("--size", "miniature", "--rounds", "1", "--warmup", "1", "--threads", "1")
    result, text, page = run("step.py", tmp_path, *options)
    by_type = {row["dtype"]: row for row in result["plain"]}
    assert set(by_type) == {"fp32", "bf16"}
    assert by_type["fp32"]["loss_difference"] <= 1e-6
    assert by_type["fp32"]["lora_difference"] <= 1e-4  # of the way that it was trained
    for row in result["plain"]:
        for figures in row["contenders"].values():
            assert 0 < figures["model_median_s"] < figures["median_s"]
            assert len(figures["losses"]) == len(figures["seconds"]) == 4
    ours, theirs = (by_type["fp32"]["contenders"][name]["losses"] for name in ("detour", "script"))
    assert len(set(ours)) == 4, "the loss of every step is read"
    assert ours == pytest.approx(theirs, rel=1e-6)

    held = {name: row["denoiser_bytes"] for name, row in result["options"]["rows"].items()}
    assert held["base in nf4"] < held["base in int8"] < held["LoRA alone"]
    assert "training adapter, factored" in text and "training adapter, merged" in page
    assert text.rstrip().endswith((": met", ": MISSED"))


@pytest.mark.slow
def test_web(tmp_path):
    """A small folder, and every route: the program ends with an error where it has no address for one."""
    result, text, page = run("web.py", tmp_path, "--quick", "--rounds", "1", "--requests", "60")
    assert len({row["route"] for row in result["rows"]}) > 40
    assert all(row["first"] and row["again"] and row["size"] >= 0 for row in result["rows"])
    assert result["thumbnails"]["kept"] is True
    assert len(result["memory_bytes"]) == 13
    assert "`/api/jobs`" in text and "thumbnails are made once: met" in text
    assert "30 jobs, 2 of them with 4000 steps, 120 pictures" in page


def test_tables_are_replaced_and_nothing_around_them(tmp_path):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from common import write_docs
    finally:
        sys.path.pop(0)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- step -->\nold\n<!-- end of step -->\nafter\n", encoding="utf-8")
    write_docs(page, "step", "new\n\n")
    assert page.read_text(encoding="utf-8") == "before\n<!-- step -->\nnew\n<!-- end of step -->\nafter\n"


@pytest.mark.slow
def test_turbo(tmp_path):
    """The whole experiment with two steps and two prompts: prepared, run, left alone the second time, reported."""
    page = tmp_path / "docs" / "turbo.md"
    page.parent.mkdir()
    (page.parent / "img").mkdir()
    page.write_text((ROOT / "docs" / "turbo.md").read_text(encoding="utf-8"), encoding="utf-8")

    def turbo(action: str, *options: str) -> str:
        command = [sys.executable, str(ROOT / "benchmarks" / "turbo.py"), action, "--work", str(tmp_path / "work")]
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    turbo("prepare")
    arms = ("none", "adapter", "prior_anchor", "patch", "lr0")
    options = ("--quick", "--concept", "zig", "--seed", "1", "--arm", *arms)
    said = turbo("run", *options)
    assert all(f"zig {arm} 1: " in said for arm in arms)
    figures = {arm: json.loads((tmp_path / f"work/figures/zig-{arm}-1.json").read_text()) for arm in arms}
    drift = {arm: sum(map(sum, found["points"][-1]["drift"])) for arm, found in figures.items()}
    assert all(sum(map(sum, found["points"][0]["drift"])) == 0 for found in figures.values()), "untouched at step 0"
    assert drift["lr0"] < 1e-4 < drift["none"], "the control does not move"
    assert len({drift["none"], drift["adapter"], drift["prior_anchor"], drift["patch"]}) == 4
    assert turbo("run", *options) == "", "nothing is left to do"
    turbo("report", "--docs", str(page))
    assert "| prior_anchor" in page.read_text(encoding="utf-8")
    assert (page.parent / "img" / "turbo-curves.png").stat().st_size > 10_000
